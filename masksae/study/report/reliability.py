"""Which metric can be trusted here: how much the seed moves each score, against what it should see. `masksae
reliability`.

Reads the results of a profile and prints the table of docs/metrics.md. For each score, on the unmasked SAEs of the
first grid at matched clean L0: the standard deviation between seeds; the smallest true difference of the arms that so
many pairs find with probability .8; and, as a signal of known size, how far the score moves when every token gets more
latents (the same SAEs at the largest L0), in standard deviations.
"""

from statistics import mean, stdev

import pandas as pd

from masksae.files import read_json, repository
from masksae.study.profile import load_profile
from masksae.study.report import labels
from masksae.study.report.tables import cells, number, to_markdown
from masksae.study.stats import paired_effect

SHOWN = (
    "ev_centred",
    "ce_score",
    "mean_full",
    "context_full",
    "probing_auc_1",
    "probing_auc_16",
    "ood_auc_16",
    "tpp_10",
)
"""Scores of the table, in its order."""


def reliability(profile="laptop") -> pd.DataFrame:
    """A row per score; `signal` is None where no SAEs of another L0 and the same architecture were scored."""
    folder, grids = repository() / "results" / load_profile(profile).name, load_profile(profile).grids
    [first, *others] = [grid.name for grid in grids if grid.architecture == grids[0].architecture]
    rows = []
    for key in SHOWN:
        scores = [r for r in read_json(folder / f"{labels.score(key).result}.json") if r["mode"] == "matched"]
        if key not in scores[0]:
            continue
        unmasked, masked = _by_seed(scores, key, "unmasked", first), _by_seed(scores, key, "masked", first)
        spread, other = stdev(unmasked), _by_seed(scores, key, "unmasked", others[-1]) if others else []
        rows.append(
            {
                "score": labels.words(key),
                "unmasked": mean(unmasked),
                "between seeds": spread,
                "arms differ by": mean(masked) - mean(unmasked),
                "seen from": paired_effect(unmasked, masked).detectable,
                "signal": (mean(other) - mean(unmasked)) / spread if other else None,
            }
        )
    return pd.DataFrame(rows)


def _by_seed(scores: list[dict], key: str, arm: str, grid: str) -> list[float]:
    """A score of the SAEs of one arm and grid, in the order of their seeds."""
    mine = [row for row in scores if (row["arm"], row["grid"]) == (arm, grid)]
    return [row[key] for row in sorted(mine, key=lambda row: row["seed"])]


def _signal(value: float) -> str:
    return "–" if pd.isna(value) else f"{round(value):+d} SD".replace("+0", "0")


def page_table(table: pd.DataFrame) -> str:
    """The table as it stands in docs/metrics.md."""
    columns = {
        "score": ("score", str),
        "mean, unmasked": ("unmasked", number),
        "SD between seeds": ("between seeds", "{:.4f}".format),
        "masked less unmasked": ("arms differ by", "{:+.3f}".format),
        "smallest difference seen": ("seen from", number),
        "more latents move it by": ("signal", _signal),
    }
    return to_markdown(cells(pd.DataFrame({title: table[name].map(form) for title, (name, form) in columns.items()})))
