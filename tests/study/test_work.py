"""A run worked off pair by pair, the variants of the gate, and the search for the k and the noise of an arm."""

import pytest
from tiny_project import profile

from masksae import Run
from masksae.errors import ConfigError, DataError
from masksae.files import read_json
from masksae.study import gate, search, times, work
from masksae.study.profile import Profile, load_profile
from masksae.study.report import gate as report
from masksae.study.sections import Gate


def test_every_part_is_scored_before_the_next_begins_and_leaves_no_activations(new_project, capsys, monkeypatch):
    monkeypatch.setenv("MASKSAE_PROGRESS", "lines")
    run, order = Run(profile(new_project, keep_pairs=True)), []
    monkeypatch.setitem(work.SCORES, "training", lambda part: order.append((part.name, list(part.load_saes()))) or [])
    work.work_off(run, ("training", "reconstruction"))
    assert [name for name, _ in order] == ["main-s0", "main-s1", "matryoshka-s0"]
    assert [saes for _, saes in order][0] == ["unmasked-plain-s0", "masked-plain-s0"]
    for part in run.parts:
        [name, *_], kept = part.names, read_json(run.results / "pairs" / f"{part.name}.json")["scores"]
        assert kept["reconstruction"][name]["rows"][0]["ev_centred"] > 0
    assert not list((new_project / "cache").rglob("pool-*"))
    taken = times.times(run.build)
    assert set(taken["stages"]) == {part.name for part in run.parts}
    told = capsys.readouterr().err
    assert "part 3 of 3, matryoshka-s0: 2 SAEs" in told and "about 0:00:00 left" in told
    work.work_off(run, ("training", "reconstruction"))
    assert times.times(run.build) == taken and "main-s0 is there (it was); about ? left" in capsys.readouterr().err


def gated(folder, **changes):
    variants = [
        {"name": "as_it_is", "changes": {}},
        {
            "name": "larger_batch",
            "changes": {"training": {"batch_size": 320}, "blocks": [{"saes": ["plain"], "pairs": [1]}]},
        },
    ]
    blocks = [{"arms": ["unmasked"], "saes": ["plain"], "pairs": [0]}]
    return Run(profile(folder, blocks=blocks, variants=variants, keep_pairs=True, **changes))


def test_the_gate_has_a_row_for_each_sae_of_each_variant(project, monkeypatch):
    monkeypatch.setattr(gate, "TAKEN", ("training", "reconstruction"))  # a random model does not spell
    run = gated(project, arms=[{"name": "unmasked", "p": 0.0}])
    rows = gate.gate_rows(run)
    assert rows == read_json(run.results / "gate.json")
    assert [(r["variant"], r["batch"], r["grid"], r["seed"]) for r in rows] == [
        ("as_it_is", 256, "plain", 0),
        ("larger_batch", 320, "plain", 1),
    ]
    assert all(row["minutes"] > 0 for row in rows)
    assert rows[0]["steps"] > rows[1]["steps"] and all(r["ev_centred"] > 0 and r["dead_in_training"] >= 0 for r in rows)
    assert (run.results / "variants/larger_batch/pairs/main-s1.json").is_file()
    monkeypatch.setenv("MASKSAE_CACHE", str(project / "elsewhere"))  # the rows are kept where the results are
    monkeypatch.setattr("masksae.study.run.train", lambda *_, **__: pytest.fail("trained again"))
    again = gate.gate_rows(gated(project, arms=[{"name": "unmasked", "p": 0.0}]))
    timed = {"minutes": 0.0}
    assert [row | timed for row in again] == [row | timed for row in rows]


ROW = {
    "block": 4,
    "batch": 512,
    "steps": 9,
    "main_f1": 0.5,
    "context_main_f1": 0.6,
    "dense_absorbers": 0.1,
    "dead_in_training": 20,
    "latents": 1000,
}


def test_a_row_on_its_bounds_passes_and_one_beyond_says_which():
    assert report.failed(ROW, Gate()) == []
    assert report.failed(ROW | {"dense_absorbers": None}, Gate()) == []
    for key, value, told in [
        ("main_f1", 0.49, "main F1 of letters 0.49"),
        ("context_main_f1", 0.59, "main F1 of contexts 0.59"),
        ("dense_absorbers", 0.11, "dense 0.11"),
        ("dead_in_training", 21, "dead 21"),
    ]:
        assert report.failed(ROW | {key: value}, Gate()) == [told]


def test_what_passes_is_listed_by_the_f1_of_letters_and_then_by_minutes():
    names = ("slow", "fast", "best", "fails", "other_k")
    variants = [{"name": name, "changes": {}} for name in names] + [
        {"name": "aside", "changes": {}, "candidate": False}
    ]
    chosen = Profile(**load_profile("gate").model_dump() | {"variants": variants})
    row = ROW | {"k": 20, "seed": 10, "grid": "topk20"}
    rows = [
        row | {"variant": "slow", "minutes": 3.0},
        row | {"variant": "fast", "minutes": 2.0},
        row | {"variant": "best", "main_f1": 0.7, "minutes": 9.0},
        row | {"variant": "fails", "main_f1": 0.4, "minutes": 1.0},
        row | {"variant": "other_k", "k": 40, "main_f1": 0.9, "minutes": 1.0},
        row | {"variant": "aside", "main_f1": 0.9, "minutes": 1.0},
    ]
    told = report.choice(chosen, rows)
    assert [line.split()[1] for line in told.splitlines()[2:]] == ["best,", "fast,", "slow,"]
    assert "Two seeds" not in told and "no row passes" in report.choice(chosen, rows[3:])
    again = row | {"variant": "best", "seed": 11, "main_f1": 0.58, "minutes": 2.0}
    assert "up to 0.20 apart" in report.choice(
        chosen, [row | {"variant": "best", "main_f1": 0.78, "minutes": 1.0}, again]
    )


def test_a_gate_is_for_unmasked_saes_of_some_variants(project):
    with pytest.raises(ConfigError, match="unmasked SAEs alone"):
        gate.gate_rows(Run(profile(project, variants=[{"name": "a", "changes": {}}])))
    with pytest.raises(ConfigError, match="tiny has no variants"):
        gate.gate_rows(Run(profile(project)))


def test_the_k_at_which_an_arm_has_the_wanted_clean_l0(project):
    run = Run(profile(project, decisions={"cells": ["matryoshka"]}))  # which the pilot's profile cannot name
    found = search.k_for_clean_l0(run, "masked", "matryoshka", pilot=9, within=0.02)
    k, reached = found["trials"][-1].values()
    assert abs(reached / 4 - 1) <= 0.02 and k != 4 and found["trials"][0]["at"] == 4
    grids = [run.profile.saes[1].model_dump(mode="json") | {"selection": {"rule": "batch_topk", "k": k}}]
    chosen = search._score(run, {"saes": grids}, "masked", "matryoshka", 9)
    assert chosen.l0 == reached
    with pytest.raises(ConfigError, match="keeps k latents of every token"):
        grids = [{"name": "topk", "selection": {"rule": "topk", "k": 3}, "n_latents": 32}]
        search.k_for_clean_l0(Run(profile(project, "topk", saes=grids, blocks=[{}])), "masked", "topk", pilot=9)


def test_the_noise_that_costs_as_much_as_masking(project):
    arms = [{"name": "unmasked", "p": 0.0}, {"name": "masked", "p": 0.3}, {"name": "noise", "p": 0.0, "noise": 0.5}]
    run = Run(profile(project, arms=arms))
    found = search.noise_for_ev(run, "noise", "masked", "plain", pilot=9, within=0.2)
    unmasked, masked = (search._score(run, {}, arm, "plain", 9).ev_centred for arm in ("unmasked", "masked"))
    assert found["wanted"] == pytest.approx(unmasked - masked) and found["wanted"] > 0
    assert found["trials"][-1]["measured"] == pytest.approx(found["wanted"], rel=0.2)


def test_a_search_that_gets_nowhere_says_what_it_tried():
    with pytest.raises(DataError, match=r"No value measures 5 within 1.0%: tried \[.*1.0.*Start nearer"):
        search.secant(lambda x: 3.0, wanted=5, start=1.0, second=2.0, within=0.01)
    for measure, wanted in (lambda x: x - 1.5, 5), (lambda x: x, -5):  # of which there is no logarithm
        with pytest.raises(DataError, match="Start nearer"):
            search.secant(measure, wanted=wanted, start=1.0, second=2.0, within=0.01)


@pytest.mark.parametrize("rule", ["relu", "gated"])
def test_the_rest_of_a_rule_stays_while_its_l0_is_searched_for(new_project, monkeypatch, rule):
    grids = [{"name": "a", "selection": {"rule": rule, "l1": 1.5, "target_l0": 3}, "n_latents": 32}]
    tried = []

    def train(run, group):
        tried.append(group.members[0].grid.selection.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_group", train)
    with pytest.raises(KeyboardInterrupt):
        search.k_for_clean_l0(Run(profile(new_project, saes=grids, blocks=[{}])), "masked", "a", pilot=9)
    assert (tried[0].l1, tried[0].target_l0) == (1.5, 3)
