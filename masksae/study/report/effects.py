"""What an arm changes, paired by seed: rows of several result files side by side, and tables of their differences with
intervals."""

import math

import numpy as np
import pandas as pd

from masksae.errors import DataError
from masksae.study.report.labels import heading, score
from masksae.study.stats import Effect, interpolate, paired_effect, paired_effect_by_item

KEYS = ["sae", "arm", "p", "grid", "architecture", "k", "seed", "mode"]
"""What the rows of one SAE in one mode have in common in every result."""

NESTED = ["letters", "parents", "exploratory_parents", "tasks", "excluded", "threshold", "groups", "pairs"]
"""Tables inside rows, and what is not compared."""

COMPARED = ("mean_full", "context_full", "ev_centred", "ce_score", "probing_auc_", "ood_gap_", "dead_latents")
"""Scores of the comparison; of those for several numbers of latents the first counts."""


def merge(*results: list[dict], mode: str = "matched") -> pd.DataFrame:
    """One row per SAE with the scores of several result files in one mode. Tables inside rows become, for a score that
    is a mean over letters or tasks, a column SCORE_items of {letter or task: value}."""
    table = pd.DataFrame(results[0])
    for rows in results[1:]:
        more = pd.DataFrame([row | _items(row) for row in rows])
        table = table.merge(more.drop(columns=NESTED, errors="ignore"), on=KEYS, validate="one_to_one")
    return table[table["mode"] == mode].reset_index(drop=True)


def _items(row: dict) -> dict[str, dict[str, float]]:
    items = {}
    if "letters" in row:
        items["mean_full_items"] = {item["letter"]: item["full"] for item in row["letters"]}
    if "parents" in row:
        items["context_full_items"] = {item["letter"]: item["full"] for item in row["parents"]}
    for task in row.get("tasks", ()):
        for k, auc in task["auc"].items():
            items.setdefault(f"{task['family']}_auc_{k}_items", {})[task["task"]] = auc
            items.setdefault(f"{task['family']}_gap_{k}_items", {})[task["task"]] = task["raw_auc"] - auc
    return items


def baseline_arm(scores: pd.DataFrame) -> str:
    """Name of the arm with p = 0 that comes first."""
    return scores.loc[scores["p"] == 0, "arm"].iloc[0]


def treated_arms(scores: pd.DataFrame) -> list[str]:
    """Names of the arms that are compared with the baseline."""
    return [arm for arm in dict.fromkeys(scores["arm"]) if arm != baseline_arm(scores)]


def effect(scores: pd.DataFrame, column: str, grid: str, arm: str) -> Effect:
    """Paired effect of an arm against the unmasked one (p = 0) on one score of one grid; if the score is a mean over
    letters or tasks, with an interval for other letters or tasks too."""
    part, items = scores[scores["grid"] == grid], f"{column}_items"
    used = items if items in scores else column
    baseline, treated = (part[part["arm"] == name].set_index("seed")[used] for name in (baseline_arm(scores), arm))
    if set(baseline.index) != set(treated.index):
        raise DataError(
            f"{grid}: the arms have other seeds ({sorted(baseline.index)} against {sorted(treated.index)}), "
            "so they cannot be paired."
        )
    baseline, treated = baseline.sort_index().tolist(), treated.sort_index().tolist()
    if used == column:
        return paired_effect(baseline, treated)
    names = sorted(baseline[0])
    return paired_effect_by_item(
        *([[row.get(name, math.nan) for name in names] for row in side] for side in (baseline, treated))
    )


def first_column(scores: pd.DataFrame, start: str) -> str | None:
    """The first column whose name begins so; None if there is none."""
    return next((column for column in scores.columns if column.startswith(start)), None)


def compared(scores: pd.DataFrame) -> dict[str, str]:
    """Heading -> column of the scores that this run has of those to compare."""
    columns = {heading(start): first_column(scores, start) for start in COMPARED}
    return {title: column for title, column in columns.items() if column}


def comparison(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per grid and treated arm, one column per score: baseline -> treated and the difference with its
    interval."""
    rows = []
    for grid in dict.fromkeys(scores["grid"]):
        for arm in treated_arms(scores):
            row = {"SAEs": grid, "arm": arm}
            for title, column in compared(scores).items():
                row[title] = describe(effect(scores, column, grid, arm), score(column).digits)
            rows.append(row | {"pairs": effect(scores, "mean_full", grid, arm).pairs})
    return pd.DataFrame(rows)


def interpolated(*results: list[dict]) -> pd.DataFrame:
    """The comparison at a common clean L0 by interpolating over k, SAEs as trained: another way to matched sparsity
    than recalibrated thresholds, which takes no SAE off its own threshold. One row per architecture that has several k,
    at their geometric mean; no row where the SAEs' own L0 do not enclose it."""
    scores, rows = merge(*results, mode="as_trained"), []
    for architecture, part in scores.groupby("architecture", sort=False):
        l0 = float(np.exp(np.log(part["k"].unique()).mean()))
        for arm in treated_arms(scores):
            row = {"architecture": architecture, "arm": arm, "L0": round(l0, 1)}
            for title, column in compared(scores).items():
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


def describe(e: Effect, digits: int = 3) -> str:
    """ "0.148 → 0.095 (−0.053, 95 % −0.094 to −0.012)"; if nothing was found, with the difference that could have
    been."""
    interval = "one pair, no interval" if e.low is None else f"95 % {_fixed(e.low, digits)} to {_fixed(e.high, digits)}"
    if e.items_low is not None:
        interval += f", for other items too {_fixed(e.items_low, digits)} to {_fixed(e.items_high, digits)}"
    if e.low is not None and e.verdict(1) == e.verdict(-1):
        interval += f"; detectable {_fixed(e.detectable, digits)}"
    difference = ("+" if e.difference > 0 else "") + _fixed(e.difference, digits)
    return f"{_fixed(e.baseline, digits)} → {_fixed(e.treated, digits)} ({difference}, {interval})"


def change(e: Effect, digits: int = 3) -> str:
    """ "−0.053 (95 % −0.094 to −0.012)"."""
    interval = "" if e.low is None else f" (95 % {_fixed(e.low, digits, '+')} to {_fixed(e.high, digits, '+')})"
    return _fixed(e.difference, digits, "+") + interval


def _fixed(value: float, digits: int, sign: str = "") -> str:
    """A number with a minus as typographers set it."""
    return f"{value:{sign}.{digits}f}".replace("-", "−")
