"""Penalties on SAEs with similar latents: rivals of masking, each a small frozen config in `SAEConfig.penalties`.

A penalty is a frozen dataclass under `Penalty`, here or in anybody's module; once it is defined, configs and saved SAEs
know it by its class's name. All that it must have besides a weight is `value`: a scalar of the decoder and of the L2
norm that each latent's activations have over the batch, with autograd. That is enough for the dense step and for the
sparse one, which turns a gradient of the norms into one of the active entries (f / |f| times it). The penalties here do
not look at prefix groups, so a row's neighbour may lie in another one, nor are they scaled by `prefix_weighting` (the
code of C2R weighs prefixes by "mean"). A cosine sees directions only: for rows of norm 1 the gradient has no radial
part to project away. With `drop_masked` the batch, and with it |f|, holds ordinary positions only. The loss in
`SAE.history` has them on the steps that apply them.

What costs is the search for each row's nearest other: a cosine for each of F^2 / 2 pairs, in blocks; then only F pairs
are differentiated. `every` spreads it out (`benchmarks/train.py --penalties`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.errors import ConfigError
from masksae.saes.fields import check_positive, keep_whole, register

PENALTIES: dict[str, type["Penalty"]] = {}
"""Every penalty that is defined, by the name of its class."""

BLOCK = 256
"""Rows that are compared with all others at once: small enough for a cache, large enough for a product."""

REFERENCE_BATCH = 2048
"""Tokens to which the norms of activations are scaled in C2R, those of its publication."""


@dataclass(frozen=True)
class Penalty:
    """Base of the penalties."""

    weight: float
    """Mean weight per step in the loss."""
    every: int
    """Applied on steps 0, every, 2 every, ..., each time at `every` times the weight, as the code of arXiv 2606.30609
    does it: a rarer penalty is cheaper, and weaker only where gradients are clipped (`TrainConfig.clip`)."""

    def __init_subclass__(cls, base: bool = False, **options):
        """Makes a penalty known; `base`: it is what penalties have in common, and none itself."""
        super().__init_subclass__(**options)
        if not base:
            register(PENALTIES, cls, "penalty")

    def __post_init__(self):
        check_positive(self, "weight")
        keep_whole(self, "every")

    def check(self, config) -> None:
        """Raise ConfigError for an SAE that cannot be trained with it."""

    def fixed(self, config) -> bool:
        """Whether `value` is the same work at every step that applies it, none of it on the host: a GPU may then repeat
        what it recorded once."""
        return False

    def value(self, sae, norms: Tensor, step: int, batch: int) -> Tensor:
        """Scalar, the weight left out, with autograd from `sae.W_dec` and norms [F], those of f over a batch of so many
        tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class OfNearest(Penalty, base=True):
    """What looks at each decoder row's nearest other. The choice of that one is not differentiated; the cosine is, for
    both rows."""

    every: int = 5
    """As of `Penalty`; 5 as in that code, which trains with either penalty."""
    chunk: int = 8192
    """Most rows that are compared with each other: more are shuffled into chunks of equal size, anew each time, by the
    SAE's seed and the step. 3 at least, so that no row is alone."""

    def __post_init__(self):
        super().__post_init__()
        keep_whole(self, "chunk", least=3)

    def check(self, config):
        if config.n_latents < 2:
            raise ConfigError(f"{type(self).__name__} compares latents, found n_latents = 1. Leave the penalty out.")

    def fixed(self, config):
        return config.n_latents <= self.chunk  # chunks are drawn on the host

    def cosines(self, sae, step: int) -> tuple[Tensor, Tensor]:
        """(max(0, cosine) of each row and its nearest other [F], which one that is [F])."""
        rows, norm = sae.W_dec, sae.W_dec.norm(dim=1).clamp(min=1e-12)
        unit = rows.detach() * (1 / norm.detach())[:, None]  # dividing all of it takes longer
        nearest = nearest_rows(unit, self.chunk, sae.config.seed, step)
        return ((rows * rows[nearest]).sum(1) / (norm * norm[nearest])).clamp(min=0), nearest


@dataclass(frozen=True)
class OrtSAE(OfNearest):
    """Decoder rows keep away from their nearest other (Korznikov et al. 2025, arXiv 2509.22033): with c_i the cosine of
    row i to it, the penalty is mean_i max(0, c_i)^2.

    >>> from masksae import SAEConfig, TopK
    >>> SAEConfig(64, 512, TopK(8), penalties=(OrtSAE(every=8),)).penalties
    (OrtSAE(weight=0.25, every=8, chunk=8192),)
    """

    weight: float = 0.25

    def check(self, config):
        super().check(config)
        if config.frozen_decoder:
            raise ConfigError(
                "OrtSAE moves decoder rows only, and frozen_decoder keeps them where they are. Leave one of them out."
            )

    def value(self, sae, norms, step, batch):
        return self.cosines(sae, step)[0].square().mean()


@dataclass(frozen=True)
class C2R(OfNearest):
    """Similar latents are not active in the same batch (Jin et al. 2026, arXiv 2606.30609).

    With n(i) the nearest other row of i and c_i their cosine, the penalty is mean_i max(0, c_i)^2 (|f_i| + |f_n(i)|).
    |f_i| is the L2 norm of a latent's activations over the batch, which grows with the root of the batch, so it is
    scaled to 2,048 tokens; activations have mean squared norm 1. Where decoder rows have no fixed norm (ReLU), f_i
    times the norm takes the place of f_i, or growing rows would evade the penalty; Gated takes the magnitudes, not the
    gate. The gradient runs through decoder and activations, 0 where |f_i| is 0.

    >>> C2R(weight=0.5)
    C2R(weight=0.5, every=5, chunk=8192)
    """

    weight: float = 5.0

    def value(self, sae, norms, step, batch):
        cosine, nearest = self.cosines(sae, step)
        size = norms * (REFERENCE_BATCH / batch) ** 0.5
        if not sae.config.selection.unit_rows:
            size = size * sae.W_dec.norm(dim=1)
        return (cosine.square() * (size + size[nearest])).mean()


def due(config, step: int | None) -> list[Penalty]:
    """The penalties of an SAE that this step applies; None: of no step."""
    return [] if step is None else [penalty for penalty in config.penalties if step % penalty.every == 0]


def penalty_loss(sae, norms: Tensor, step: int, batch: int) -> Tensor:
    """Sum of the penalties that are due, with their weights and autograd; arguments as of `Penalty.value`."""
    with torch.autocast(sae.device.type, enabled=False):  # in half precision other rows would be the nearest
        values = [p.weight * p.every * p.value(sae, norms, step, batch) for p in due(sae.config, step)]
    return torch.stack(values).sum()


def nearest_rows(unit: Tensor, chunk: int, seed: int, step: int) -> Tensor:
    """Of each row of unit [F, d], all of norm 1, that other one of its chunk to which its cosine is largest [F]."""
    parts = -(-len(unit) // chunk)
    if parts == 1:
        return _nearest(unit)
    generator = torch.Generator().manual_seed((1_000_003 * seed + step) % 2**63)
    order = torch.randperm(len(unit), generator=generator).to(unit.device, non_blocking=True)
    result = torch.empty_like(order)
    for part in order.tensor_split(parts):
        result[part] = part[_nearest(unit[part])]
    return result


@torch.no_grad()
def _nearest(unit: Tensor) -> Tensor:
    n = len(unit)
    best, nearest = unit.new_full((n,), -torch.inf), torch.zeros(n, dtype=torch.int64, device=unit.device)

    def improve(rows: slice, cosines: Tensor, first: int) -> None:
        value, index = cosines.max(1)
        better = value > best[rows]
        best[rows] = torch.where(better, value, best[rows])
        nearest[rows] = torch.where(better, index + first, nearest[rows])

    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        # a cosine serves both of its rows: a block meets itself and what comes after it
        cosines = unit[low:high] @ unit[low:].t()
        cosines.fill_diagonal_(-torch.inf)
        improve(slice(low, high), cosines, low)
        if high < n:
            # turned round: a maximum along the strided dimension takes as long as the whole product
            improve(slice(high, n), cosines[:, high - low :].t().contiguous(), low)
    return nearest
