"""What one cell of SAEs has that another has not: rows of several result files side by side, differences paired by
seed, and tables of them with intervals.

A cell is an arm of a grid: (arm, grid). An arm is compared with the unmasked SAEs of its grid, a rival with those of
another grid.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from masksae.errors import DataError
from masksae.study.report.labels import heading, score
from masksae.study.stats import Effect, Items, interpolate, paired_effect

KEYS = ["sae", "arm", "p", "grid", "architecture", "k", "seed", "mode"]
"""What the rows of one SAE in one mode have in common in every result."""

NESTED = ["letters", "parents", "exploratory_parents", "tasks", "excluded", "threshold", "groups", "pairs", "texts"]
"""Tables inside rows, and what is not compared."""

COMPARED = (
    *("mean_full", "main_f1", "context_full", "context_main_f1", "ev_centred", "ce_score", "probing_auc_", "ood_gap_"),
    *("robustness_random_near_jaccard", "l0", "dead_in_training", "dead_latents"),
)
"""Scores of the comparison; of those for several numbers of latents the first counts."""

LETTERS = ("mean_", "main_", "dense_absorbers")
"""What the names of scores of first letters begin with: there are no other letters, so that only pairs vary."""

ITEMS = {
    "letters": {"full": "mean_full", "specific": "mean_specific", "f1": "main_f1", "recall": "main_recall"},
    "parents": {
        **{"full": "context_full", "specific": "context_specific", "f1": "context_main_f1"},
        "recall": "context_main_recall",
    },
}
"""Tables inside rows, their columns, and the scores that are means over those."""

MODES = {"as_trained": "as trained", "matched": "threshold moved to L0 = k"}
"""Ways to compare, the published one first."""

Cell = tuple[str, str]
"""(arm, grid)"""


def merge(*results: list[dict], mode: str = "matched") -> pd.DataFrame:
    """One row per SAE with the scores of several result files in one mode. Tables inside rows become, for a score that
    is a mean over letters, parents, tasks or texts, a column SCORE_items of {letter or task: value}."""
    tables = [pd.DataFrame([row | _items(row) for row in rows if row["mode"] == mode]) for rows in results]
    first, *others = [table.drop(columns=NESTED, errors="ignore") for table in tables]
    for table in others:
        first = first.merge(table, on=KEYS, validate="one_to_one")
    return first


def _items(row: dict) -> dict[str, dict[str, float]]:
    items = {}
    for nested, columns in ITEMS.items():
        for item in row.get(nested, ()):
            for key, mean in columns.items():
                if mean in row and item.get(key) is not None:
                    items.setdefault(f"{mean}_items", {})[item["letter"]] = item[key]
    for task in row.get("tasks", ()):
        for k, auc in task["auc"].items():
            items.setdefault(f"{task['family']}_auc_{k}_items", {})[task["task"]] = auc
            items.setdefault(f"{task['family']}_gap_{k}_items", {})[task["task"]] = task["raw_auc"] - auc
    for name, values in row.get("texts", {}).items():
        items[f"{name}_items"] = {str(batch): value for batch, value in enumerate(values)}
    return items


def baseline_arm(scores: pd.DataFrame) -> str:
    """Name of the arm with p = 0 that comes first."""
    return scores.loc[scores["p"] == 0, "arm"].iloc[0]


def treated_arms(scores: pd.DataFrame) -> list[str]:
    """Names of the arms that are compared with the baseline."""
    return [arm for arm in dict.fromkeys(scores["arm"]) if arm != baseline_arm(scores)]


def own_baseline(scores: pd.DataFrame) -> Callable[[str, str], Cell | None]:
    """(arm, grid) -> the cell that it is compared with: the unmasked SAEs of the same grid; None if there are none, and
    for those themselves."""
    cells, first = set(zip(scores["arm"], scores["grid"])), baseline_arm(scores)
    return lambda arm, grid: (first, grid) if arm != first and (first, grid) in cells else None


def standing(scores: pd.DataFrame, baseline: Callable[[str, str], Cell | None] | None = None) -> list[str]:
    """Grids whose unmasked SAEs are compared with no other grid's: those of rivals and of controls are."""
    baseline, first = baseline or own_baseline(scores), baseline_arm(scores)
    unmasked = dict.fromkeys(scores.loc[scores["arm"] == first, "grid"])
    return [grid for grid in unmasked if baseline(first, grid) is None]


def effect(
    scores: pd.DataFrame, column: str, grid: str, arm: str, baseline: Cell | None = None, items: Items | None = None
) -> Effect:
    """What the SAEs of an arm and grid have of one score that those of another cell have not, paired by seed.

    baseline  (arm, grid); None: the unmasked SAEs of the same grid. May have more pairs than the treated cell
    items     of a score that is a mean over letters, parents, tasks or sets: "random" if they vary like the pairs,
              "fixed" if they are all there are; None: letters are fixed, all others random

    Raises DataError for a cell without rows, for pairs that stand twice, and for pairs without a partner.
    """
    treated, baseline = (arm, grid), baseline or (baseline_arm(scores), grid)
    items = items or ("fixed" if column.startswith(LETTERS) else "random")
    named = f"{column}_items"
    used = named if items == "random" and named in scores else column
    first, second = (_by_pair(scores, cell, used) for cell in (baseline, treated))
    if alone := sorted(set(second.index) - set(first.index)):
        raise DataError(
            f"{' of '.join(treated)} has the pairs {sorted(second.index)}, {' of '.join(baseline)} has "
            f"{sorted(first.index)}: {alone} have no partner. Train and score them too, or leave them out."
        )
    sides = first[second.index].tolist(), second.tolist()
    if used == column:
        return paired_effect(*sides, items=items)
    names = sorted(sides[0][0])
    return paired_effect(*([[row.get(name, math.nan) for name in names] for row in side] for side in sides))


def _by_pair(scores: pd.DataFrame, cell: Cell, column: str) -> pd.Series:
    """A column of a cell by seed, in its order. Raises DataError."""
    arm, grid = cell
    part = scores[(scores["arm"] == arm) & (scores["grid"] == grid)].set_index("seed")[column].sort_index()
    if part.empty:
        raise DataError(f"No SAEs of arm {arm} and grid {grid} are among the scores. Train and score them first.")
    if not part.index.is_unique:
        twice = sorted(set(part.index[part.index.duplicated()]))
        raise DataError(f"{arm} of {grid}: the pairs {twice} stand twice. SAEs that share a draw are one pair.")
    return part


def first_column(scores: pd.DataFrame, start: str) -> str | None:
    """The first column whose name begins so; None if there is none."""
    return next((column for column in scores.columns if column.startswith(start)), None)


def compared(scores: pd.DataFrame) -> dict[str, str]:
    """Heading -> column of the scores that this run has of those to compare."""
    columns = {heading(start): first_column(scores, start) for start in COMPARED}
    return {title: column for title, column in columns.items() if column}


def comparison(*results: list[dict], baseline: Callable[[str, str], Cell | None] | None = None) -> pd.DataFrame:
    """One row per cell and way to compare, one column per score: baseline -> treated and the difference with its
    interval. As trained stands first, as published; then SAEs of another k, trained to the clean L0 of the baseline;
    then thresholds moved to clean L0 = k, for SAEs that have one.

    baseline  (arm, grid) -> cell to compare with, or None; None: `own_baseline`
    """
    by_mode = {mode: merge(*results, mode=mode) for mode in MODES}
    scores = by_mode["as_trained"]
    baseline, k = baseline or own_baseline(scores), scores.groupby("grid")["k"].first()
    found = []
    for arm, grid in dict.fromkeys(zip(scores["arm"], scores["grid"])):
        if (cell := baseline(arm, grid)) is None:
            continue
        chosen = k[grid] != k[cell[1]]
        row = {"SAEs": f"{arm}, {grid}", "against": ", ".join(cell)}
        told = {}
        for mode, words in MODES.items():
            named = "trained to the clean L0" if chosen else words
            entry = row | {"compared": named} | described(by_mode[mode], arm, grid, cell, describe)
            if not chosen or mode == "as_trained":
                told[mode] = entry
        if _same(scores, by_mode["matched"], {(arm, grid), cell}):
            told = {"as_trained": told["as_trained"] | {"compared": "as trained; no threshold to move"}}
        found += [
            (list(scores["grid"]).index(cell[1]), chosen + 2 * (mode == "matched"), e) for mode, e in told.items()
        ]
    entries = [entry for _, _, entry in sorted(found, key=lambda place: place[:2])]
    return pd.DataFrame(entries, columns=None if entries else ["SAEs", "against", "compared"])


def described(scores: pd.DataFrame, arm: str, grid: str, cell: Cell, words: Callable[[Effect, int], str]) -> dict:
    """Heading of a score -> its effect against a cell in `words(effect, digits)`, "–" where an SAE has none; and the
    number of pairs."""
    part = scores[[at in {(arm, grid), cell} for at in zip(scores["arm"], scores["grid"])]]
    row, pairs = {}, 0
    for title, column in compared(scores).items():
        if part[column].isna().any():
            row[title] = "–"
            continue
        found = effect(part, column, grid, arm, cell)
        row[title], pairs = words(found, score(column).digits), found.pairs
    return row | {"pairs": pairs}


def _same(trained: pd.DataFrame, matched: pd.DataFrame, cells: set[Cell]) -> bool:
    """Whether the SAEs of some cells have no threshold that could be moved, so that both ways are one."""
    sides = [
        scores[[cell in cells for cell in zip(scores["arm"], scores["grid"])]]
        .set_index("sae")["l0"]
        .sort_index()
        .astype(float)
        for scores in (trained, matched)
    ]
    return sides[0].equals(sides[1])


def interpolated(*results: list[dict], baseline: Callable[[str, str], Cell | None] | None = None) -> pd.DataFrame:
    """The comparison at a common clean L0 by interpolating over k, SAEs as trained: another way to matched sparsity
    than recalibrated thresholds, which takes no SAE off its own threshold. One row per architecture that has several k,
    at their geometric mean; no row where the SAEs' own L0 do not enclose it. Rivals (`standing`) are left out."""
    scores, rows = merge(*results, mode="as_trained"), []
    scores = scores[scores["grid"].isin(standing(scores, baseline))]
    for architecture, part in scores.groupby("architecture", sort=False):
        l0 = float(np.exp(np.log(part["k"].unique()).mean()))
        for arm in treated_arms(scores):
            row = {"architecture": architecture, "arm": arm, "L0": round(l0, 1)}
            for title, column in compared(scores.drop(columns="l0")).items():
                sides = [at_l0(part[part["arm"] == name], column, l0) for name in (baseline_arm(scores), arm)]
                seeds = sorted(set(sides[0]) & set(sides[1]))
                if seeds:
                    paired = paired_effect(*([side[seed] for seed in seeds] for side in sides))
                    row[title] = describe(paired, score(column).digits)
                    row["pairs"] = len(seeds)
            rows += [row] if "pairs" in row else []
    return pd.DataFrame(rows)


def at_l0(scores: pd.DataFrame, column: str, l0: float) -> dict[int, float]:
    """A score of each seed's SAEs at one L0, for the seeds whose SAEs enclose it."""
    at = {seed: interpolate(part["l0"].tolist(), part[column].tolist(), l0) for seed, part in scores.groupby("seed")}
    return {seed: value for seed, value in at.items() if value is not None}


def describe(e: Effect, digits: int = 3, *, detectable: bool = True) -> str:
    """ "0.148 → 0.095 (−0.053, 95 % −0.094 to −0.012)"; if nothing was found, with the difference that could have
    been, unless it stands elsewhere."""
    ends = "" if e.low is None else f"{_fixed(e.low, digits)} to {_fixed(e.high, digits)}"
    interval = f"{percent(e)} {ends}" if ends else "one pair, no interval"
    if detectable and ends and e.verdict(1, level=e.level) == "inconclusive":
        interval += f"; detectable {_fixed(e.detectable, digits)}"
    difference = ("+" if e.difference > 0 else "") + _fixed(e.difference, digits)
    return f"{_fixed(e.baseline, digits)} → {_fixed(e.treated, digits)} ({difference}, {interval})"


def way(e: Effect) -> str:
    """ "falls" or "rises" if the interval lies on one side of 0; else "no clear change"."""
    if e.low is None or e.low <= 0 <= e.high:
        return "no clear change"
    return "falls" if e.high < 0 else "rises"


def sentence(e: Effect, digits: int = 3, said: str = "") -> str:
    """A change as the end of a sentence. said: a verdict in place of what the interval says.

    >>> sentence(paired_effect([0.2, 0.2, 0.2], [0.09, 0.1, 0.11]), 2)
    'falls (0.20 to 0.10; difference −0.10, 95 % interval −0.12 to −0.08)'
    """
    ends = "one pair, no interval"
    if e.low is not None:
        ends = f"{percent(e)} interval {_fixed(e.low, digits, '+')} to {_fixed(e.high, digits, '+')}"
    values = f"{_fixed(e.baseline, digits)} to {_fixed(e.treated, digits)}"
    said = said or way(e).replace("no clear", "shows no clear")
    return f"{said} ({values}; difference {_fixed(e.difference, digits, '+')}, {ends})"


def percent(e: Effect) -> str:
    """ "95 %": what an effect's interval covers."""
    return f"{100 * (1 - e.level):.4g} %"


def change(e: Effect) -> str:
    """ "−0.053 (95 % −0.094 to −0.012)"."""
    interval = "" if e.low is None else f" ({percent(e)} {_fixed(e.low, 3, '+')} to {_fixed(e.high, 3, '+')})"
    return _fixed(e.difference, 3, "+") + interval


def around(e: Effect, digits: int = 3) -> str:
    """ "−0.053 ± 0.041": the interval lies on both sides alike."""
    half = "" if e.low is None else f" ± {_fixed((e.high - e.low) / 2, digits)}"
    return _fixed(e.difference, digits, "+") + half


def _fixed(value: float, digits: int, sign: str = "") -> str:
    """A number with a minus as typographers set it."""
    return f"{value:{sign}.{digits}f}".replace("-", "−")
