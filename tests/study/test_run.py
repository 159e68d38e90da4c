"""The whole road on a tiny local model: text to scores, made once, resumed, kept apart by profile, refused early."""

import pytest
import torch
from tiny_project import profile

from masksae import SAE, Run
from masksae.app import repro
from masksae.errors import ConfigError, DataError
from masksae.files import read_json
from masksae.study import run
from masksae.study.scores import reconstruction


def test_from_text_to_scores(new_project):
    run = Run(profile(new_project))
    saes = run.saes
    assert [row["sae"] for row in run.table] == list(saes) and len(saes) == 6
    assert list(saes)[0] == "unmasked-plain-s0" and (run.build / "saes/masked/masked-matryoshka-s0").is_dir()
    assert [part.name for part in run.parts] == ["main-s0", "main-s1", "matryoshka-s0"]
    rows = run.scored(reconstruction.reconstruction_scores)
    assert len(rows) == 12
    for row in rows:
        assert row["ev_centred"] > 0 and row["ce_zero"] > 0
        if row["mode"] == "matched":
            assert row["l0"] == pytest.approx(row["k"], abs=0.01)
    assert rows[0]["ce_original"] == rows[-1]["ce_original"]
    unmasked, masked = ([r for r in rows if r["arm"] == arm] for arm in ("unmasked", "masked"))
    assert [r["seed"] for r in unmasked] == [r["seed"] for r in masked]
    assert any(a["ev_centred"] != b["ev_centred"] for a, b in zip(unmasked, masked))


def test_the_masked_arm_is_trained_on_what_the_model_makes_of_masked_text(project):
    run = Run(profile(project))
    arm = run.profile.arms[1]
    x, is_masked = run.stream(arm)._load(0)
    ids, where = run.corrupt(arm, run.ids("train"))
    assert 0.25 < is_masked.double().mean() < 0.35 and torch.equal(is_masked, where[:, 1:].flatten()[: len(x)])
    assert (ids[:, 0] == run.bos_id).all() and (ids[where] == run.replacement(arm)["token_id"]).all()
    expected = run.activations(ids[: len(x) // 31])
    torch.testing.assert_close(x.float(), expected, rtol=1e-2, atol=1e-2)


def test_what_is_finished_is_read_back_and_what_is_missing_is_made(new_project, monkeypatch):
    path = profile(new_project)
    before = {name: sae.W_dec.clone() for name, sae in Run(path).saes.items()}
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *_, **__: pytest.fail("trained again"))
        again = Run(path)
        assert all(torch.equal(again.saes[name].W_dec, w) for name, w in before.items())
        by_part = {name: sae for part in again.parts for name, sae in part.load_saes().items()}
        assert all(torch.equal(by_part[name].W_dec, w) for name, w in before.items())
    for folder in (new_project / "cache/training").glob("*/*"):
        assert {p.name for p in folder.iterdir()} == {".lock", "log.jsonl"}  # the rest is gone once the SAEs are there
    monkeypatch.setenv("MASKSAE_CACHE", str(new_project / "other"))
    assert all(torch.equal(sae.W_dec, before[name]) for name, sae in Run(path).saes.items())


def test_scores_are_made_once(project, monkeypatch):
    run = Run(profile(project))
    rows = run.scored(reconstruction.reconstruction_scores)
    monkeypatch.setattr(reconstruction, "spliced_losses", lambda *_, **__: pytest.fail("scored again"))
    assert Run(project / "tiny.yaml").scored(reconstruction.reconstruction_scores) == rows


def test_an_arm_may_be_renamed(project):
    first = Run(profile(project))
    rows = first.scored(reconstruction.reconstruction_scores)
    arms = [{"name": "clean", "p": 0.0}, {"name": "corrupted", "p": 0.3}]
    second = Run(profile(project, "renamed", arms=arms))
    assert [name.split("-")[0] for name in second.saes] == 3 * ["clean", "corrupted"]
    renamed = second.scored(reconstruction.reconstruction_scores)
    assert [r["arm"] for r in renamed] == [{"unmasked": "clean", "masked": "corrupted"}[r["arm"]] for r in rows]
    assert [r["ev_centred"] for r in renamed] == [r["ev_centred"] for r in rows]


def test_profiles_do_not_touch_each_other(project):
    first, second = Run(profile(project)), Run(profile(project, "other", training={"lr": 1e-3}))
    first.saes, second.saes
    assert first.build != second.build and first.results != second.results and first.figures != second.figures
    a, b = (SAE.load(run.build / "saes/masked/masked-plain-s0") for run in (first, second))
    assert not torch.equal(a.W_dec, b.W_dec)


def test_results_travel_through_files(project):
    run = Run(profile(project))
    run.save_result("facts", {"x": 1})
    assert Run(project / "tiny.yaml").result("facts") == {"x": 1} == read_json(project / "results/tiny/facts.json")
    with pytest.raises(DataError, match=r"claims.json is missing. Run notebook 09_paper .* run 09_paper"):
        run.result("claims")


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"model": {"block": 3}}, ConfigError, "block 3 is outside LlamaForCausalLM, whose blocks are numbered 0 to 2"),
        ({"model": {"mask_token": "<msk>"}}, ConfigError, "'<msk>' is not a token of this model"),
        ({"model": {"source": "no/such"}}, ConfigError, "neither a known name"),
        ({"text": {"block_length": 900}}, DataError, "fewer than 900 tokens"),
        ({"text": {"train_tokens": 10**6}}, DataError, "ran out"),
        ({"text": {"sources": ["nowhere.txt"]}}, ConfigError, "'nowhere.txt' is neither"),
        ({"training": {"warmup": 500}}, ConfigError, "warmup (500)"),
    ],
)
def test_refused_before_the_long_work(project, monkeypatch, changes, error, words):
    import masksae.training.group

    monkeypatch.setattr(masksae.training.group.Group, "run", lambda *_: pytest.fail("training began"))
    with pytest.raises(error) as caught:
        Run(profile(project, **changes)).saes
    assert words in str(caught.value)


def test_an_empty_corpus(project):
    (project / "text.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="hold no document"):
        Run(profile(project)).saes


def test_read_only_output_folder(new_project, as_nobody):
    path = profile(new_project)
    new_project.chmod(0o555)
    name, message = as_nobody(lambda: Run(path))
    new_project.chmod(0o755)
    assert name == "OutputError" and "results" in message


def test_a_changed_arm_is_trained_and_scored_alone(project, monkeypatch):
    arms = [{"name": "unmasked", "p": 0.0}, {"name": "masked", "p": 0.3}]
    dropped = {"name": "dropped", "p": 0.3, "drop_masked": True}
    blocks = [{"name": "main", "saes": ["plain"], "pairs": [0]}]
    before = Run(profile(project, arms=[*arms, dropped], blocks=blocks))
    rows = before.scored(reconstruction.reconstruction_scores)
    trained, scored = [], []
    train, losses = run.train, reconstruction.spliced_losses
    monkeypatch.setattr(run, "train", lambda *a, **k: trained.append(len(a[0])) or train(*a, **k))
    monkeypatch.setattr(reconstruction, "spliced_losses", lambda *a, **k: scored.append({*a[2]}) or losses(*a, **k))
    after = Run(profile(project, "changed", arms=[arms[0], arms[1] | {"p": 0.2}, dropped], blocks=blocks))
    again = after.scored(reconstruction.reconstruction_scores)
    assert trained == [1] and [{sae for sae, _ in saes} for saes in scored] == [{"masked-plain-s0"}]
    masked = {row["sae"] for row in rows if row["arm"] == "masked"}
    assert [a == b for a, b in zip(rows, again)] == [row["sae"] not in masked for row in rows]
    streams = [[run.stream_folder(member.arm, 0) for member in run.profile.members] for run in (before, after)]
    assert [a == b for a, b in zip(*streams)] == [True, False, True] and streams[0][1] == streams[0][2]


def test_saes_of_another_configuration_are_not_taken_for_this_ones(project, monkeypatch):
    rows = Run(profile(project)).scored(reconstruction.reconstruction_scores)
    trained = []
    train = run.train
    monkeypatch.setattr(
        run, "train", lambda configs, *rest, **more: trained.append(len(configs)) or train(configs, *rest, **more)
    )
    assert Run(profile(project)).scored(reconstruction.reconstruction_scores) == rows and not trained
    other = Run(profile(project, training={"lr": 1e-3})).scored(reconstruction.reconstruction_scores)
    assert sum(trained) == 6 and all(a["ev_centred"] != b["ev_centred"] for a, b in zip(rows, other))
    run_before, text = Run(profile(project)), project / "text.jsonl"
    before = [run_before.id_of(member) for member in run_before.profile.members]
    text.write_text(text.read_text().replace("the", "thy"))
    after = Run(profile(project))
    assert not {*before} & {after.id_of(member) for member in after.profile.members}


def test_arms_that_see_the_same_are_trained_together(project):
    arms = [
        {"name": "unmasked", "p": 0.0},
        {"name": "kept", "p": 0.3},
        {"name": "dropped", "p": 0.3, "drop_masked": True},
    ]
    blocks = [{"name": "main", "saes": ["plain"], "pairs": [4, 5]}]
    together = Run(profile(project, arms=arms, blocks=blocks))
    names = ["unmasked-plain-s4", "kept+dropped-plain-s4", "unmasked-plain-s5", "kept+dropped-plain-s5"]
    assert [group.name for group in together.profile.groups] == names
    alone = Run(profile(project, "alone", arms=arms[:2], blocks=blocks))
    a, b = (run.parts[0].load_saes()["kept-plain-s4"] for run in (together, alone))
    assert torch.equal(a.W_dec, b.W_dec) and torch.equal(a.threshold, b.threshold)


def test_where_nothing_is_kept_in_scratch_the_unmasked_pairs_share_a_stream(project):
    once = Run(profile(project, training={"epochs": 1, "warmup": 2, "threshold_start": 5}))
    names = [
        "unmasked-plain-s0+s1",
        "masked-plain-s0",
        "masked-plain-s1",
        "unmasked-matryoshka-s0",
        "masked-matryoshka-s0",
    ]
    assert sorted(group.name for group in once.profile.groups) == sorted(names)
    assert list(once.parts[1].load_saes()) == ["unmasked-plain-s1", "masked-plain-s1"]


def test_pairs_are_kept_and_taken_from_where_they_are_kept(project, monkeypatch):
    path = profile(project, keep_pairs=True)
    first = Run(path)
    first.train_missing()
    rows = first.scored(reconstruction.reconstruction_scores)
    files = sorted(file.name for file in (first.results / "pairs").iterdir())
    assert files == ["main-s0.json", "main-s1.json", "matryoshka-s0.json"]
    kept = read_json(first.results / "pairs/main-s0.json")["scores"]
    assert {"clean", "reconstruction", "thresholds"} <= kept.keys()
    assert repro.taken(path).splitlines()[0] == (
        "16 of 78 scores are taken from results/tiny/pairs, as they were made. To make them afresh: "
        "`git rm -r results/tiny/pairs` first."
    )
    assert not any((first.build / "saes").iterdir())  # an output of the stage of notebook 02, which no other writes to
    monkeypatch.setenv("MASKSAE_CACHE", str(project / "elsewhere"))  # another machine, with the results only
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("trained again"))
    assert Run(path).scored(reconstruction.reconstruction_scores) == rows
    with pytest.raises(pytest.fail.Exception):  # of another profile they are not taken
        Run(profile(project, keep_pairs=True, training={"lr": 1e-3})).scored(reconstruction.reconstruction_scores)


def test_activations_are_freed_that_no_later_part_is_trained_on(project):
    run = Run(profile(project, keep_pairs=True))
    for part in run.parts:
        part.load_saes()
    masked = {pair: run.stream_folder(run.profile.arms[1], pair) for pair in (0, 1)}
    unmasked = run.stream_folder(run.profile.arms[0], 0)
    run.free(run.parts[0])
    assert masked[0].exists() and unmasked.exists()  # the last part is trained on them
    run.free(run.parts[1])
    assert not masked[1].exists() and masked[0].exists() and unmasked.exists()
    run.free(run.parts[2])
    assert not masked[0].exists() and not unmasked.exists()


def test_sinks_are_neither_trained_on_nor_scored(project):
    whole = Run(profile(project))
    norm = whole.held_out.norm(dim=1)
    times = 0.5 * (1 + norm.max().item() / norm.median().item())  # of some tokens
    run = Run(profile(project, model=whole.profile.model.model_dump() | {"sinks": times}))
    most = times * norm.median().item()
    assert 0 < (norm > most).sum() < len(norm) / 2
    assert torch.equal(run.held_out, whole.held_out[norm <= most])
    assert torch.equal(run.is_sink(whole.held_out), norm > most)
    assert torch.equal(run.held_out_all, whole.held_out_all)
    x = next(iter(run.stream(run.profile.arms[0])))[0]
    assert x.norm(dim=1).max() < 1.1 * most < norm.max() * 1.1
    assert whole.stream_recipe(whole.profile.arms[0]) != run.stream_recipe(run.profile.arms[0])
    assert "sinks" not in whole.profile.model.model_dump()  # what was made before keeps its id

    replace = reconstruction._splice(next(iter(whole.saes.values())), None, run.is_sink)
    sequences = whole.held_out.view(2, -1, whole.held_out.shape[-1])
    new, massive = replace(sequences), (norm > most).view(2, -1)
    assert torch.equal(new[massive], sequences[massive]) and not torch.equal(new, sequences)
    assert not whole.is_sink(whole.held_out * 1e6).any()

    corrupted = [reconstruction.corrupted_text(some, run.profile.arms[1], 0) for some in (whole, run)]
    kept = corrupted[0]["x"].norm(dim=1) <= most
    assert 0 < kept.sum() < len(kept)
    assert all(torch.equal(corrupted[1][name], values[kept]) for name, values in corrupted[0].items())


def test_every_kind_of_replacement(project):
    arms = [
        {"name": "unmasked", "p": 0.0},
        {"name": "masked", "p": 0.3},
        {"name": "rare", "p": 0.3, "token": "rare"},
        {"name": "random", "p": 0.3, "token": "random"},
        {"name": "letter", "p": 0.3, "token": "e"},
        {"name": "denoising", "p": 0.3, "denoise": True},
        {"name": "noise", "p": 0.0, "noise": 0.5},
        {"name": "fresh", "p": 0.3, "fresh_masks": True},
    ]
    run = Run(profile(project, arms=arms, blocks=[{"saes": ["plain"], "pairs": [0]}]))
    _, masked, rare, random, letter, denoising, noise, _ = run.profile.arms
    text = run.ids("train")
    counts = text[:, 1:].flatten().bincount()
    token = run.replacement(rare)["token_id"]
    assert counts[token] == counts[counts > 0].min() and token != run.bos_id
    shown, where = run.corrupt(random, text)
    assert len(shown[where].unique()) > 10 and torch.equal(where, run.corrupt(masked, text)[1])
    assert run.replacement(letter)["token_id"] != run.replacement(masked)["token_id"]
    x, is_masked, clean = next(run.stream(denoising).batches([(0, True)]))[0]
    assert not is_masked.any() and not torch.equal(x, clean)
    saes = run.parts[0].load_saes()
    assert len({sae.W_dec.sum().item() for sae in saes.values()}) == len(arms)  # each arm sees something of its own
    assert saes["denoising-plain-s0"].config.drop_masked
    plain, noisy = (next(run.stream(arm).batches([(0, False)]))[0][0] for arm in (run.profile.arms[0], noise))
    assert plain.shape == noisy.shape and not torch.equal(plain, noisy)
