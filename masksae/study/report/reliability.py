"""Which metric can be trusted here: how much the seed moves each score, against what it should see. `masksae
reliability`.

Reads the results of a profile and prints the table of docs/metrics.md. For each score, on the unmasked SAEs of the
first grid at matched clean L0: the standard deviation between seeds; the smallest true difference of the arms that so
many pairs find with probability .8; and, as a signal of known size, how far the score moves when every token gets more
latents (the same SAEs at the largest L0), in standard deviations. What is seen is seen by the rule that decides, other
tasks and parents included.
"""

import pandas as pd

from masksae.files import read_json, repository
from masksae.study.profile import load_profile
from masksae.study.report import labels
from masksae.study.report.effects import baseline_arm, effect, merge
from masksae.study.report.tables import cells, number, to_markdown

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
    """A row per score, of the SAEs of the first grid; `signal` is None where none of another L0 and the same
    architecture were scored."""
    profile, rows = load_profile(profile), []
    folder, arm = repository() / "results" / profile.name, profile.treated_arm.name
    for key in SHOWN:
        scores = merge(read_json(folder / f"{labels.score(key).result}.json"))
        if key not in scores:
            continue
        baseline, grid = baseline_arm(scores), scores["grid"].iloc[0]
        unmasked = scores[scores["arm"] == baseline].pivot(index="seed", columns="grid", values=key)
        spread = unmasked[grid].std()
        same = scores[scores["architecture"] == scores["architecture"].iloc[0]]
        other = same.loc[same["k"].idxmax(), "grid"]
        moved = (unmasked[other] - unmasked[grid]).mean()  # of the seeds that have both
        found = effect(scores, key, grid, arm)
        rows.append(
            {
                "score": labels.words(key),
                "unmasked": unmasked[grid].mean(),
                "between seeds": spread,
                "arms differ by": found.difference,
                "seen from": found.detectable,
                "signal": moved / spread if other != grid else None,
            }
        )
    return pd.DataFrame(rows)


def _signal(value: float) -> str:
    return "–" if pd.isna(value) else f"{round(value):+d} SD".replace("+0", "0")


def page_table(table: pd.DataFrame) -> str:
    """The table as it stands in docs/metrics.md."""
    columns = {
        "score": ("score", str),
        "mean, unmasked": ("unmasked", number),
        "SD between seeds": ("between seeds", "{:.4f}".format),
        "masked minus unmasked": ("arms differ by", "{:+.3f}".format),
        "smallest difference seen": ("seen from", number),
        "more latents move it by": ("signal", _signal),
    }
    return to_markdown(cells(pd.DataFrame({title: table[name].map(form) for title, (name, form) in columns.items()})))


def in_words(table: pd.DataFrame) -> str:
    """What the spread between seeds makes of differences that papers report, a sentence; of the scores that are
    there."""
    spread = dict(zip(table["score"], table["between seeds"]))
    asked = {"ev_centred": 0.01, "mean_full": 0.02, "ood_auc_16": 0.02}
    seen = {labels.words(key): size for key, size in asked.items() if labels.words(key) in spread}
    told = [f"{size:.2f} of {score} is {size / spread[score]:.1f}" for score, size in seen.items()]
    return f"In standard deviations between seeds, a difference of {', '.join(told)}."
