"""The sentences that the README and the results page open with hold the numbers that stand in the rows of the results,
worked out here from those rows alone."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from masksae import load_profile
from masksae.files import read_json
from masksae.study.report import answer, results
from masksae.study.stats import grand_mean, paired_effect

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results/overnight"


ARMS = ("unmasked", "kept")


def reconstructed():
    """Rows of the main SAEs as trained."""
    rows = read_json(FOLDER / "reconstruction.json")
    return [row for row in rows if (row["grid"], row["mode"]) == ("topk20", "as_trained")]


@pytest.fixture(scope="module")
def profile():
    return load_profile("overnight")


@pytest.fixture(scope="module")
def told(profile):
    return answer.beside(answer.scores_of(FOLDER, profile), profile)


@pytest.fixture(scope="module")
def sentences(told, profile):
    return answer.short_answer(read_json(FOLDER / "claims.json"), told, profile)


def direct(name, value, arm, grid, against):
    """Differences [pairs, items] of one score between two cells: (mean, low, high)."""
    rows = [row for row in read_json(FOLDER / f"{name}.json") if row["mode"] == "as_trained"]
    sides = [
        {r["seed"]: np.atleast_1d(value(r)) for r in rows if (r["arm"], r["grid"]) == c} for c in (against, (arm, grid))
    ]
    differences = np.stack([sides[1][seed] - sides[0][seed] for seed in sorted(sides[1])])
    mean, error, degrees = grand_mean(differences, items="random" if differences.shape[1] > 1 else "fixed")
    reach = stats.t.ppf(0.975, degrees) * error
    return mean, mean - reach, mean + reach


def parents(key):
    """A value of every parent, in the order of their names."""
    return lambda row: [each[key] for each in sorted(row["parents"], key=lambda each: each["letter"])]


MAIN, MATRYOSHKA = ("topk20", ("unmasked", "topk20")), ("matryoshka20", ("unmasked", "matryoshka20"))
SHOWN = {
    "context_main_recall": ("contexts", parents("recall"), "kept", *MAIN),
    "main_recall": ("absorption", lambda row: row["main_recall"], "kept", *MAIN),
    "robustness_mask_near_recon": ("robustness", lambda r: r["texts"]["robustness_mask_near_recon"], "kept", *MAIN),
    "robustness_mask_far_recon": ("robustness", lambda r: r["texts"]["robustness_mask_far_recon"], "kept", *MAIN),
    "robustness_mask_near_top_jaccard": ("robustness", lambda r: r["robustness_mask_near_top_jaccard"], "kept", *MAIN),
    "robustness_mask_far_top_jaccard": ("robustness", lambda r: r["robustness_mask_far_top_jaccard"], "kept", *MAIN),
    "main_f1": ("absorption", lambda row: row["main_f1"], "kept", *MATRYOSHKA),
    "mean_full": ("absorption", lambda row: row["mean_full"], "unmasked", "c2r20", MAIN[1]),
    "context_full": ("contexts", parents("full"), "unmasked", "ortsae20", MAIN[1]),
    "ev_centred": ("reconstruction", lambda row: row["ev_centred"], "unmasked", "ortsae20", MAIN[1]),
    "probing_auc_1": (
        "probing",
        lambda row: [t["auc"]["1"] for t in sorted(row["tasks"], key=lambda t: t["task"]) if t["family"] == "probing"],
        *("kept", *MAIN),
    ),
}


@pytest.mark.parametrize("key", SHOWN)
def test_what_stands_beside_the_verdicts_is_what_the_rows_hold(key, told, profile):
    name, value, arm, grid, against = SHOWN[key]
    found = told[arm, grid, key]
    expected = direct(name, value, arm, grid, against)
    assert [found.difference, found.low, found.high] == pytest.approx(expected, abs=1e-9)
    table = answer.beside_table(told, profile)
    row = table[list(told).index((arm, grid, key))]
    digits = 4 if key == "ev_centred" else 3
    assert f"{expected[0]:.{digits}f}".replace("-", "−") in row["change"]
    assert row["it"] == ("falls" if expected[2] < 0 else "rises" if expected[1] > 0 else "no clear change")


@pytest.mark.parametrize("key", [key for key in SHOWN if "far" not in key])
def test_the_sentences_hold_the_numbers_of_the_rows(key, sentences):
    digits = 4 if key == "ev_centred" else 3
    mean, low, high = (f"{x:+.{digits}f}".replace("-", "−") for x in direct(*SHOWN[key]))
    assert f"difference {mean}, 95 % interval {low} to {high}" in sentences


def test_the_sentences_tell_the_verdicts(sentences):
    claims = read_json(FOLDER / "claims.json")
    for row in (claims["C1"], claims["C1"]["endpoints"]["contexts"], claims["C2"], claims["C3"], claims["R"]):
        low, high = (f"{row[end]:+.3f}".replace("-", "−") for end in ("low", "high"))
        [said] = [part for part in sentences.split(". ") if f"interval {low} to {high}" in part]
        assert (f"is {row['verdict']}" in said) == (row["verdict"] in ("equivalent", "inconclusive"))
    rest = {arm: 1 - np.mean([row["ev_centred"] for row in reconstructed() if row["arm"] == arm]) for arm in ARMS}
    assert f"rises by {100 * (rest['kept'] / rest['unmasked'] - 1):.0f} %" in sentences
    assert "our bound" in sentences and "contradicted" not in sentences and "`<|endoftext|>`" in sentences


def test_a_fall_of_absorption_is_no_gain_where_its_latents_tell_fewer_words():
    rows = {"contexts": {"verdict": "supported"}}
    fewer, more = (paired_effect([0.5] * 3, [0.5 + sign * x for x in (0.1, 0.11, 0.12)]) for sign in (-1, 1))
    assert "not mask" in answer._default(rows, {"context_main_recall": fewer})
    assert "improves contexts" in answer._default(rows, {"context_main_recall": more})
    assert "not mask" in answer._default({"contexts": {"verdict": "inconclusive"}}, {"context_main_recall": more})


def test_arms_stand_below_the_unmasked_saes_of_their_own_pairs(profile):
    values = {}
    for row in reconstructed():
        values.setdefault(row["arm"], {})[row["seed"]] = row["ev_centred"]
    table, words = results._arms(FOLDER, profile), results._arms_words(FOLDER, profile)
    for row in table:
        if row["arm"] == "unmasked":
            before = row
            continue
        pairs = values[row["arm"].replace(" ", "_")]
        assert row["pairs"] == before["pairs"] == f"{min(pairs)} to {max(pairs)} ({len(pairs)})"
        mean = np.mean([values["unmasked"][pair] for pair in pairs])
        assert before["explained variance"] == f"{mean:.4f}"
    assert f"The {6 * (len(values) - 1)} intervals" in words and len(table) == len(values) + 1


def test_agreement_counts_every_score():
    up, down, flat = "+0.1 (95 % +0.0 to +0.2) rises", "−0.1 (95 % −0.2 to −0.0) falls", "0 no clear change"
    cells = [
        ("absorption", down, down, up),
        ("absorption", down, flat, down),
        ("F1", up, down, flat),
        ("F1", up, up, down),
    ]
    table = [{"arm": "kept", "parents": "", "score": s, "a": a, "b": b, "this model": c} for s, a, b, c in cells]
    assert "absorption in 1 of 3 and on F1 in 0 of 2" in results._agreed(table)


def test_the_pages_open_with_the_answer(sentences):
    page, readme = ((ROOT / name).read_text() for name in ("docs/results.md", "README.md"))
    assert 0 < page.index(sentences) < page.index("\n## ")
    assert readme.index(sentences) < readme.index("![Absorption") < readme.index("| C1: ")
    for text in (page, readme):
        assert "contradicted" not in "".join(re.findall(r"^\| C5.*$", text, re.MULTILINE))
        for table in re.findall(r"(?m)(?:^\|.*\n)+", text):  # a bar in a cell would shift those after it
            assert len({line.count("|") for line in table.splitlines()}) == 1, table.splitlines()[0]
