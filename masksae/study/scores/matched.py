"""At which threshold an SAE is scored: as trained (its own), and at matched sparsity (clean L0 exactly k).

Every SAE of every arm is scored on the same clean held-out text, with the same prompts and probes, in both modes.
Masking moves the threshold, so only the second compares arms at equal sparsity; TopK has none to move, and the two are
one.
"""

from collections.abc import Callable

from masksae.metrics.reconstruction import calibrated_threshold
from masksae.parallel import in_threads
from masksae.saes.sae import SAE
from masksae.study.inputs import Scored


def thresholds(run: Scored) -> dict[str, dict[str, float | None]]:
    """Inference thresholds of every SAE in each mode; TopK needs none, it keeps k latents of every token anyway."""

    def make() -> dict:
        saes, ks = run.load_saes(), {row["sae"]: row["k"] for row in run.table}
        matched = in_threads(lambda name: matched_threshold(run, saes[name], ks[name]), ks, label="thresholds")
        return {
            name: {"as_trained": None if t is None else saes[name].threshold.item(), "matched": t}
            for name, t in zip(ks, matched)
        }

    return run.rows("thresholds", run.profile.text, make)


def matched_threshold(run: Scored, sae: SAE, k: float) -> float | None:
    """The threshold at which clean L0 is k; None for TopK, which keeps k latents of every token anyway."""
    return None if sae.config.selection.keeps_k_per_token else calibrated_threshold(sae, run.held_out, k)


def cells(run: Scored) -> list[tuple[str, float | None]]:
    """What is scored, by name and threshold: every SAE in every mode; where both modes are one threshold, once."""
    at = thresholds(run)
    return [(row["sae"], threshold) for row in run.table for threshold in dict.fromkeys(at[row["sae"]].values())]


def by_mode(run: Scored, scores: dict[tuple[str, float | None], dict]) -> list[dict]:
    """One row per SAE and mode with its scores."""
    return [
        row | {"mode": mode, "threshold": threshold} | scores[row["sae"], threshold]
        for row in run.table
        for mode, threshold in thresholds(run)[row["sae"]].items()
    ]


def score_saes(run: Scored, label: str, score: Callable[[SAE, float | None], dict]) -> list[dict]:
    """One row per SAE and mode with the scores that `score(sae, threshold)` gives."""
    saes, wanted = run.load_saes(), cells(run)
    scores = in_threads(lambda cell: score(saes[cell[0]], cell[1]), wanted, label=label, unit="score")
    return by_mode(run, dict(zip(wanted, scores)))
