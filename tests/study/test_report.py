"""Paired statistics against scipy, verdicts on planted effects, tables and pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from masksae import load_profile
from masksae.errors import DataError
from masksae.study.figures import absorption, data, probing, reconstruction, style
from masksae.study.report import claims, effects, noise, tables
from masksae.study.stats import combine, paired_effect


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12))
def test_interval_is_the_paired_t_test(seed, n):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), rng.normal(size=n) + 0.5
    e = paired_effect(a.tolist(), b.tolist())
    expected = scipy_stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (e.low, e.high) == pytest.approx((expected.low, expected.high))
    assert e.difference == pytest.approx((b - a).mean()) and e.pairs == n


def test_intervals_cover_the_truth_and_detectable_differences_are_detected():
    rng = np.random.default_rng(0)
    runs = [paired_effect([0.0] * 5, (rng.normal(size=5)).tolist()) for _ in range(2000)]
    covered = np.mean([e.low <= 0 <= e.high for e in runs])
    assert covered == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 2000) ** 0.5)
    typical = np.median([e.detectable for e in runs])
    found = np.mean([paired_effect([0.0] * 5, (typical + rng.normal(size=5)).tolist()).low > 0 for _ in range(2000)])
    assert 0.7 < found < 0.9


def test_verdicts():
    down, up, wide = [0.10, 0.11, 0.09], [0.30, 0.31, 0.32], [0.0, 0.5, 0.1]
    assert paired_effect(up, down).verdict(-1) == "supported" and paired_effect(up, down).verdict(+1) == "contradicted"
    assert paired_effect(up, wide).verdict(-1) == "inconclusive"
    assert paired_effect([0.3], [0.1]).verdict(-1) == "inconclusive"  # one pair shows nothing
    assert combine(["supported", "supported"]) == "supported" and combine([]) == "inconclusive"
    assert combine(["supported", "inconclusive"]) == "inconclusive"
    assert combine(["supported", "inconclusive", "contradicted"]) == "contradicted"


@pytest.mark.parametrize("a, b", [([1.0], [1.0, 2.0]), ([], []), ([float("nan")], [1.0])])
def test_bad_pairs(a, b):
    with pytest.raises(DataError):
        paired_effect(a, b)


def planted(effect=-0.1, grids=("matryoshka20", "batchtopk20"), seeds=(0, 1, 2)):
    """Result rows in which masking changes absorption by `effect` (of the first grid only, 0 elsewhere) and EV by
    -.05."""
    rng = np.random.default_rng(0)
    reconstruction, absorption = [], []
    for grid in grids:
        for seed in seeds:
            base = (0.15 if grid == grids[0] else 0.4) + 0.02 * seed
            for arm, p in (("unmasked", 0.0), ("masked", 0.3)):
                moved = (effect if grid == grids[0] else 0.0) * (p > 0) + 0.002 * rng.normal()
                for mode in ("as_trained", "matched"):
                    key = {"sae": f"{arm}-{grid}-s{seed}", "arm": arm, "p": p, "grid": grid, "k": 20, "seed": seed}
                    key |= {"mode": mode, "architecture": "BatchTopK"}
                    l0 = 20 if mode == "matched" or not p else 27
                    ev = 0.88 - 0.05 * (p > 0) + 0.001 * rng.normal()
                    more = {"l0": l0, "ev_centred": ev, "ce_score": 0.97, "dead_latents": 3}
                    reconstruction.append(key | more)
                    mean = base + moved + 0.3 * (mode == "matched")
                    letters = [{"letter": c, "full": mean + by} for c, by in (("a", 0.0), ("b", -0.1), ("c", 0.1))]
                    more = {
                        "mean_full": mean,
                        "mean_fraction": 0.1,
                        "mean_split_latents": 1.0,
                    }
                    more |= {"dense_absorbers": None if seed == 0 else 0.5 + 0.1 * seed * (p > 0)}
                    absorption.append(key | more | {"letters": letters, "excluded": ["x"]})
    return reconstruction, absorption


def test_planted_effects_give_the_right_verdicts():
    verdicts = claims.claims(effects.merge(*planted(-0.1)), "masked")
    assert verdicts["C1"]["verdict"] == "supported" and verdicts["C1"]["difference"] == pytest.approx(-0.1, abs=0.01)
    assert verdicts["C1"]["dense_absorbers"] == pytest.approx(
        {"unmasked": 0.5, "masked": 0.65}
    )  # of those that have any
    assert verdicts["C5"]["verdict"] == "supported" and verdicts["C5"]["difference"] == pytest.approx(-0.05, abs=0.01)
    assert (
        verdicts["C4"]["grids"]["batchtopk20"] == {"C1": "inconclusive"} and verdicts["C4"]["verdict"] == "inconclusive"
    )
    assert verdicts["C2"]["verdict"] == verdicts["C3"]["verdict"] == "not measured"
    assert claims.claims(effects.merge(*planted(+0.1)), "masked")["C1"]["verdict"] == "contradicted"
    assert claims.claims(effects.merge(*planted(0.0)), "masked")["C1"]["verdict"] == "inconclusive"
    assert claims.claims(effects.merge(*planted(grids=("one",))), "masked")["C4"]["verdict"] == "not measured"


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


@pytest.mark.parametrize("change, verdict", [(0.05, "supported"), (-0.05, "contradicted"), (0.0, "inconclusive")])
def test_probing_and_its_gap_are_judged_in_their_own_direction(change, verdict):
    table = effects.merge(*planted(), probed("probing", change), probed("ood", change))
    verdicts = claims.claims(table, "masked")
    assert verdicts["C2"]["verdict"] == verdicts["C3"]["verdict"] == verdict
    assert verdicts["C2"]["difference"] == pytest.approx(change, abs=0.005) == -verdicts["C3"]["difference"]
    assert verdicts["C2"]["score"] == "mean AUC of probes on 5 latents"
    assert set(verdicts["C4"]["grids"]["matryoshka20"]) == {"C1", "C2", "C3"}
    assert {"probing, AUC", "gap under a shift, AUC"} < set(effects.comparison(table).columns)


def test_arms_with_other_seeds_are_refused():
    reconstruction, absorption = planted()
    keep = lambda rows: [r for r in rows if not (r["arm"] == "masked" and r["seed"] == 2)]
    with pytest.raises(DataError, match=r"\[0, 1, 2\] against \[0, 1\]"):
        claims.claims(effects.merge(keep(reconstruction), keep(absorption)), "masked")


def test_comparison_table():
    table = effects.comparison(effects.merge(*planted()))
    assert table["SAEs"].tolist() == ["matryoshka20", "batchtopk20"] and (table["pairs"] == 3).all()
    assert "→" in table["absorption"][0] and "95 %" in table["absorption"][0] and "−0.1" in table["absorption"][0]
    lines = tables.to_markdown(tables.cells(table)).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


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
        for p, arm in enumerate(("unmasked", "masked"))
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
    difference = rows["masked less unmasked", "draw"]
    assert difference["mean"] == pytest.approx(0.05) and difference["sd"] == pytest.approx(0, abs=1e-9)


def test_absorption_is_averaged_over_the_noise_study():
    scores = effects.merge(*planted(-0.1))
    rows = [
        {
            "sae": sae,
            "arm": sae.split("-")[0],
            "draw": d,
            "letters": {"a": 0.1 * d, "b": 0.3} | ({"c": 0.9} if d else {}),
        }
        for sae in ("unmasked-matryoshka20-s0", "masked-matryoshka20-s0")
        for d in (0, 1)
    ]
    means = noise.noise_means(rows)
    assert means[0]["letters"] == pytest.approx({"a": 0.05, "b": 0.3, "c": 0.9}) and means[0]["cells"] == 2
    table = noise.averaged(scores, means).set_index("sae")
    assert table.loc["masked-matryoshka20-s0", "mean_full"] == pytest.approx(1.25 / 3)
    assert table.loc["masked-matryoshka20-s0", "mean_full_items"] == means[1]["letters"]
    others = [sae for sae in table.index if not sae.endswith("matryoshka20-s0")]
    assert (table.loc[others, "mean_full"] == scores.set_index("sae").loc[others, "mean_full"]).all()
    assert noise.averaged(scores, []).equals(scores)


def test_items_of_other_letters_widen_a_verdict():
    reconstruction, absorption = planted(-0.1)
    found = effects.effect(effects.merge(reconstruction, absorption), "mean_full", "matryoshka20", "masked")
    assert found.items == 3 and found.items_low < -0.09 and found.verdict(-1) == "supported"
    for row in absorption:
        if row["arm"] == "masked" and row["grid"] == "matryoshka20":
            row["letters"] = [item | {"full": item["full"] + 0.3 * (item["letter"] == "a")} for item in row["letters"]]
    found = effects.effect(effects.merge(reconstruction, absorption), "mean_full", "matryoshka20", "masked")
    assert found.items_high > 0 and found.verdict(-1) == "inconclusive"
    for row in absorption:
        if row["seed"] == 1 and row["arm"] == "masked":
            row["letters"] = row["letters"][:2]
    with pytest.raises(DataError, match="NaN"):
        effects.effect(effects.merge(reconstruction, absorption), "mean_full", "matryoshka20", "masked")


def test_verdicts_carry_size_and_corrected_p_values():
    verdicts = claims.claims(effects.merge(*planted(-0.1)), "masked")
    assert verdicts["C1"]["p_holm"] >= verdicts["C1"]["p_value"] > 0 and verdicts["C1"]["size"] < -1
    assert "detectable" in effects.describe(paired_effect([1.0, 2.0], [1.1, 1.9]))
    assert "detectable" not in effects.describe(paired_effect([1.0, 2.0], [2.0, 3.001]))


def test_matched_sparsity_by_interpolation_over_k():
    """EV of .1 more for four times the latents; the masked arm has half as many latents again and loses .02 at equal
    L0."""
    rows = []
    for seed in range(3):
        for k in (20, 80):
            for arm, p, l0 in (("unmasked", 0.0, k), ("masked", 0.3, 1.5 * k)):
                key = {"sae": f"{arm}{k}{seed}", "arm": arm, "p": p, "grid": f"g{k}", "k": k, "seed": seed}
                ev = 0.5 + 0.1 * np.log(l0 / 20) / np.log(4) - 0.02 * (p > 0) + 0.001 * seed * (p > 0)
                rows.append(key | {"mode": "as_trained", "architecture": "TopK", "l0": l0, "ev_centred": ev})
    table = effects.interpolated(rows)
    assert table["L0"].tolist() == [40.0] and table["pairs"].tolist() == [3]
    assert table["explained variance"][0].startswith("0.550 → 0.531 (−0.019")
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
        {f"{arm}-{g}": (arm, g, history(scale)) for arm in ("unmasked", "masked") for g, scale in (("a", 1), ("b", 9))}
    ),
    "norms": lambda: data.draw_norms(
        [
            {"arm": a, "masked": m, "norm": 90.0 + i}
            for a, m in (("unmasked", False), ("masked", True))
            for i in range(5)
        ]
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
    assert any(text.startswith("unmasked") for text in named) and any(text.startswith("masked") for text in named)
    assert figure.axes[0].get_ylabel() or any("task" in label.get_text() for label in figure.axes[0].get_yticklabels())


def test_long_tables_are_folded():
    short, long = (tables.show([{"sae": i, "l0": 20.0} for i in range(n)]).data for n in (15, 16))
    assert "<details>" not in short and long.startswith("<details><summary>Table of 16 rows: sae, l0</summary>")
    assert long.count("<tr>") + long.count("<tr ") == 17


def test_masked_text_shows_what_is_masked():
    class Tokenizer:
        def decode(self, ids):
            return f"<{ids[0]}>"

    import torch

    html = data.masked_text_html(Tokenizer(), torch.tensor([1, 2, 3]), torch.tensor([False, True, False]))
    assert html.count("<span") == 3 and html.count("background") == 1 and "&lt;2&gt;" in html
    assert html.index("background") < html.index("&lt;2&gt;") < html.index("&lt;3&gt;")
