"""Tables, paired effects and verdicts from small results; nothing is computed here that a result file does not hold."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from masksae.study import stats
from masksae.errors import DataError
from masksae.files import write_text
from masksae.study.stats import Effect, paired_effect, paired_effect_by_item

CLAIMS = {
    "C1": "Masking reduces feature absorption",
    "C2": "Masking improves probing",
    "C3": "Masking narrows the out-of-distribution gap",
    "C4": "C1 to C3 hold across architectures and sparsity levels",
    "C5": "Explained variance falls slightly",
}


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


def caption(scores: pd.DataFrame, grid: str, arm: str) -> str:
    """What an arm changes in one grid, as a sentence for a caption."""
    named = {"absorption of first letters": "mean_full", "explained variance": "ev_centred"}
    return (
        f"{grid}, {arm}: "
        + ", ".join(f"{name} {change(effect(scores, s, grid, arm))}" for name, s in named.items())
        + "."
    )


def decided_by(scores: pd.DataFrame) -> dict[str, tuple[str, str, int]]:
    """Claim -> (column that decides it, its name, direction that supports it), for the claims that this run measured."""
    probing, gap = first_column(scores, "probing_auc_"), first_column(scores, "ood_gap_")
    found = {"C1": ("mean_full", "mean full absorption", -1)}
    if probing:
        found["C2"] = (probing, f"mean AUC of probes on {probing.split('_')[-1]} latents", +1)
    if gap:
        found["C3"] = (
            gap,
            f"mean AUC of raw probes less that of probes on {gap.split('_')[-1]} latents, under a shift",
            -1,
        )
    return found | {"C5": ("ev_centred", "explained variance (centred)", -1)}


def claims(scores: pd.DataFrame, arm: str) -> dict:
    """The verdicts, keyed C1 to C5. Decided at matched clean L0, each on the first grid, C4 by C1 to C3 on all grids.

    Each verdict has its own 5 %. `p_holm` is the p-value of its t test that holds for all of them at once. `pairs_needed`: pairs that would
    settle an inconclusive one four times out of five, were the true effect the one found. C1 is about first letters, which the paper
    measures; `cross_token` is the same for parents that another token sets.
    """
    grids, decided = list(dict.fromkeys(scores["grid"])), decided_by(scores)
    result = {}
    for key, (column, name, direction) in decided.items():
        found = effect(scores, column, grids[0], arm)
        result[key] = {"verdict": found.verdict(direction), "score": name, "grid": grids[0], **found.to_dict()}
        if result[key]["verdict"] == "inconclusive" and found.size:
            result[key]["pairs_needed"] = stats.pairs_needed(found.size)
    adjusted = stats.holm({key: value["p_value"] for key, value in result.items() if value["p_value"] is not None})
    for key, value in result.items():
        value["p_holm"] = adjusted.get(key)
    result["C1"]["dense_absorbers"] = dense_absorbers(scores, grids[0])
    if "context_full" in scores:
        cross = effect(scores, "context_full", grids[0], arm)
        result["C1"]["cross_token"] = {"verdict": cross.verdict(-1), **cross.to_dict()}
    for key in ("C2", "C3"):
        result.setdefault(key, {"verdict": "not measured", "reason": "No result of this profile speaks to it."})
    across = {
        grid: {
            key: effect(scores, decided[key][0], grid, arm).verdict(decided[key][2])
            for key in ("C1", "C2", "C3")
            if key in decided
        }
        for grid in grids
    }
    verdicts = [verdict for cell in across.values() for verdict in cell.values()]
    result["C4"] = {"verdict": stats.combine(verdicts) if len(grids) > 1 else "not measured", "grids": across}
    return {key: {"claim": claim, **result[key]} for key, claim in CLAIMS.items()}


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


def noise_table(rows: list[dict], score: str = "mean_full") -> list[dict]:
    """Where the variance of absorption comes from, per arm and for the difference of each later arm to the first: standard deviations by
    source, and their shares of the variance. Rows of the noise study."""
    table = pd.DataFrame(rows)
    axes = ["seed", "draw", "split"]
    values = {
        arm: part.set_index(axes)[score].sort_index().to_numpy().reshape([part[axis].nunique() for axis in axes])
        for arm, part in table.groupby("arm", sort=False)
    }
    first, *others = values
    values |= {f"{arm} less {first}": values[arm] - values[first] for arm in others}
    found = []
    for name, array in values.items():
        used = [axis for axis, size in zip(axes, array.shape) if size > 1]
        parts = stats.variance_components(array.squeeze(), used)
        total = sum(parts.values()) or 1.0
        found += [
            {"of": name, "mean": float(array.mean()), "source": source, "sd": v**0.5, "share": v / total}
            for source, v in parts.items()
        ]
    return found


def noise_means(rows: list[dict]) -> list[dict]:
    """Per SAE of the noise study, absorption of each letter averaged over draws and splits."""
    found = []
    for sae, part in pd.DataFrame(rows).groupby("sae", sort=False):
        letters = pd.DataFrame(part["letters"].tolist()).mean().sort_index()
        found.append({"sae": sae, "cells": len(part), "letters": letters.to_dict()})
    return found


def averaged(scores: pd.DataFrame, means: list[dict]) -> pd.DataFrame:
    """`scores` with the absorption of the SAEs of the noise study averaged over its draws and splits, so that less noise is left in C1."""
    scores = scores.copy()
    for row in means:
        here = scores.index[scores["sae"] == row["sae"]]
        scores.loc[here, "mean_full"] = sum(row["letters"].values()) / len(row["letters"])
        for index in here:
            scores.at[index, "mean_full_items"] = row["letters"]
    return scores


def dense_absorbers(scores: pd.DataFrame, grid: str) -> dict[str, float | None]:
    """Per arm, the mean share of absorbed words that are credited to a latent of no particular word; None if none is absorbed."""
    means = scores[scores["grid"] == grid].groupby("arm", sort=False)["dense_absorbers"].mean()
    return {arm: None if pd.isna(mean) else mean for arm, mean in means.items()}


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
