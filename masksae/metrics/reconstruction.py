"""How well an SAE rebuilds activations: explained variance, L0, CE score, dead latents.

"Explained variance" has several definitions in the field, and a number without its definition says little. With S = sum |x|^2,
m = mean x, R = sum |x - x_hat|^2 over all tokens:

    centred     1 - R / sum |x - m|^2             the textbook one, r2_score of scikit-learn; the default
    per_token   mean of 1 - |x - x_hat|^2 / |x - m|^2     SAEBench's `explained_variance_legacy`, with the mean of all tokens
    uncentred   1 - R / S                         in effect SAEBench 0.6.0's `explained_variance`; the most flattering

All sums are in float64.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from masksae.errors import ConfigError, DataError, nearest
from masksae.saes.sae import SAE

KINDS = ("centred", "per_token", "uncentred")
CHUNK = 4096
"""Tokens that are encoded at a time."""


def explained_variance(x: Tensor, x_hat: Tensor, kind: str = "centred") -> float:
    """Share of the variance of x [..., d] that x_hat explains: 1 is perfect, 0 no better than the mean (or than zero, if
    "uncentred"). Raises ConfigError for another kind, DataError for shapes that differ or for activations that do not vary.

    >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    >>> [round(explained_variance(x, x + 1, kind), 4) for kind in ("centred", "uncentred")]
    [0.25, 0.8286]
    """
    if kind not in KINDS:
        raise ConfigError(f"explained variance has no kind {kind!r}.{nearest(kind, KINDS)}")
    if x.shape != x_hat.shape:
        raise DataError(f"x has shape {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}; they must be the same.")
    x, x_hat = (t.detach().reshape(-1, t.shape[-1]).double() for t in (x, x_hat))
    return _explained(x, (x - x_hat).square().sum(1), kind)


def _explained(x: Tensor, error: Tensor, kind: str) -> float:
    """Explained variance from x float64 [n, d] and the squared errors [n]."""
    spread = (x if kind == "uncentred" else x - x.mean(0)).square().sum(1)
    if not spread.sum() > 0:
        raise DataError(
            "The activations do not vary, so no share of their variance can be explained. Give other tokens."
        )
    return (1 - (error / spread).mean() if kind == "per_token" else 1 - error.sum() / spread.sum()).item()


@dataclass(frozen=True)
class Reconstruction:
    """Scores on a set of tokens."""

    ev_centred: float
    ev_per_token: float
    ev_uncentred: float
    cosine: float
    """Mean cosine of x and x_hat."""
    l2_ratio: float
    """Mean of |x_hat| / |x|."""
    relative_bias: float
    """sum |x_hat|^2 / sum x . x_hat; below 1: shrinkage."""
    l0: float
    """Mean number of active latents per token."""
    dead_latents: int
    """Latents that are active on none of these tokens. Depends on how many tokens there are."""
    tokens: int

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def reconstruction(sae: SAE, x: Tensor, *, threshold: float | None = None) -> Reconstruction:
    """Score an SAE on activations x [n, d]; `threshold` takes the place of the SAE's own."""
    x_hat = torch.empty_like(x)
    active = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    for low in range(0, len(x), CHUNK):
        f = sae.encode(x[low : low + CHUNK].to(sae.device), threshold)
        x_hat[low : low + CHUNK] = sae.decode(f).to(x)
        active += (f > 0).sum(0).cpu()
    a, b = x.double(), x_hat.double()
    dot, norm_a, norm_b, error = (a * b).sum(1), a.norm(dim=1), b.norm(dim=1), (a - b).square().sum(1)
    return Reconstruction(
        **{f"ev_{kind}": _explained(a, error, kind) for kind in KINDS},
        cosine=(dot / (norm_a * norm_b)).mean().item(),
        l2_ratio=(norm_b / norm_a).mean().item(),
        relative_bias=(norm_b.square().sum() / dot.sum()).item(),
        l0=active.sum().item() / len(x),
        dead_latents=int((active == 0).sum()),
        tokens=len(x),
    )


@torch.no_grad()
def calibrated_threshold(sae: SAE, x: Tensor, k: float) -> float:
    """The threshold at which L0 on x [n, d] is k: round(k n) margins (`SAE.margins`) lie above it, exactly (ties apart).

    It is the next largest margin of a latent that can be active, or the lowest threshold that means anything if there is no such;
    then L0 is as high as this SAE can reach. Needs memory for 2 k n numbers, not for F n.
    """
    wanted = round(k * len(x)) + 1
    best, bound = torch.empty(0), -torch.inf
    for part in x.split(CHUNK):
        pre = sae.pre_activations(part.to(sae.device))
        margins = sae.margins(pre)
        best = torch.cat([best, margins[(margins > bound) & (sae.magnitudes(pre) > 0)].cpu()])
        if len(best) >= 2 * wanted:
            best = best.topk(wanted, sorted=False).values
            bound = best.min().item()
    if len(best) < wanted:
        return sae.margins(torch.zeros_like(pre[:1])).min().item()
    return best.topk(wanted, sorted=False).values.min().item()


def ce_score(original: float, zero: float, sae: float) -> float:
    """Share of the language model's loss that an SAE recovers, from three mean cross-entropies in nats: with the activations as
    they are, with zeros, with reconstructions in their place. 1: nothing lost; 0: no better than zeros. Raises DataError.

    >>> ce_score(original=3.0, zero=11.0, sae=4.0)
    0.875
    """
    if not zero > original:
        raise DataError(
            f"Zeros in place of the activations give a loss of {zero}, not above the original {original}. Look at the hook point."
        )
    return (zero - sae) / (zero - original)
