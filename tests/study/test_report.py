"""Verdicts on planted effects, what they rest on, tables and pictures."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from masksae import load_profile
from masksae.errors import DataError
from masksae.files import write_json, write_text
from masksae.study.figures import absorption, data, probing, reconstruction, style
from masksae.study.figures import cells as figures_of_cells
from masksae.study.figures import claims as figures_of_claims
from masksae.study.report import claims, effects, labels, noise, preregistration, reliability, results, tables
from masksae.study.sections import Decisions, Endpoint
from masksae.study.stats import Effect, paired_effect

ROOT = Path(__file__).resolve().parents[2]
LATENTS = {"matryoshka20": 1000, "batchtopk20": 1000, "one": 1000}


def planted(effect=-0.1, grids=("matryoshka20", "batchtopk20"), seeds=(0, 1, 2)):
    """Result rows in which masking changes absorption by `effect` (of the first grid only, 0 elsewhere) and EV by
    -.05."""
    rng = np.random.default_rng(0)
    reconstruction, absorption = [], []
    for grid in grids:
        for seed in seeds:
            base = (0.15 if grid == grids[0] else 0.4) + 0.02 * seed
            for arm, p in (("unmasked", 0.0), ("kept", 0.3)):
                moved = (effect if grid == grids[0] else 0.0) * (p > 0) + 0.002 * rng.normal()
                for mode in ("as_trained", "matched"):
                    key = {"sae": f"{arm}-{grid}-s{seed}", "arm": arm, "p": p, "grid": grid, "k": 20, "seed": seed}
                    key |= {"mode": mode, "architecture": "BatchTopK"}
                    l0 = 20 if mode == "matched" or not p else 27
                    ev = 0.88 - 0.05 * (p > 0) + 0.001 * rng.normal()
                    more = {"l0": l0, "ev_centred": ev, "ce_score": 0.97, "dead_latents": 3, "dead_in_training": 2}
                    reconstruction.append(key | more)
                    mean = base + moved + 0.3 * (mode == "matched")
                    letters = [{"letter": c, "full": mean + by} for c, by in (("a", 0.0), ("b", -0.1), ("c", 0.1))]
                    more = {
                        "mean_full": mean,
                        "mean_fraction": 0.1,
                        "mean_split_latents": 1.0,
                        "main_f1": 0.55,
                        "context_main_f1": 0.7,
                        "dense_absorbers": None if seed == 0 else 0.05 + 0.01 * seed * (p > 0),
                    }
                    absorption.append(key | more | {"letters": letters, "excluded": ["x"]})
    return reconstruction, absorption


def judged(*results, arm="kept", mode="matched", latents=LATENTS, **decisions):
    """Claims of planted rows by the decisions that a profile has which states none."""
    scores, decisions = effects.merge(*results, mode=mode), Decisions(**decisions)
    return claims.claims(scores, decisions, arm, claims.gate(scores, decisions, latents))


def test_planted_effects_give_the_right_verdicts():
    verdicts = judged(*planted(-0.1))
    assert list(verdicts) == ["C1", "C2", "C3", "C4", "C5", "R"]
    assert verdicts["C1"]["verdict"] == "supported" and verdicts["C1"]["difference"] == pytest.approx(-0.1, abs=0.01)
    assert verdicts["C1"]["dense_absorbers"] == pytest.approx({"unmasked": 0.05, "kept": 0.065})  # of those with any
    assert verdicts["C2"]["verdict"] == verdicts["C3"]["verdict"] == verdicts["R"]["verdict"] == "not measured"
    assert judged(*planted(+0.1))["C1"]["verdict"] == "contradicted"
    assert judged(*planted(0.0))["C1"]["verdict"] == "equivalent"
    assert judged(*planted(grids=("one",)))["C4"]["verdict"] == "not measured"
    one = judged(*planted(seeds=(0,)))["C1"]
    assert one["verdict"] == "inconclusive" and one["p_holm"] is None and one["detectable"] is None


def test_other_cells_are_asked_without_the_first():
    found = judged(*planted(-0.1))["C4"]
    assert found["grids"] == {"batchtopk20": {"C1 letters": "equivalent"}} and found["verdict"] == "equivalent"
    assert found["cells"]["batchtopk20"]["letters"]["p_holm"] == found["cells"]["batchtopk20"]["letters"]["p_value"]
    more = planted(-0.1, grids=("matryoshka20", "batchtopk20", "one"))
    found = judged(*more)["C4"]["cells"]  # corrected over its two cells
    p_values = {grid: cell["letters"]["p_value"] for grid, cell in found.items()}
    assert {grid: cell["letters"]["p_holm"] for grid, cell in found.items()} == pytest.approx(
        {grid: min(1.0, (2 if p == min(p_values.values()) else 1) * p) for grid, p in p_values.items()}
        | {
            grid: max(min(1.0, 2 * min(p_values.values())), p)
            for grid, p in p_values.items()
            if p > min(p_values.values())
        }
    )
    assert list(judged(*more, cells=["one"])["C4"]["grids"]) == ["one"]
    assert judged(*more)["C4"]["reason"] == "Cells: 2 equivalent; of 3 pairs."
    skipped = judged(*more, cells=["one", "two"])["C4"]
    assert skipped["grids"]["two"] == {"C1 letters": "not measured"} and skipped["reason"].endswith(
        "Cells: 1 equivalent; of 3 pairs. Not run: two."
    )


def test_a_fall_is_slight_only_within_its_bound():
    """EV falls by .05, which is more than .02."""
    found = judged(*planted())["C5"]
    assert found["verdict"] == "contradicted" and found["difference"] == pytest.approx(-0.05, abs=0.01)
    assert (
        found["size_in_words"].startswith("explained variance falls by 0.0") and "unexplained" in found["size_in_words"]
    )
    bound = lambda value: [
        Endpoint(name="ev", claim="C5", score="ev_centred", direction=-1, margin=0.005, items="fixed", slight=value)
    ]
    assert claims.spoken(found) == "outside our bound"  # a bound of ours, and no word on the paper's
    assert judged(*planted(), endpoints=bound(0.1))["C5"]["verdict"] == "supported"
    assert judged(*planted(), endpoints=bound(-found["difference"]))["C5"]["verdict"] == "inconclusive"
    rising = [row | {"ev_centred": row["ev_centred"] + 0.1 * (row["p"] > 0)} for row in planted()[0]]
    assert judged(rising, planted()[1])["C5"]["verdict"] == "contradicted"


def test_where_the_instrument_fails_nothing_is_decided():
    reconstruction, absorption = planted(-0.1)
    blunt = [row | {"main_f1": 0.31} for row in absorption]
    found = judged(reconstruction, blunt)
    assert found["C1"]["verdict"] == "not measurable" and "first letters 0.310, bound 0.5" in found["C1"]["reason"]
    assert found["C1"]["difference"] < 0 and "p_holm" not in found["C1"]  # the number is shown, and not decided on
    assert found["C4"]["verdict"] == "not measurable" and found["C5"]["verdict"] == "contradicted"
    dense = [row | {"dense_absorbers": 0.5} for row in absorption]
    assert "dense latents 0.500, bound 0.1" in judged(reconstruction, dense)["C1"]["reason"]
    unknown = [{key: value for key, value in row.items() if key != "context_main_f1"} for row in absorption]
    assert "contexts not measured" in judged(reconstruction, unknown)["C1"]["reason"]
    masked_only = [row | {"main_f1": 0.1 if row["p"] else 0.55} for row in absorption]
    assert judged(reconstruction, masked_only)["C1"]["verdict"] == "supported"  # the gate asks unmasked SAEs alone


def test_dead_latents_of_either_arm_stop_every_comparison():
    reconstruction, absorption = planted(-0.1)
    dying = [row | {"dead_in_training": 60 if row["p"] else 2} for row in reconstruction]
    found = judged(dying, absorption)
    assert found["C5"]["verdict"] == found["C1"]["verdict"] == "not measurable"
    assert (
        "latents of kept, matryoshka20, that are dead at the end of training is 0.060, bound 0.05"
        in found["C5"]["reason"]
    )
    unknown = [row | {"dead_in_training": None} for row in reconstruction]
    assert "not measured" in judged(unknown, absorption)["C5"]["reason"]
    scores = effects.merge(dying, absorption)
    rows = claims.gate_table(claims.gate(scores, Decisions(), LATENTS))
    assert [(row["SAEs"], row["gate"]) for row in rows] == [("matryoshka20", "passed"), ("batchtopk20", "passed")]
    assert rows[0]["the same of each arm, bound 0.05"] == "unmasked 0.002, kept 0.060"
    assert rows[0]["F1 of main latents, first letters, bound 0.5"] == "0.550"


def test_holm_is_inside_the_verdict():
    """A p-value of .03 decides alone and does not among six."""
    reconstruction, absorption = planted(0.0)
    by_seed = {0: -0.02, 1: -0.035, 2: -0.03}
    for row in absorption:
        moved = by_seed[row["seed"]] * (row["p"] > 0) + 0.15
        row |= {"mean_full": moved, "letters": [{"letter": "a", "full": moved}]}
    alone = [Endpoint(name="letters", claim="C1", score="mean_full", direction=-1, margin=0.001, items="fixed")]
    twins = [alone[0].model_copy(update={"name": f"letters {n}"}) for n in range(3)]
    assert judged(reconstruction, absorption, endpoints=alone)["C1"]["verdict"] == "supported"
    found = judged(reconstruction, absorption, endpoints=twins)["C1"]
    assert (
        found["verdict"] == "inconclusive"
        and found["p_holm"] == pytest.approx(3 * found["p_value"])
        and found["p_value"] < 0.05
    )
    assert (
        found["detectable"]
        > effects.effect(effects.merge(reconstruction, absorption), "mean_full", "matryoshka20", "kept").detectable
    )
    assert found["pairs_needed"] > 3 and [name for name in found["endpoints"]] == ["letters 1", "letters 2"]
    secondary = [alone[0], *(twin.model_copy(update={"primary": False}) for twin in twins)]
    found = judged(reconstruction, absorption, endpoints=secondary)["C1"]
    assert found["verdict"] == "supported" and found["endpoints"]["letters 0"]["verdict"] == "inconclusive"


def test_rows_of_verdicts_for_a_reader():
    rows = claims.verdict_table(judged(*planted(-0.1)))
    assert [row["claim"] for row in rows[:5]] == ["C1"] * 5 and rows[0]["endpoint"] == "letters"
    assert rows[0]["pairs × items"] == "3" and rows[0]["clean L0"] == "20.0 → 20.0"
    assert [row["SAEs"] for row in claims.cell_table(judged(*planted(-0.1)))] == ["batchtopk20"]
    assert next(row["why"] for row in rows if row["claim"] == "C4") == "Cells: 1 equivalent; of 3 pairs."
    assert all(row["why"] for row in rows if row["verdict"] == "not measured")


def test_c4_in_one_row_and_one_point_for_each_grid():
    """A fall of .1 in the first grid; the other one loses its latents and is hollow."""
    import matplotlib

    matplotlib.use("agg")
    reconstruction, absorption = planted(-0.1)
    lost = [row | {"main_f1": 0.1} if row["grid"] == "batchtopk20" else row for row in absorption]
    found = judged(reconstruction, lost)
    [row] = claims.grid_table(found)
    effect = claims.cell_table(found)[0]["unmasked → treated"]
    assert row["SAEs"] == "batchtopk20" and row["pairs"] == 3 and row["clean L0"] == "20.0 → 20.0"
    assert row["letters"] == f"**not measurable** {effect}" and "do not pass the gate" in row["why"]
    assert claims.grid_table(judged(*planted(grids=("one",)))) == []
    figure = figures_of_claims.draw_everywhere(found, {"matryoshka20": "Matryoshka", "batchtopk20": "BatchTopK"})
    [axis] = figure.axes
    (first, *_), (second, *_) = axis.containers
    assert first.get_ydata()[0] == found["C1"]["difference"] and first.get_markerfacecolor() != "none"
    assert second.get_ydata()[0] == found["C4"]["cells"]["batchtopk20"]["letters"]["difference"]
    assert second.get_markerfacecolor() == "none" and axis.get_title() == "absorption, first letters"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["Matryoshka", "BatchTopK"]
    low, high = axis.get_ylim()
    assert low < found["C1"]["low"] and found["C1"]["high"] < high
    matplotlib.pyplot.close(figure)


def test_a_point_for_each_share_of_masked_tokens_and_a_line_for_each_whole_pair():
    import matplotlib

    matplotlib.use("agg")
    twice = [
        rows + [row | {"sae": f"p50-{row['sae']}", "arm": "p50", "p": 0.5} for row in rows if row["p"] and row["seed"]]
        for rows in planted(-0.1)
    ]
    scores = effects.merge(*twice)
    figure = figures_of_cells.draw_shares(scores, {"kept": 0.3, "p50": 0.5}, "matryoshka20")
    axis = next(axis for axis in figure.axes if axis.get_title() == figures_of_cells.PANELS["mean_full"])
    points = [container[0].get_xydata()[0] for container in axis.containers]
    found = [effects.effect(scores, "mean_full", "matryoshka20", arm) for arm in ("kept", "p50")]
    np.testing.assert_allclose(points, [(0.3, found[0].difference), (0.5, found[1].difference)])
    ends = [container[2][0].get_segments()[0][:, 1] for container in axis.containers]
    np.testing.assert_allclose(ends, [(one.low, one.high) for one in found])
    assert sum(len(line.get_xdata()) == 3 for line in axis.lines) == 2  # of seed 0 there is no p50
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert labels == ["kept, 3 pairs", "p50, 2 pairs"]
    matplotlib.pyplot.close(figure)


def test_what_is_real_and_too_small_to_matter_says_so():
    found = judged(*planted(-0.015))
    told = next(row for row in claims.verdict_table(found) if row["endpoint"] == "letters")
    assert found["C1"]["verdict"] == "supported" and found["C1"]["within_margin"]
    assert told["verdict"] == "supported, within the margin"
    assert not judged(*planted(-0.1))["C1"]["within_margin"]


def test_rivals_are_no_cells_of_c4():
    """Nor points of an interpolation over k."""
    scores = effects.merge(*planted(-0.1, grids=("matryoshka20", "batchtopk20", "one")))
    rival = lambda arm, grid: ("unmasked", "matryoshka20") if (arm, grid) == ("unmasked", "one") else None
    assert effects.standing(scores, rival) == ["matryoshka20", "batchtopk20"]
    found = claims.claims(scores, Decisions(), "kept", claims.gate(scores, Decisions(), LATENTS), rival)
    assert list(found["C4"]["cells"]) == ["batchtopk20"]
    named = claims.claims(scores, Decisions(cells=["lost"]), "kept", claims.gate(scores, Decisions(), LATENTS))["C4"]
    assert named["verdict"] == "not measured" and "unmasked SAEs of lost" in named["cells"]["lost"]["letters"]["reason"]


def probed(kind, change):
    """Rows of probing or ood: AUC .8 unmasked, `change` added by masking; raw probes at .9."""
    rng = np.random.default_rng(1)
    rows = []
    for row in planted()[0]:
        auc = 0.8 + change * (row["p"] > 0) + 0.001 * rng.normal()
        keys = {key: row[key] for key in ("sae", "arm", "p", "grid", "k", "seed", "mode", "architecture")}
        means = {f"{kind}_raw_auc": 0.9, f"{kind}_auc_5": auc, f"{kind}_gap_5": 0.9 - auc}
        task = [
            {"task": "a_task", "family": kind, "raw_auc": 1.0, "auc": {"5": auc + 0.1}},
            {"task": "b", "family": kind, "raw_auc": 0.8, "auc": {"5": auc - 0.1}},
        ]
        rows.append(keys | means | {"tasks": task, "excluded": {}})
    return rows


@pytest.mark.parametrize("change, verdict", [(0.05, "supported"), (-0.05, "contradicted"), (0.0, "equivalent")])
def test_probing_and_its_gap_are_judged_in_their_own_direction(change, verdict):
    results = (*planted(), probed("probing", change), probed("ood", change))
    verdicts = judged(*results)
    assert verdicts["C2"]["verdict"] == verdicts["C3"]["verdict"] == verdict
    assert verdicts["C2"]["difference"] == pytest.approx(change, abs=0.005) == -verdicts["C3"]["difference"]
    assert verdicts["C2"]["score"] == "probing_auc_5" and verdicts["C2"]["items"] == 2
    assert set(verdicts["C4"]["grids"]["batchtopk20"]) == {"C1 letters", "C2 probing", "C3 gap"}
    assert {"probing, AUC", "gap under a shift, AUC"} < set(effects.comparison(*results).columns)


def test_pairs_without_a_partner_are_refused():
    reconstruction, absorption = planted()
    without = lambda rows, arm: [row for row in rows if not (row["arm"] == arm and row["seed"] == 2)]
    few = effects.merge(without(reconstruction, "kept"), without(absorption, "kept"))
    assert effects.effect(few, "mean_full", "matryoshka20", "kept").pairs == 2  # the baseline may have more
    few = effects.merge(without(reconstruction, "unmasked"), without(absorption, "unmasked"))
    with pytest.raises(DataError, match=r"\[0, 1, 2\].* has \[0, 1\]: \[2\] have no partner"):
        effects.effect(few, "mean_full", "matryoshka20", "kept")
    twice = effects.merge(*planted()).replace({"seed": {2: 1}})
    with pytest.raises(DataError, match=r"pairs \[1\] stand twice. SAEs that share a draw are one pair"):
        effects.effect(twice, "mean_full", "matryoshka20", "kept")
    with pytest.raises(DataError, match="No SAEs of arm kept and grid topk20"):
        effects.effect(few, "mean_full", "topk20", "kept", ("unmasked", "matryoshka20"))


def test_any_cell_is_compared_with_any_other():
    """A rival against the unmasked SAEs of another grid, with fewer pairs."""
    scores = effects.merge(*planted())
    rival = scores[~((scores["grid"] == "batchtopk20") & (scores["seed"] == 0))]
    found = effects.effect(rival, "mean_full", "batchtopk20", "unmasked", ("unmasked", "matryoshka20"))
    assert found.pairs == 2 and found.difference == pytest.approx(0.25, abs=0.01)


def test_comparison_table():
    table = effects.comparison(*planted())
    assert (
        table["SAEs"].tolist() == ["kept, matryoshka20"] * 2 + ["kept, batchtopk20"] * 2 and (table["pairs"] == 3).all()
    )
    assert table["compared"].tolist() == ["as trained", "threshold moved to L0 = k"] * 2
    assert "→" in table["absorption"][0] and "95 %" in table["absorption"][0] and "−0.1" in table["absorption"][0]
    assert table["L0"][0].startswith("20.0 → 27.0") and table["L0"][1].startswith("20.0 → 20.0")
    lines = tables.to_markdown(tables.cells(table)).splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1


def test_the_published_matching_stands_first():
    """As trained; then SAEs of another k against the first grid's; then the moved threshold. TopK has one row."""
    reconstruction, absorption = planted(grids=("matryoshka20", "one", "topk"))
    named = lambda rows: [
        row
        | ({"k": 14} if row["grid"] == "one" else {})
        | ({"l0": 20} if row["grid"] == "topk" and "l0" in row else {})
        for row in rows
        if row["grid"] != "one" or row["arm"] == "kept"
    ]
    against = lambda arm, grid: ("unmasked", {"one": "matryoshka20"}.get(grid, grid)) if arm == "kept" else None
    table = effects.comparison(named(reconstruction), named(absorption), baseline=against)
    assert list(zip(table["SAEs"], table["compared"])) == [
        ("kept, matryoshka20", "as trained"),
        ("kept, one", "trained to the clean L0"),
        ("kept, matryoshka20", "threshold moved to L0 = k"),
        ("kept, topk", "as trained; no threshold to move"),
    ]
    assert table["against"][1] == "unmasked, matryoshka20"
    assert len(effects.comparison(named(reconstruction), named(absorption))) == 3  # without a word on it: no partner


def ablated():
    """Rows of TPP at two numbers of latents; no pair has room for SCR."""
    rng = np.random.default_rng(2)
    keys = ("sae", "arm", "p", "grid", "k", "seed", "mode", "architecture")
    scores = ("tpp", "tpp_intended", "tpp_unintended")
    return [
        {key: row[key] for key in keys}
        | {f"{score}_{n}": 0.01 * n + 0.01 * rng.normal() for score in scores for n in (2, 20)}
        for row in planted()[0]
    ]


def noisy(seeds=3):
    """Rows of a noise study: seeds move absorption by .1, draws by .02, splits not at all; masking adds .05."""
    return [
        {"arm": arm, "seed": seed, "draw": draw, "split": split, "mean_full": 0.2 + 0.1 * seed + 0.02 * draw + 0.05 * p}
        for p, arm in enumerate(("unmasked", "kept"))
        for seed in range(seeds)
        for draw in range(2)
        for split in range(2)
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_noise_table(seeds):
    rows = {(row["of"], row["source"]): row for row in noise.noise_table(noisy(seeds))}
    assert rows["unmasked", "draw"]["sd"] == pytest.approx(0.02 / 2**0.5)
    assert ("unmasked", "seed") in rows or seeds == 1
    if seeds > 1:
        assert rows["unmasked", "seed"]["sd"] == pytest.approx(0.1) and rows["unmasked", "seed"]["share"] > 0.9
    difference = rows["kept less unmasked", "draw"]
    assert difference["mean"] == pytest.approx(0.05) and difference["sd"] == pytest.approx(0, abs=1e-9)


def test_letters_are_fixed_and_contexts_a_sample():
    reconstruction, absorption = planted(-0.1)
    for row in absorption:
        row["context_full"], row["parents"] = row["mean_full"], row["letters"]
    scores = effects.merge(reconstruction, absorption)
    letters, contexts = (effects.effect(scores, s, "matryoshka20", "kept") for s in ("mean_full", "context_full"))
    assert letters.items is None and contexts.items == 3 and contexts.difference == pytest.approx(letters.difference)
    for row in absorption:
        if row["arm"] == "kept" and row["grid"] == "matryoshka20":
            row["parents"] = [item | {"full": item["full"] + 0.3 * (item["letter"] == "a")} for item in row["parents"]]
    found = effects.effect(effects.merge(reconstruction, absorption), "context_full", "matryoshka20", "kept")
    assert found.low < 0 < found.high and found.verdict(-1) == "inconclusive"  # another parent could turn it around
    for row in absorption:
        if row["seed"] == 1 and row["arm"] == "kept":
            row["parents"] = row["parents"][:2]
    with pytest.raises(DataError, match="NaN"):
        effects.effect(effects.merge(reconstruction, absorption), "context_full", "matryoshka20", "kept")


def test_robustness_is_over_texts():
    score = "robustness_random_near_jaccard"
    rows = []
    for row in planted()[0]:
        mean = 0.6 + 0.1 * (row["p"] > 0)
        keys = {key: row[key] for key in ("sae", "arm", "p", "grid", "k", "seed", "mode", "architecture")}
        rows.append(keys | {score: mean, "texts": {score: [mean - 0.01, mean, mean + 0.01]}})
    found = judged(*planted(), rows)["R"]
    assert found["verdict"] == "supported" and found["items"] == 3 and found["difference"] == pytest.approx(0.1)


def test_verdicts_carry_size_and_what_was_detectable():
    assert judged(*planted(-0.1))["C1"]["size"] < -1
    assert "detectable" in effects.describe(paired_effect([1.0, 2.0], [1.1, 1.9]))
    assert "detectable" not in effects.describe(paired_effect([1.0, 2.0], [2.0, 3.001]))
    old = paired_effect([1.0, 2.0], [1.1, 1.9]).to_dict() | {"items_low": 0.0, "verdict": "inconclusive"}
    assert Effect.from_dict(old).detectable == old["detectable"]  # rows of earlier versions hold other keys


def test_the_preregistration_is_the_profiles():
    """`python tools/pages.py` writes it."""
    profiles = [load_profile(name) for name in preregistration.PROFILES]
    page = (ROOT / preregistration.PAGE).read_text()
    assert page == preregistration.page(profiles)
    for profile in profiles:
        assert preregistration.status(profile).startswith("Decided as written down beforehand")
        assert all(f"| {e.name}" in page for e in profile.decisions.endpoints)


def test_what_differs_from_the_preregistration_is_exploratory(tmp_path, monkeypatch):
    profile = load_profile("laptop")
    page = preregistration.page([profile])
    write_text(tmp_path / preregistration.PAGE, page)
    monkeypatch.chdir(tmp_path)
    looser = profile.decisions.model_copy(update={"alpha": 0.1})
    changed = profile.model_copy(update={"decisions": looser})
    told = preregistration.status(changed)
    assert told.startswith("Exploratory") and "-Alpha 0.05" in told and "+Alpha 0.1" in told
    assert (
        preregistration.digest(changed) != preregistration.digest(profile) and preregistration.digest(profile) in page
    )
    write_text(tmp_path / preregistration.PAGE, page.replace("The bound of C5", "What is told afterwards"))
    assert preregistration.status(profile).startswith("Decided")
    write_text(tmp_path / preregistration.PAGE, page.replace("Inconclusive", "Perhaps"))
    assert preregistration.status(profile).startswith("Exploratory")
    (tmp_path / preregistration.PAGE).unlink()
    assert "holds nothing" in preregistration.status(profile)
    renamed = profile.model_copy(update={"description": "other words"})
    assert preregistration.digest(renamed) == preregistration.digest(profile)  # which decide nothing


def test_an_endpoint_that_is_not_measured_keeps_its_name():
    found = judged(*planted())
    row = found["C1"]["endpoints"]["contexts specific"]
    assert (row["verdict"], row["endpoint"], row["primary"]) == ("not measured", "contexts specific", False)
    assert found["C2"]["endpoint"] == "probing" and labels.words(found["C2"]["score"]) == "probing, k latents"
    told = [(row["claim"], row["endpoint"]) for row in claims.verdict_table(found)]
    assert ("C1", "contexts specific (secondary)") in told and ("C2", "probing") in told


def test_an_interval_covers_one_minus_alpha_wherever_a_verdict_is_told():
    wide, narrow = (judged(*planted(-0.1), alpha=alpha)["C5"] for alpha in (0.05, 0.2))
    assert narrow["high"] - narrow["low"] < 0.8 * (wide["high"] - wide["low"])
    assert "(95 % " in wide["size_in_words"] and "(80 % " in narrow["size_in_words"]
    assert narrow["high"] - narrow["difference"] == pytest.approx(1.8856 * narrow["error"], rel=1e-4)  # t of 2 degrees
    table = claims.verdict_table(judged(*planted(-0.1), alpha=0.2))
    assert "80 %" in table[0]["unmasked → treated"] and "95 %" not in str(table)
    assert "80 %" in effects.change(paired_effect([1.0, 2.0], [1.1, 1.9]).at(0.2))


def test_the_size_of_a_change_names_its_score():
    letters = Endpoint(name="l", claim="C1", score="mean_full", direction=-1, margin=0.01, items="fixed", slight=0.2)
    found = judged(*planted(-0.1), endpoints=[letters])["C1"]
    assert (
        found["size_in_words"].startswith("absorption, first letters falls by 0.") and found["verdict"] == "supported"
    )
    assert "variance" not in found["size_in_words"]


def test_what_it_takes_to_settle_an_endpoint(tmp_path):
    def told(seeds, **decisions):
        write_json(tmp_path / "results/x/claims.json", judged(*planted(0.0, seeds=seeds), **decisions))
        return results.larger(tmp_path, "x")

    exact = Endpoint(name="a", claim="C1", score="mean_full", direction=-1, margin=1e-9, items="fixed")
    assert "* C1, a: one pair gives no interval" in told((0,), endpoints=[exact]) and "thousand" not in told((0,))
    assert "minimum detectable effect here is 0.0" in told((0, 1, 2), endpoints=[exact])
    row = {"claim": "C1", "endpoint": "a", "SAEs": "g", "pairs needed": None, "MDE": "nothing"}
    assert "larger than any difference that there can be" in results._needed(row)


def test_reliability_is_of_the_arm_that_decides(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    rows = planted(grids=("topk20",))[0]
    rows += [row | {"arm": "dropped", "ev_centred": 0.5, "sae": row["sae"] + "d"} for row in rows if row["p"]]
    rows.sort(key=lambda row: ("unmasked", "dropped", "kept").index(row["arm"]))
    for name in {labels.score(key).result for key in reliability.SHOWN}:
        write_json(tmp_path / f"results/laptop/{name}.json", rows)
    [row] = reliability.reliability("laptop").query("score == 'explained variance'").to_dict("records")
    assert row["arms differ by"] == pytest.approx(-0.05, abs=0.01)  # kept, and not the arm that stands first


def test_decisions_that_cannot_be():
    from pydantic import ValidationError

    letters = Endpoint(name="letters", claim="C1", score="mean_full", direction=-1, margin=0.03, items="fixed")
    for endpoints, what in (
        ([letters, letters], "names must differ"),
        ([letters.model_copy(update={"slight": 0.01})], "larger than the margin"),
        ([letters.model_dump() | {"score": "mean_ful"}], "score.*found 'mean_ful'.*Did you mean 'mean_full'"),
        ([letters.model_dump() | {"score": "mean_middle"}], "score.*found 'mean_middle', which is no score"),
        ([letters.model_dump() | {"score": "probing_auc_few"}], "found 'probing_auc_few'.*Did you mean 'probing_auc_'"),
    ):
        with pytest.raises(ValidationError, match=f"(?s){what}"):
            Decisions(endpoints=endpoints)


def test_matched_sparsity_by_interpolation_over_k():
    """EV of .1 more for four times the latents; the masked arm has half as many latents again and loses .02 at equal
    L0."""
    rows = []
    for seed in range(3):
        for k in (20, 80):
            for arm, p, l0 in (("unmasked", 0.0, k), ("kept", 0.3, 1.5 * k)):
                key = {"sae": f"{arm}{k}{seed}", "arm": arm, "p": p, "grid": f"g{k}", "k": k, "seed": seed}
                ev = 0.5 + 0.1 * np.log(l0 / 20) / np.log(4) - 0.02 * (p > 0) + 0.001 * seed * (p > 0)
                rows.append(key | {"mode": "as_trained", "architecture": "TopK", "l0": l0, "ev_centred": ev})
    table = effects.interpolated(rows)
    assert table["L0"].tolist() == [40.0] and table["pairs"].tolist() == [3]
    assert table["explained variance"][0].startswith("0.5500 → 0.5310 (−0.0190")
    assert effects.interpolated([row for row in rows if row["k"] == 20]).empty


def history(scale=1, n=5):
    return [{"step": 10 * i, "explained_variance": 0.5 + 0.1 * i, "silent": 10 * i * scale} for i in range(n)]


DRAWINGS = {
    "reconstruction": lambda: reconstruction.draw_reconstruction(planted()[0]),
    "absorption": lambda: absorption.draw_absorption(planted()[1]),
    "letters": lambda: absorption.draw_items(planted()[1], "matryoshka20", "letters"),
    "fronts": lambda: absorption.draw_fronts(effects.merge(*planted()).assign(l0=25.0), effects.merge(*planted())),
    "probing": lambda: probing.draw_probing(probed("probing", 0.05), "probing"),
    "tasks": lambda: probing.draw_tasks(probed("probing", 0.05), "matryoshka20", 5),
    "perturbation": lambda: probing.draw_perturbation(ablated(), "matryoshka20"),
    "noise": lambda: absorption.draw_noise(noise.noise_table(noisy())),
    "architectures": lambda: reconstruction.draw_family(planted()[0]),
    "summary": lambda: absorption.draw_summary(effects.merge(*planted())),
    "training": lambda: reconstruction.draw_training(
        [
            {"sae": f"{arm}-{grid}-s0", "arm": arm, "grid": grid, "history": history(scale)}
            for arm in ("unmasked", "kept")
            for grid, scale in (("a", 1), ("b", 9))
        ]
    ),
    "norms": lambda: data.draw_norms(
        [{"arm": a, "masked": m, "norm": 90.0 + i} for a, m in (("unmasked", False), ("kept", True)) for i in range(5)]
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_figures_are_byte_stable_and_show_both_arms(name, tmp_path):
    import matplotlib

    matplotlib.use("agg")
    style.style()
    for folder in ("a", "b"):
        figure = DRAWINGS[name]()
        run = SimpleNamespace(figures=tmp_path / folder, profile=load_profile("smoke"))
        style.save_figure(run, name, figure, "A caption.")
        matplotlib.pyplot.close(figure)
    for suffix in (".svg", ".png", ".txt"):
        first, second = (tmp_path / folder / f"{name}{suffix}" for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 5
    assert (tmp_path / "a" / f"{name}.txt").read_text().startswith("A caption. Profile smoke: smollm2-135m, ")
    for axis in figure.axes:  # every dot and every line's end is inside its panel
        low, high = sorted(axis.get_ylim())
        dots = [y for part in axis.collections for y in part.get_offsets()[:, 1]]
        ends = [line.get_ydata()[-1] for line in axis.lines if len(line.get_ydata())]
        bars = [bar.get_height() for bar in axis.patches]
        assert all(low <= y <= high for y in [*dots, *ends, *bars]) and dots + ends + bars
    legend = {text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()}
    ticks = {label.get_text() for axis in figure.axes for label in axis.get_xticklabels()}
    named = legend | ticks | {axis.get_title() for axis in figure.axes}
    assert any(text.startswith("unmasked") for text in named) and any(text.startswith("kept") for text in named)
    assert figure.axes[0].get_ylabel() or any("task" in label.get_text() for label in figure.axes[0].get_yticklabels())


def test_long_tables_are_folded():
    short, long = (tables.show([{"sae": i, "l0": 20.0} for i in range(n)]).data for n in (15, 16))
    assert "<details>" not in short and long.startswith("<details><summary>Table of 16 rows: sae, l0</summary>")
    assert long.count("<tr>") + long.count("<tr ") == 17


def test_masked_text_shows_what_is_masked():
    import torch
    from tiny_project import byte_tokenizer

    tokenizer = byte_tokenizer()
    ids = [*tokenizer.convert_tokens_to_ids(["a", "<mask>"]), *tokenizer.convert_tokens_to_ids(["b"])]
    html = data.masked_text_html(tokenizer, torch.tensor(ids), torch.tensor([False, True, False]))
    assert html.count("<span") == 3 and html.count("background") == 1
    assert html.index(">a<") < html.index("background") < html.index("&lt;mask&gt;") < html.index(">b<")
