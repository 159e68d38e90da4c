"""Tables and paired effects from small results; nothing is computed here that a result file does not hold."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from masksae.errors import DataError
from masksae.files import write_text
from masksae.study import stats
from masksae.study.stats import Effect, paired_effect, paired_effect_by_item

REMARKS = {
    "reconstruct no better than the mean activation (explained variance 0 or less); other scores say little of such an "
    "SAE: train on more tokens (text.train_tokens, training.epochs) or with another training.lr": (
        lambda row: row["ev_centred"] <= 0
    ),
    "serve the language model no better than zeros in the activation's place": (
        lambda row: row["ce_sae"] >= row["ce_zero"] or row["kl_sae"] >= row["kl_zero"]
    ),
    "do not reach L0 = k at any threshold, so they are not compared at equal L0: train longer": (
        lambda row: row["mode"] == "matched" and row["l0"] < 0.99 * row["k"]
    ),
}
"""What can be wrong with an SAE's row of reconstruction scores."""


def remarks(rows: list[dict]) -> list[str]:
    """What must be known of some SAEs before their scores are compared, a sentence each; [] if all is well.

    rows  of `reconstruction_scores`
    """
    found = []
    for what, holds in REMARKS.items():
        names = [f"{row['sae']} ({row['mode'].replace('_', ' ')})" for row in rows if holds(row)]
        if names:
            shown = ", ".join([*names[:6], *(["..."] if len(names) > 6 else [])])
            found.append(f"{len(names)} of {len(rows)} rows {what}: {shown}.")
    return found


def merge(*results: list[dict], mode: str = "matched") -> pd.DataFrame:
    """One row per SAE with the scores of several result files in one mode. Tables inside rows become, for a score that is a mean over
    letters or tasks, a column SCORE_items of {letter or task: value}."""
    keys = ["sae", "arm", "p", "grid", "architecture", "k", "seed", "mode"]
    table = pd.DataFrame(results[0])
    for rows in results[1:]:
        more = pd.DataFrame([row | _items(row) for row in rows])
        nested = ["letters", "parents", "tasks", "excluded", "threshold", "groups", "pairs"]
        table = table.merge(more.drop(columns=nested, errors="ignore"), on=keys, validate="one_to_one")
    return table[table["mode"] == mode].reset_index(drop=True)


def _items(row: dict) -> dict[str, dict[str, float]]:
    found = {}
    if "letters" in row:
        found["mean_full_items"] = {item["letter"]: item["full"] for item in row["letters"]}
    if "parents" in row:
        found["context_full_items"] = {item["letter"]: item["full"] for item in row["parents"]}
    for task in row.get("tasks", ()):
        for k, auc in task["auc"].items():
            found.setdefault(f"{task['family']}_auc_{k}_items", {})[task["task"]] = auc
            found.setdefault(f"{task['family']}_gap_{k}_items", {})[task["task"]] = task["raw_auc"] - auc
    return found


def effect(scores: pd.DataFrame, score: str, grid: str, arm: str) -> Effect:
    """Paired effect of an arm against the unmasked one (p = 0) on one score of one grid; if the score is a mean over letters or tasks,
    with an interval for other letters or tasks too."""
    part, column = scores[scores["grid"] == grid], f"{score}_items"
    column = column if column in scores else score
    baseline, treated = (part[part["arm"] == name].set_index("seed")[column] for name in (baseline_arm(scores), arm))
    if set(baseline.index) != set(treated.index):
        raise DataError(
            f"{grid}: the arms have other seeds ({sorted(baseline.index)} against {sorted(treated.index)}), so they cannot be paired."
        )
    baseline, treated = baseline.sort_index().tolist(), treated.sort_index().tolist()
    if column == score:
        return paired_effect(baseline, treated)
    names = sorted(baseline[0])
    return paired_effect_by_item(
        *([[row.get(name, math.nan) for name in names] for row in side] for side in (baseline, treated))
    )


def baseline_arm(scores: pd.DataFrame) -> str:
    """Name of the arm with p = 0 that comes first."""
    return scores.loc[scores["p"] == 0, "arm"].iloc[0]


COLUMNS = {
    "mean_full": "absorption",
    "context_full": "absorption by context",
    "ev_centred": "explained variance",
    "ce_score": "CE score",
    "probing_auc_": "probing, AUC",
    "ood_gap_": "gap under a shift, AUC",
    "dead_latents": "dead latents",
}
"""Scores of the comparison: columns, or beginnings of columns of which the first counts."""

DIGITS = {"dead_latents": 0}
"""Digits after the point, where they are not 3."""


def treated_arms(scores: pd.DataFrame) -> list[str]:
    """Names of the arms that are compared with the baseline."""
    return [arm for arm in dict.fromkeys(scores["arm"]) if arm != baseline_arm(scores)]


def first_column(scores: pd.DataFrame, start: str) -> str | None:
    """The first column whose name begins so; None if there is none."""
    return next((column for column in scores.columns if column.startswith(start)), None)


def compared(scores: pd.DataFrame) -> dict[str, str]:
    """Label -> column of the scores that this run has of those to compare."""
    found = {label: first_column(scores, start) for start, label in COLUMNS.items()}
    return {label: column for label, column in found.items() if column}


def comparison(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per grid and treated arm, one column per score: baseline -> treated and the difference with its interval."""
    rows = []
    for grid in dict.fromkeys(scores["grid"]):
        for arm in treated_arms(scores):
            row = {"SAEs": grid, "arm": arm}
            for label, score in compared(scores).items():
                row[label] = describe(effect(scores, score, grid, arm), DIGITS.get(score, 3))
            rows.append(row | {"pairs": effect(scores, "mean_full", grid, arm).pairs})
    return pd.DataFrame(rows)


def describe(e: Effect, digits: int = 3) -> str:
    """ "0.148 → 0.095 (−0.053, 95 % −0.094 to −0.012)"; if nothing was found, with the difference that could have been."""
    number = lambda v: f"{v:.{digits}f}".replace("-", "−")
    interval = "one pair, no interval" if e.low is None else f"95 % {number(e.low)} to {number(e.high)}"
    if e.items_low is not None:
        interval += f", for other items too {number(e.items_low)} to {number(e.items_high)}"
    if e.low is not None and e.verdict(1) == e.verdict(-1):
        interval += f"; detectable {number(e.detectable)}"
    return f"{number(e.baseline)} → {number(e.treated)} ({'+' if e.difference > 0 else ''}{number(e.difference)}, {interval})"


def change(e: Effect, digits: int = 3) -> str:
    """ "−0.053 (95 % −0.094 to −0.012)"."""
    number = lambda v: f"{v:+.{digits}f}".replace("-", "−")
    return number(e.difference) + ("" if e.low is None else f" (95 % {number(e.low)} to {number(e.high)})")


def interpolated(*results: list[dict]) -> pd.DataFrame:
    """The comparison at a common clean L0 by interpolating over k, SAEs as trained: another way to matched sparsity than recalibrated
    thresholds, which takes no SAE off its own threshold. One row per architecture that has several k, at their geometric mean; no row
    where the SAEs' own L0 do not enclose it."""
    scores, rows = merge(*results, mode="as_trained"), []
    for architecture, part in scores.groupby("architecture", sort=False):
        l0 = float(np.exp(np.log(part["k"].unique()).mean()))
        for arm in treated_arms(scores):
            row = {"architecture": architecture, "arm": arm, "L0": round(l0, 1)}
            for label, score in compared(scores).items():
                sides = [at_l0(part[part["arm"] == name], score, l0) for name in (baseline_arm(scores), arm)]
                seeds = sorted(set(sides[0]) & set(sides[1]))
                if seeds:
                    found = paired_effect(*([side[seed] for seed in seeds] for side in sides))
                    row[label] = describe(found, DIGITS.get(score, 3))
                    row["pairs"] = len(seeds)
            rows += [row] if "pairs" in row else []
    return pd.DataFrame(rows)


def at_l0(scores: pd.DataFrame, score: str, l0: float) -> dict[int, float]:
    """A score of each seed's SAEs at one L0, for the seeds whose SAEs enclose it."""
    at = lambda part: stats.interpolate(part["l0"].tolist(), part[score].tolist(), l0)
    found = {seed: at(part) for seed, part in scores.groupby("seed")}
    return {seed: value for seed, value in found.items() if value is not None}


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(str(v) for v in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


LONG = 15
"""Rows above which a table is folded."""


def show(rows, columns: list[str] | None = None):
    """A table for a notebook: chosen columns, numbers to four digits, no index; a long one is folded behind a line that opens it."""
    from IPython.display import HTML

    table = pd.DataFrame(rows)[columns] if columns else pd.DataFrame(rows)
    body = table.to_html(index=False, float_format="{:.4g}".format, na_rep="", border=0)
    if len(table) > LONG:
        body = f"<details><summary>Table of {len(table)} rows: {', '.join(table.columns)}</summary>{body}</details>"
    return HTML(body)


def save_table(path, table: pd.DataFrame, note: str):
    """Write a table as markdown with a note below it; returns it for display."""
    write_text(Path(path), to_markdown(table) + f"\n{note}\n")
    return show(table)


def norm_table(rows: list[dict]) -> list[dict]:
    """Median and largest norm by arm and by whether the position is masked."""
    grouped = pd.DataFrame(rows).groupby(["arm", "masked"], sort=False)["norm"]
    return grouped.agg(positions="size", median="median", largest="max").reset_index().to_dict("records")
