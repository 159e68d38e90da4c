"""At which threshold an SAE is scored: as trained (its own), and at matched sparsity (clean L0 exactly k).

Every SAE of every arm is scored on the same clean held-out text, with the same prompts and probes, in both modes.
Masking moves the threshold, so only the second compares arms at equal sparsity; TopK has none to move, and the two are
one.
"""

from collections.abc import Callable

from masksae.metrics.reconstruction import calibrated_threshold
from masksae.parallel import in_threads
from masksae.saes.sae import SAE
from masksae.study.store import Subject


def thresholds(run: Subject) -> dict[str, dict[str, float | None]]:
    """Inference thresholds of every SAE in each mode; TopK needs none, it keeps k latents of every token anyway. One
    without a k (somebody's own that is silent) has no matched mode."""
    rows = run.rows("thresholds", run.profile.text, _thresholds)
    return {row["sae"]: {mode: row[mode] for mode in ("as_trained", "matched") if mode in row} for row in rows}


def _thresholds(run: Subject) -> list[dict]:
    saes, ks = run.load_saes(), {row["sae"]: row["k"] for row in run.table}
    names = [name for name, k in ks.items() if k]
    matched = dict(
        zip(names, in_threads(lambda name: matched_threshold(run, saes[name], ks[name]), names, label="thresholds"))
    )
    rows = []
    for name in ks:
        free = matched.get(name, ...) is not None  # TopK's threshold decides nothing
        modes = {"as_trained": saes[name].threshold.item() if free else None}
        rows.append({"sae": name} | modes | ({"matched": matched[name]} if name in matched else {}))
    return rows


def matched_threshold(run: Subject, sae: SAE, k: float) -> float | None:
    """The threshold at which clean L0 is k; None for TopK, which keeps k latents of every token anyway."""
    return None if sae.config.selection.keeps_k_per_token else calibrated_threshold(sae, run.held_out, k)


def cells(run: Subject) -> list[tuple[str, float | None]]:
    """What is scored, by name and threshold: every SAE in every mode; where both modes are one threshold, once."""
    at = thresholds(run)
    return [(row["sae"], threshold) for row in run.table for threshold in dict.fromkeys(at[row["sae"]].values())]


def by_mode(run: Subject, scores: dict[tuple[str, float | None], dict]) -> list[dict]:
    """One row per SAE and mode with its scores."""
    at = thresholds(run)
    return [
        row | {"mode": mode, "threshold": threshold} | scores[row["sae"], threshold]
        for row in run.table
        for mode, threshold in at[row["sae"]].items()
    ]


def score_saes(run: Subject, label: str, score: Callable[[SAE, float | None], dict]) -> list[dict]:
    """One row per SAE and mode with the scores that `score(sae, threshold)` gives."""
    saes, wanted = run.load_saes(), cells(run)
    scores = in_threads(lambda cell: score(saes[cell[0]], cell[1]), wanted, label=label, unit="score")
    return by_mode(run, dict(zip(wanted, scores)))
