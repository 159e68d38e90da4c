"""Tables, paired effects and verdicts from small results; nothing is computed here that a result file does not hold."""

from pathlib import Path

import pandas as pd

from masksae.errors import DataError
from masksae.files import write_text
from masksae.stats import Effect, combine, paired_effect

CLAIMS = {
    "C1": "Masking reduces feature absorption",
    "C2": "Masking improves probing",
    "C3": "Masking narrows the out-of-distribution gap",
    "C4": "C1 to C3 hold across architectures and sparsity levels",
    "C5": "Explained variance falls slightly",
}


def merge(reconstruction: list[dict], absorption: list[dict], mode: str = "matched") -> pd.DataFrame:
    """One row per SAE with the scores of both files in one mode."""
    keys = ["sae", "arm", "p", "grid", "architecture", "k", "seed", "mode"]
    left, right = (
        pd.DataFrame(reconstruction),
        pd.DataFrame(absorption).drop(columns=["letters", "excluded"], errors="ignore"),
    )
    table = left.merge(right, on=keys, validate="one_to_one")
    return table[table["mode"] == mode].reset_index(drop=True)


def effect(scores: pd.DataFrame, score: str, grid: str, arm: str) -> Effect:
    """Paired effect of an arm against the unmasked one (p = 0) on one score of one grid."""
    part = scores[scores["grid"] == grid]
    baseline, treated = (part[part["arm"] == name].set_index("seed")[score] for name in (baseline_arm(scores), arm))
    if set(baseline.index) != set(treated.index):
        raise DataError(
            f"{grid}: the arms have other seeds ({sorted(baseline.index)} against {sorted(treated.index)}), so they cannot be paired."
        )
    return paired_effect(baseline.sort_index().tolist(), treated.sort_index().tolist())


def baseline_arm(scores: pd.DataFrame) -> str:
    """Name of the arm with p = 0 that comes first."""
    return scores.loc[scores["p"] == 0, "arm"].iloc[0]


COLUMNS = {
    "mean_full": "absorption",
    "ev_centred": "explained variance",
    "ce_score": "CE score",
    "dead_latents": "dead latents",
}


def comparison(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per grid and treated arm, one column per score: baseline -> treated and the difference with its interval."""
    rows = []
    for grid in dict.fromkeys(scores["grid"]):
        for arm in [a for a in dict.fromkeys(scores["arm"]) if a != baseline_arm(scores)]:
            row = {"SAEs": grid, "arm": arm}
            for score, label in COLUMNS.items():
                row[label] = describe(effect(scores, score, grid, arm), digits=0 if score == "dead_latents" else 3)
            rows.append(row | {"pairs": effect(scores, "mean_full", grid, arm).pairs})
    return pd.DataFrame(rows)


def describe(e: Effect, digits: int = 3) -> str:
    """ "0.148 → 0.095 (−0.053, 95 % −0.094 to −0.012)" """
    number = lambda v: f"{v:.{digits}f}".replace("-", "−")
    interval = "one pair, no interval" if e.low is None else f"95 % {number(e.low)} to {number(e.high)}"
    return f"{number(e.baseline)} → {number(e.treated)} ({'+' if e.difference > 0 else ''}{number(e.difference)}, {interval})"


def claims(scores: pd.DataFrame, arm: str) -> dict:
    """The verdicts, keyed C1 to C5. Decided at matched clean L0, C1 and C5 on the first grid, C4 for absorption on all grids."""
    grids = list(dict.fromkeys(scores["grid"]))
    absorption = {grid: effect(scores, "mean_full", grid, arm) for grid in grids}
    variance = effect(scores, "ev_centred", grids[0], arm)
    not_measured = {"verdict": "not measured", "reason": "No probing stage in this version."}
    across = [absorption[grid].verdict(-1) for grid in grids]
    result = {
        "C1": {
            "verdict": across[0],
            "score": "mean full absorption",
            "grid": grids[0],
            **absorption[grids[0]].to_dict(),
            "dense_absorbers": dense_absorbers(scores, grids[0]),
        },
        "C2": not_measured,
        "C3": {"verdict": "not measured", "reason": "No out-of-distribution stage in this version."},
        "C4": {
            "verdict": combine(across) if len(grids) > 1 else "not measured",
            "score": "mean full absorption only",
            "grids": dict(zip(grids, across)),
        },
        "C5": {
            "verdict": variance.verdict(-1),
            "score": "explained variance (centred)",
            "grid": grids[0],
            **variance.to_dict(),
        },
    }
    return {key: {"claim": CLAIMS[key], **value} for key, value in result.items()}


def dense_absorbers(scores: pd.DataFrame, grid: str) -> dict[str, float | None]:
    """Per arm, the mean share of absorbed words that are credited to a latent of no particular word; None if none is absorbed."""
    means = scores[scores["grid"] == grid].groupby("arm", sort=False)["dense_absorbers"].mean()
    return {arm: None if pd.isna(mean) else mean for arm, mean in means.items()}


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(str(v) for v in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def show(rows, columns: list[str] | None = None):
    """A table for a notebook: chosen columns, numbers to four digits, no index."""
    from IPython.display import HTML

    table = pd.DataFrame(rows)[columns] if columns else pd.DataFrame(rows)
    return HTML(table.to_html(index=False, float_format="{:.4g}".format, na_rep="", border=0))


def save_table(path, table: pd.DataFrame, note: str):
    """Write a table as markdown with a note below it; returns it for display."""
    write_text(Path(path), to_markdown(table) + f"\n{note}\n")
    return show(table)


def norm_table(rows: list[dict]) -> list[dict]:
    """Median and largest norm by arm and by whether the position is masked."""
    grouped = pd.DataFrame(rows).groupby(["arm", "masked"], sort=False)["norm"]
    return grouped.agg(positions="size", median="median", largest="max").reset_index().to_dict("records")
