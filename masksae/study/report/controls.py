"""Which scores tell a trained SAE from its controls (`masksae.study.scores.controls`), in numbers and in words."""

from statistics import fmean

from masksae.study.report.labels import measured, words
from masksae.study.report.tables import number
from masksae.study.scores.controls import CONTROLS

BETTER = {
    "ev_centred": 1, "mean_full": -1, "mean_specific": -1, "main_f1": 1, "main_recall": 1,
    "context_full": -1, "context_specific": -1, "context_main_f1": 1, "context_main_recall": 1,
    "probing_auc_": 1, "tpp_": 1,
}  # fmt: skip
"""Scores that are compared, by key: 1 if more is better, -1 if less is."""

TASKS = {"a letter": ("mean_full", "main_f1"), "a context": ("context_full", "context_main_f1")}
"""The two tasks of absorption: full absorption, and F1 of the main latents."""


def better(rows: list[dict]) -> dict[str, int]:
    """`BETTER` for the keys that all rows have; of several numbers of latents the largest."""
    shared = set.intersection(*(set(row) for row in rows)) if rows else set()
    found = ((measured(key, shared), sign) for key, sign in BETTER.items())
    return {keys[-1]: sign for keys, sign in found if keys}


def by_control(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Control -> pair -> row at matched clean L0, which is how an SAE and its controls are compared; controls in their
    order, without those that no row is of."""
    found = {kind: {r["seed"]: r for r in rows if (r["control"], r["mode"]) == (kind, "matched")} for kind in CONTROLS}
    return {kind: pairs for kind, pairs in found.items() if pairs}


def control_table(rows: list[dict]) -> list[dict]:
    """One row per score: its mean over pairs for the trained SAEs and for each control, and in how many of the pairs
    the trained SAE scores better than the control; "the same" where no pair differs. Rows of `control_scores`."""
    pairs, table = by_control(rows), []
    for key, sign in better(rows).items():
        line = {"score": words(key), "better is": "more" if sign > 0 else "less"}
        for kind, mine in pairs.items():
            line[CONTROLS[kind]] = number(fmean(row[key] for row in mine.values()))
            both = [(pairs["trained"][pair][key], row[key]) for pair, row in mine.items() if pair in pairs["trained"]]
            if kind != "trained" and both:
                wins = sum(sign * trained > sign * control for trained, control in both)
                same = all(trained == control for trained, control in both)
                line[CONTROLS[kind]] += " (the same)" if same else f" ({wins} of {len(both)})"
        table.append(line)
    return table


def control_words(rows: list[dict]) -> list[str]:
    """What the controls say of full absorption, a sentence for each task and control. Rows of `control_scores`."""
    pairs, told = by_control(rows), []
    for task, (full, f1) in TASKS.items() if {"trained", "random", "permuted"} <= pairs.keys() else ():
        mean = {k: [fmean(row[key] for row in mine.values()) for key in (full, f1)] for k, mine in pairs.items()}
        (trained, trained_f1), (random, random_f1) = mean["trained"], mean["random"]
        verdict = "not lower" if random >= trained else "lower"
        told.append(
            f"For {task}, an SAE with random weights scores {random:.3f} on full absorption, {verdict} than the "
            f"trained SAEs' {trained:.3f}; the F1 of its main latents is {random_f1:.2f}, of theirs {trained_f1:.2f}."
        )
        told.append(
            f"With the decoder's rows permuted, {mean['permuted'][0]:.3f}: so much is credited to directions drawn by "
            f"lot where the main latents of {task} are silent."
        )
        if "frozen" in mean:
            told.append(
                "With a decoder that stayed where it began, {:.3f}, at an F1 of {:.2f}".format(*mean["frozen"])
                + f" ({len(pairs['frozen'])} pairs)."
            )
    return told
