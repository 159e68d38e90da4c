"""Which scores tell a trained SAE from its controls (`masksae.study.scores.controls`), in numbers and in words."""

from statistics import fmean

from masksae.study.report.labels import measured, words
from masksae.study.scores.controls import CONTROLS

BETTER = {
    "ev_centred": 1, "mean_full": -1, "mean_specific": -1, "main_f1": 1, "main_recall": 1,
    "context_full": -1, "context_specific": -1, "context_main_f1": 1, "context_main_recall": 1,
    "probing_auc_": 1, "tpp_": 1,
}  # fmt: skip
"""Scores that are compared, by key: 1 if more is better, -1 if less is."""


def better(rows: list[dict]) -> dict[str, int]:
    """`BETTER` for the keys that some rows have; of several numbers of latents the first."""
    found = ((measured(key, rows[0]), sign) for key, sign in BETTER.items()) if rows else ()
    return {keys[0]: sign for keys, sign in found if keys}


def at_matched(rows: list[dict]) -> list[dict]:
    """The rows at matched clean L0, which is how an SAE and its controls are compared."""
    return [row for row in rows if row["mode"] == "matched"]


def control_table(rows: list[dict]) -> list[dict]:
    """One row per control: the mean of each score over pairs, at matched clean L0. Rows of `control_scores`."""
    table = []
    for kind, name in CONTROLS.items():
        if part := [row for row in at_matched(rows) if row["control"] == kind]:
            means = {words(key): fmean(row[key] for row in part) for key in better(part)}
            table.append({"SAE": name, "pairs": len(part)} | means)
    return table


def control_words(rows: list[dict]) -> list[str]:
    """For each control a sentence: which scores rate the trained SAE better in every pair, in some, in none; and what
    that says of full absorption of first letters. Rows of `control_scores`."""
    matched, told = at_matched(rows), []
    trained = {row["seed"]: row for row in matched if row["control"] == "trained"}
    for kind, name in CONTROLS.items():
        pairs = [(trained[r["seed"]], r) for r in matched if r["control"] == kind != "trained" and r["seed"] in trained]
        if not pairs:
            continue
        verdict: dict[str, list[str]] = {"every pair": [], "some pairs": [], "no pair": []}
        for key, sign in better([row for row, _ in pairs]).items():
            wins = sum(sign * row[key] > sign * other[key] for row, other in pairs)
            verdict["no pair" if wins == 0 else "every pair" if wins == len(pairs) else "some pairs"].append(words(key))
        found = "; ".join(f"in {where}: {', '.join(keys)}" for where, keys in verdict.items() if keys)
        told.append(f"Against {name}, the trained SAE scores better {found}.")
    return told + [_meaning(matched)] if told else []


def _meaning(matched: list[dict]) -> str:
    """What random weights say of full absorption of first letters."""
    mean = {
        kind: {key: fmean(row[key] for row in matched if row["control"] == kind) for key in ("mean_full", "main_f1")}
        for kind in ("trained", "random")
    }
    full, f1 = ([mean[kind][key] for kind in ("random", "trained")] for key in ("mean_full", "main_f1"))
    first = (
        f"Random weights absorb {full[0]:.3f} of the words of a letter by this score, the trained SAEs {full[1]:.3f}"
    )
    second = f"their main latents tell a letter with F1 {f1[0]:.2f}, the trained ones' with {f1[1]:.2f}"
    if full[0] >= full[1]:
        return (
            f"{first}; {second}. An SAE without any latent for a letter scores no better than one that absorbs it: the "
            "score says that a letter's latent is missing where it is needed, and only F1 beside it says whether there "
            "was one."
        )
    return f"{first}; {second}. Random weights have learned no letter, so a score this low is no sign of one either."
