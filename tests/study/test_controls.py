"""Controls in a run's place: one pair of them for each unmasked SAE, scored beside it by the same functions; the words
follow the numbers. And what silent latents fire on, on text that is the run's own, corrupted."""

import random

import pytest
import torch
from tiny_project import profile

from masksae import Run
from masksae.metrics.controls import permuted_decoder, random_like
from masksae.metrics.reconstruction import active_counts, reconstruction
from masksae.study.figures.controls import draw_controls
from masksae.study.report import controls as report
from masksae.study.scores import controls, probing
from masksae.study.scores import reconstruction as scores

WORDS = "the one two three sat on mat ran past".split()


@pytest.fixture
def run(project, monkeypatch):
    """A run of two pairs and a task. A random model neither spells nor knows parents: these scores are left out."""
    rng = random.Random(0)
    rows = [f"{' '.join(rng.choices(WORDS, k=4))} {i}{'st'[i % 2]},{i % 2}" for i in range(120)]
    (project / "task.csv").write_text("\n".join(["prompt,target", *rows]))
    monkeypatch.setattr(controls, "SCORES", (scores.clean_scores, probing.probing_scores))
    run = Run(profile(project))
    run.saes
    return run


def test_controls_stand_beside_the_saes_that_they_are_made_of(run):
    rows = run.scored(controls.control_scores)
    kinds = ["trained", "permuted", "random"]
    assert [(r["seed"], r["control"], r["mode"]) for r in rows] == [
        (seed, kind, mode) for seed in (0, 1) for kind in kinds for mode in ("as_trained", "matched")
    ]
    assert {(row["arm"], row["grid"]) for row in rows} == {("unmasked", "plain")}
    own = {(r["sae"], r["mode"]): r for r in run.scored(scores.reconstruction_scores)}
    saes = run.saes
    for row in rows:
        assert row["l0"] == pytest.approx(3 if row["mode"] == "matched" else own[row["sae"][:17], "as_trained"]["l0"])
        if row["control"] == "trained":
            assert row["ev_centred"] == own[row["sae"], row["mode"]]["ev_centred"]
            continue
        sae = saes[row["sae"].rpartition("-")[0]]
        make = {"random": lambda s, seed: random_like(s, run.held_out, seed=seed), "permuted": permuted_decoder}
        direct = reconstruction(make[row["control"]](sae, seed=row["seed"]), run.held_out, threshold=row["threshold"])
        assert row["ev_centred"] == direct.ev_centred and row["dead_latents"] == direct.dead_latents
    *_, last = run.parts  # of another grid
    assert controls.control_scores(last) == []
    beside = controls.controls(last, "unmasked", "matryoshka")
    assert beside.language_model is run.language_model and beside.held_out is run.held_out
    assert [row["sae"] for row in beside.table] == [*beside.load_saes()]
    figure = draw_controls(rows)
    assert [axis.get_title() for axis in figure.axes] == ["explained variance ↑", "probing, 5 latents ↑"]
    table = {row["score"]: row for row in report.control_table(rows)}["explained variance"]
    ev = {kind: [r["ev_centred"] for r in rows if (r["control"], r["mode"]) == (kind, "matched")] for kind in kinds}
    assert table["random weights"] == f"{sum(ev['random']) / 2:.3f} (2 of 2)"
    assert table["as trained"] == f"{sum(ev['trained']) / 2:.3f}" and table["better is"] == "more"


def numbers(control, seed, full, f1):
    row = {"control": control, "seed": seed, "mode": "matched", "mean_full": full, "main_f1": f1}
    row |= {"context_full": 0.1, "context_main_f1": 0.7}
    return [row, row | {"mode": "as_trained", "mean_full": 99.0}]


def test_words_and_numbers_of_the_table():
    rows = [*numbers("trained", 0, 0.16, 0.55), *numbers("trained", 1, 0.20, 0.51)]
    assert report.control_words(rows) == report.control_words([]) == report.control_table([]) == []
    rows += [*numbers("random", 0, 0.22, 0.13), *numbers("random", 1, 0.18, 0.60)]
    rows += [*numbers("permuted", 0, 0.10, 0.55), *numbers("permuted", 1, 0.06, 0.51)]
    absorption, f1, *_ = report.control_table(rows)
    assert absorption["better is"] == "less" and f1["permuted decoder"] == "0.530 (the same)"
    assert [absorption[c] for c in ("as trained", "permuted decoder", "random weights")] == [
        "0.180", "0.080 (0 of 2)", "0.200 (1 of 2)",
    ]  # fmt: skip
    assert f1["random weights"] == "0.365 (1 of 2)"
    letters, credit, contexts, _ = report.control_words(rows)
    assert "0.200 on full absorption, not lower than the trained SAEs' 0.180" in letters and "0.36" in letters
    assert "permuted, 0.080: so much is credited" in credit and "not lower than the trained SAEs' 0.100" in contexts
    low = [row | {"mean_full": 0.01} if row["control"] == "random" else row for row in rows]
    assert "0.010 on full absorption, lower than the trained SAEs' 0.180" in report.control_words(low)[0]
    frozen = report.control_words([*rows, *numbers("frozen", 0, 0.21, 0.14)])
    assert len(frozen) == 6 and frozen[2].endswith("where it began, 0.210, at an F1 of 0.14 (1 pairs).")


def test_corrupted_text_is_the_runs_own_with_masks(run):
    arm = run.profile.arms[1]
    text = scores.corrupted_text(run, arm, 0)
    ids, is_masked = run.corrupt(arm, run.ids("held_out"), 0)
    assert torch.equal(text["is_masked"].view(len(ids), -1), is_masked[:, 1:])
    assert 0.2 < text["is_masked"].double().mean() < 0.4
    before = (is_masked[:, 1:].cumsum(1) == 0).flatten()  # the model is causal: nothing has changed there yet
    torch.testing.assert_close(text["x"][before], run.held_out[before], rtol=1e-4, atol=1e-5)
    assert not torch.isclose(text["x"][~before], run.held_out[~before], atol=1e-3).all(1).any()
    assert not torch.equal(text["is_masked"], scores.corrupted_text(run, arm, 1)["is_masked"])


def test_silent_latents_of_each_sae_on_the_masks_of_its_pair(run):
    rows, saes = run.scored(scores.reconstruction_scores), run.saes
    for row in rows:
        text = scores.corrupted_text(run, run.profile.arms[1], row["seed"])
        counts = [
            active_counts(saes[row["sae"]], x, threshold=row["threshold"])
            for x in (run.held_out, text["x"], text["x"][~text["is_masked"]])
        ]
        silent = counts[0] == 0
        assert int(silent.sum()) == row["dead_latents"]
        assert row["silent_everywhere"] == int((silent & (counts[1] == 0)).sum())
        assert row["silent_but_corrupted"] == int((silent & (counts[2] > 0)).sum())
        assert sum(row[f"silent_{what}"] for what in ("but_masked", "but_corrupted", "everywhere")) == silent.sum()
        sae = saes[row["sae"]]
        trained_on = 256 * (sae.history[-1]["step"] + 1)
        died = sae.tokens_since_fired >= sae.config.aux.dead_after(trained_on)
        assert row["dead_in_training"] == sae.history[-1]["dead"] == int(died.sum())


def test_without_a_masked_arm_nothing_is_asked_of_corrupted_text(project):
    run = Run(profile(project, arms=[{"name": "unmasked", "p": 0.0}]))
    [row, *_] = run.scored(scores.reconstruction_scores)
    assert "silent_everywhere" not in row and row["dead_latents"] >= 0
