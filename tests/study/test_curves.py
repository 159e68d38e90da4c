"""Absorption along training: effects at equal steps and at equal explained variance on curves that are known, tables
and pictures."""

import pytest
from tiny_project import profile

from masksae import Run
from masksae.errors import DataError
from masksae.study.figures import absorption, style
from masksae.study.report import curves
from masksae.study.scores.curves import along_scores


def curve(arm, p, seed, ev, letters, contexts, steps=(10, 20, 40)):
    shared = {"arm": arm, "p": p, "seed": seed, "k": 20, "grid": "g", "l0_as_trained": 20.0 + 10 * p}
    return [
        shared
        | {"step": s, "ev_centred": e, "letters": a, "contexts": c, "letters_items": {"a": a, "b": a}}
        | {"contexts_items": {"the": c, "to": c}, "dead_latents": 0, "letters_specific": a, "contexts_specific": c / 2}
        | {"letters_main_f1": e - 0.1, "contexts_main_f1": e}
        for s, e, a, c in zip(steps, ev, letters, contexts)
    ]


@pytest.fixture
def rows():
    found = []
    for seed, d in enumerate((0.0, 0.01, -0.01)):
        found += curve("unmasked", 0.0, seed, (0.7, 0.8, 0.9), (0.1 + d, 0.2 + d, 0.3 + d), (0.05, 0.10, 0.15 + d))
        found += curve("masked", 0.3, seed, (0.6, 0.7, 0.75), (0.05, 0.1, 0.15 + d), (0.02, 0.02, 0.025))
        found += curve("worse", 0.3, seed, (0.3, 0.4, 0.5), (0.1, 0.2, 0.3 + d), (0.1, 0.1, 0.1))
    return found


def test_effects_at_equal_steps_and_at_equal_explained_variance(rows):
    found = {(e["arm"], e["kind"][:5], e["equal"]): e for e in curves.effects(rows)}
    steps, equal = found["masked", "same ", "steps"], found["masked", "same ", "EV"]
    assert steps["difference"] == pytest.approx(-0.15) and steps["items"] is None
    contexts = next(e for e in curves.effects(rows) if e["kind"] == curves.KINDS["contexts"] and e["equal"] == "steps")
    assert contexts["items"] == 2  # parents are a sample, letters all there are
    assert equal["baseline"] == pytest.approx(0.15) and equal["difference"] == pytest.approx(
        0.0
    )  # all of it under-training
    assert found["masked", "cross", "EV"]["difference"] == pytest.approx(0.025 - 0.075)  # and this is not
    assert ("worse", "same ", "EV") not in found  # nothing is extrapolated
    both = [e for e in curves.effects(rows) if e["kind"].startswith("cross-token less") and e["arm"] == "masked"]
    assert [e["difference"] for e in both] == pytest.approx([(0.025 - 0.15) - (0.15 - 0.30), 0.025 - 0.075], abs=1e-9)
    assert both[1]["items"] == 2 and equal["f1"] == pytest.approx([0.65, 0.65])


def test_without_snapshots_nothing_is_found_along_training():
    assert curves.effects([]) == curves.growth([]) == []


def test_only_the_grid_that_decides_is_followed_along_training(project):
    """SAEs of two grids share pairs, and would be taken for one another."""
    run = Run(profile(project, training={"snapshots": [12]}))
    *_, other = run.parts
    assert {row["grid"] for row in other.table} == {"matryoshka"} and other.has_snapshots
    assert along_scores(other) == []


def test_pairs_without_a_partner_are_named(rows):
    alone = [row for row in rows if not (row["arm"] == "unmasked" and row["seed"] == 1)]
    with pytest.raises(DataError, match=r"masked has the pairs \[1\], which have no unmasked partner"):
        curves.effects(alone)


def test_tables(rows):
    table = curves.effect_table(curves.effects(rows))
    assert "does not reach it" in table.set_index("arm").loc["worse", "at equal clean EV"].iloc[0]
    assert list(table["F1 of main latents there"]) == ["0.65 → 0.65", "0.75 → 0.75", "–", "–", "–", "–"]
    growth = curves.growth(rows)
    assert len(growth) == 6 and growth[0]["from"] == 20 and "0.200 → 0.300" in growth[0]["change"]
    assert {row["step"] for row in curves.finished(rows)} == {40}


def test_pictures_show_every_arm(rows):
    style.style()
    along = absorption.draw_along(rows)
    assert len(along.axes) == 4 and all(axis.get_ylim()[0] == 0 for axis in along.axes)
    labels = {text.get_text() for text in along.axes[1].get_legend().get_texts()}
    assert labels == {"unmasked", "masked", "worse", "specific"}


def test_snapshots_of_a_run(project):
    arms = [{"name": "unmasked", "p": 0.0}, {"name": "masked", "p": 0.3}]
    arms += [{"name": "dropped", "p": 0.3, "drop_masked": True}, {"name": "fewer", "p": 0.0, "tokens": 0.5}]
    blocks = [{"name": "main", "saes": ["plain"], "pairs": [1]}]
    blocks += [{"name": "without", "saes": ["matryoshka"], "pairs": [1], "snapshots": False}]
    run = Run(profile(project, training={"snapshots": [12, 24]}, arms=arms, blocks=blocks))
    part, without = run.parts
    steps = part.snapshots()
    names, last = [f"{arm['name']}-plain-s1" for arm in arms], max(steps)
    short = max(step for step, saes in steps.items() if names[3] in saes)
    assert sorted(steps) == sorted([12, 24, short, last]) and sorted(steps[12]) == sorted(names)
    assert short == pytest.approx(last / 2, abs=2) and sorted(steps[last]) == sorted(names[:3])
    finished = part.load_saes()[names[0]]
    assert (steps[last][names[0]].W_dec == finished.W_dec).all()
    assert not (steps[24][names[0]].W_dec == finished.W_dec).all()
    assert part.has_snapshots and not without.has_snapshots


def test_the_caption_has_the_numbers(rows):
    text = curves.caption(curves.effects(rows))
    assert (
        "masked: same token −0.150 (95 % −0.150 to −0.150), cross-token −0.125" in text and "worse: same token" in text
    )


def test_quality_has_the_parts_of_absorption_and_what_belongs_beside_it():
    shared = {"grid": "g", "arm": "unmasked", "mode": "matched"}
    parts = {"specific": 0.05, "middle": 0.01, "dense": 0.04}
    item = [{"f1": 0.5, "recall": 0.75}, {"f1": 0.7, "recall": 0.25}]
    letters = [
        shared | {"sae": sae, "mean_full": 0.1, "dense_absorbers": 0.4, "letters": item}
        | {f"mean_{key}": value for key, value in parts.items()}
        for sae in ("a", "b")
    ]  # fmt: skip
    contexts = [
        {key.replace("mean_", "context_").replace("dense_a", "context_dense_a"): value for key, value in row.items()}
        | {"parents": item}
        for row in letters
    ]
    table = [
        {"sae": sae, "mode": mode, "dead_latents": dead, "l0": 20.0, "ev_centred": 0.9}
        for sae, dead in (("a", 2), ("b", 4))
        for mode in ("matched", "as_trained")
    ]
    for row in curves.quality(letters, contexts, table):
        assert {key: row[key] for key in parts} == pytest.approx(parts) and row["absorption"] == pytest.approx(0.1)
        assert row["F1 of main latents"] == pytest.approx(0.6) and row["recall"] == pytest.approx(0.5)
        assert (row["dead latents"], row["clean L0"], row["EV"], row["dense absorbers"]) == (3, 20, 0.9, 0.4)


def test_parent_by_parent(rows):
    for row in rows:
        if row["arm"] == "masked":
            row["contexts_items"]["to"] = 0.15 + 0.01 * row["seed"]
    table = curves.by_parent(rows, "masked")
    assert [row["parent"] for row in table] == ["the", "to"] and "0.150 → 0.025" in table[0]["effect"]
    assert table[0]["p"] < 0.01 < table[1]["p"] and table[0]["p_holm"] == pytest.approx(2 * table[0]["p"])
