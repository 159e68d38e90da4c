"""How much of what an SAE says about a token changes when another token of the text is replaced.

    jaccard      |A & A'| / |A | A'| of the sets of active latents; 1 if both are empty
    top_jaccard  the same of the `top` largest latents of each
    x            |x' - x| / |x - m|            what happened to the activation itself
    recon        |x_hat' - x_hat| / |x - m|    and to its reconstruction
    code         |f' - f| / |x - m|            and to its latents, each times the norm of its decoder row

with m the mean of the clean activations. All three changes have one unit, which no SAE sets: `recon` and `code` may be
read beside `x`, and an SAE that rebuilds less is not made to look more restless by a smaller divisor. Nor is an SAE
that hardly says anything made to look worse: one that ignores its input has overlap 1 and changes 0, so explained
variance belongs beside these scores.

After Li et al. (EACL 2026, 2026.eacl-long.279), who count the share of the clean active latents that stay active at
the last token. Two sets of one size with Jaccard index J share 2 J / (1 + J) of their members, which is that share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.errors import ConfigError, DataError
from masksae.metrics.reconstruction import CHUNK
from masksae.saes.sae import SAE, alike, at_least_single


@dataclass(frozen=True)
class Robustness:
    """Scores row by row: float32 [n] each; the changes float64 [n] if SAE or activations are."""

    jaccard: Tensor
    """Overlap of the active latents, 0 to 1."""
    top_jaccard: Tensor
    """Overlap of the largest latents, 0 to 1."""
    recon: Tensor
    """Change of the reconstruction, 0 or more."""
    code: Tensor
    """Change of the latents, 0 or more."""
    x: Tensor
    """Change of the activation, 0 or more; the same for every SAE."""


@torch.no_grad()
def robustness(sae: SAE, clean: Tensor, changed: Tensor, *, top: int = 5, threshold: float | None = None) -> Robustness:
    """Compare what an SAE makes of clean and of changed activations [n, d], row by row.

    top        how many of a row's largest latents `top_jaccard` compares; inactive ones never count
    threshold  takes the place of the SAE's own

    Raises ConfigError for a `top` that is no positive number, DataError for activations that are not two of one shape,
    not finite, or whose clean rows include the mean of them all (there nothing can be relative).

    >>> from masksae import SAEConfig, TopK
    >>> sae, x = SAE(SAEConfig(4, 16, TopK(2))), torch.eye(4)
    >>> scores = robustness(sae, x, x)
    >>> scores.jaccard.tolist(), scores.recon.tolist()
    ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ConfigError(f"top is the number of latents to compare, found {top!r}; expected 1 or more.")
    unit = _distance_from_mean(clean, changed)
    norms = at_least_single(sae.W_dec).norm(dim=1)
    parts = []
    for x, x_changed in zip(clean.split(CHUNK), changed.split(CHUNK)):
        f, f_changed = (at_least_single(sae.encode(each.to(sae.device), threshold)) for each in (x, x_changed))
        weighted, weighted_changed = f * norms, f_changed * norms
        parts.append(
            (
                jaccard(f > 0, f_changed > 0),
                jaccard(_largest(weighted, top), _largest(weighted_changed, top)),
                ((f_changed - f) @ at_least_single(sae.W_dec)).norm(dim=1),  # the bias of the decoder cancels
                (weighted_changed - weighted).norm(dim=1),
            )
        )
    overlap, top_overlap, recon, code = (torch.cat(values).to(unit.device) for values in zip(*parts))
    x, x_changed = alike(clean, changed)
    return Robustness(overlap, top_overlap, recon / unit, code / unit, (x_changed - x).norm(dim=1) / unit)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of sets given as bool [n, m], row by row: [n]; two empty sets are the same.

    >>> jaccard(torch.tensor([[True, True, False], [False] * 3]), torch.tensor([[False, True, True], [False] * 3]))
    tensor([0.3333, 1.0000])
    """
    common, either = (a & b).sum(1), (a | b).sum(1)
    return torch.where(either > 0, common.float() / either.clamp(min=1), 1.0)


def _largest(f: Tensor, top: int) -> Tensor:
    """Which latents [n, F] are active and among the `top` largest of their row: bool [n, F]."""
    values, latents = f.topk(min(top, f.shape[1]), dim=1)
    return torch.zeros_like(f, dtype=torch.bool).scatter_(1, latents, values > 0)


def _distance_from_mean(clean: Tensor, changed: Tensor) -> Tensor:
    """|x - m| of each clean row: [n]. Raises DataError."""
    if clean.ndim != 2 or clean.shape != changed.shape or not len(clean):
        raise DataError(
            f"Clean and changed activations must both be [n, d] with n > 0, found {tuple(clean.shape)} and "
            f"{tuple(changed.shape)}. Take them at the same positions."
        )
    x, x_changed = alike(clean, changed)
    if not (torch.isfinite(x).all() and torch.isfinite(x_changed).all()):
        raise DataError("The activations hold NaN or infinity. Look at the model or at the stage that made them.")
    distance = (x - x.double().mean(0).to(x.dtype)).norm(dim=1)
    if not (distance > 0).all():
        raise DataError(
            f"{int((distance == 0).sum())} of {len(x)} clean activations are the mean of them all, so no change of "
            "theirs is relative to anything. Give activations that vary."
        )
    return distance
