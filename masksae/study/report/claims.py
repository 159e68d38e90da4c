"""The paper's claims C1 to C5 and the verdicts on them, from the merged scores of a run
(`masksae.study.report.effects.merge`)."""

import pandas as pd

from masksae.study import stats
from masksae.study.report.effects import change, effect, first_column

CLAIMS = {
    "C1": "Masking reduces feature absorption",
    "C2": "Masking improves probing",
    "C3": "Masking narrows the out-of-distribution gap",
    "C4": "C1 to C3 hold across architectures and sparsity levels",
    "C5": "Explained variance falls slightly",
}


def caption(scores: pd.DataFrame, grid: str, arm: str) -> str:
    """What an arm changes in one grid, as a sentence for a caption."""
    named = {"absorption of first letters": "mean_full", "explained variance": "ev_centred"}
    changes = [f"{name} {change(effect(scores, column, grid, arm))}" for name, column in named.items()]
    return f"{grid}, {arm}: {', '.join(changes)}."


def decided_by(scores: pd.DataFrame) -> dict[str, tuple[str, str, int]]:
    """Claim -> (column that decides it, its name, direction that supports it), for the claims that this run
    measured."""
    probing, gap = first_column(scores, "probing_auc_"), first_column(scores, "ood_gap_")
    deciding = {"C1": ("mean_full", "mean full absorption", -1)}
    if probing:
        deciding["C2"] = (probing, f"mean AUC of probes on {probing.split('_')[-1]} latents", +1)
    if gap:
        k = gap.split("_")[-1]
        name = f"mean AUC of raw probes less that of probes on {k} latents, under a shift"
        deciding["C3"] = (gap, name, -1)
    return deciding | {"C5": ("ev_centred", "explained variance (centred)", -1)}


def claims(scores: pd.DataFrame, arm: str) -> dict:
    """The verdicts, keyed C1 to C5. Decided at matched clean L0, each on the first grid, C4 by C1 to C3 on all grids.

    Each verdict has its own 5 %. `p_holm` is the p-value of its t test that holds for all of them at once.
    `pairs_needed`: pairs that would settle an inconclusive one four times out of five, were the true effect the one
    found. C1 is about first letters, which the paper measures; `cross_token` is the same for parents that another token
    sets.
    """
    grids, deciding = list(dict.fromkeys(scores["grid"])), decided_by(scores)
    verdicts = {}
    for key, (column, name, direction) in deciding.items():
        paired = effect(scores, column, grids[0], arm)
        verdicts[key] = {"verdict": paired.verdict(direction), "score": name, "grid": grids[0], **paired.to_dict()}
        if verdicts[key]["verdict"] == "inconclusive" and paired.size:
            verdicts[key]["pairs_needed"] = stats.pairs_needed(paired.size)
    adjusted = stats.holm({key: value["p_value"] for key, value in verdicts.items() if value["p_value"] is not None})
    for key, value in verdicts.items():
        value["p_holm"] = adjusted.get(key)
    verdicts["C1"]["dense_absorbers"] = dense_absorbers(scores, grids[0])
    if "context_full" in scores:
        cross = effect(scores, "context_full", grids[0], arm)
        verdicts["C1"]["cross_token"] = {"verdict": cross.verdict(-1), **cross.to_dict()}
    for key in ("C2", "C3"):
        verdicts.setdefault(key, {"verdict": "not measured", "reason": "No result of this profile speaks to it."})
    verdicts["C4"] = _everywhere(scores, grids, arm, deciding)
    return {key: {"claim": claim, **verdicts[key]} for key, claim in CLAIMS.items()}


def _everywhere(scores: pd.DataFrame, grids: list[str], arm: str, deciding: dict[str, tuple[str, str, int]]) -> dict:
    """C4: C1 to C3 in every grid."""
    cells = {grid: {} for grid in grids}
    for grid, cell in cells.items():
        for key in ("C1", "C2", "C3"):
            if key in deciding:
                column, _, direction = deciding[key]
                cell[key] = effect(scores, column, grid, arm).verdict(direction)
    verdicts = [verdict for cell in cells.values() for verdict in cell.values()]
    return {"verdict": stats.combine(verdicts) if len(grids) > 1 else "not measured", "grids": cells}


def dense_absorbers(scores: pd.DataFrame, grid: str) -> dict[str, float | None]:
    """Per arm, the mean share of absorbed words that are credited to a latent of no particular word; None if none is
    absorbed."""
    means = scores[scores["grid"] == grid].groupby("arm", sort=False)["dense_absorbers"].mean()
    return {arm: None if pd.isna(mean) else mean for arm, mean in means.items()}
