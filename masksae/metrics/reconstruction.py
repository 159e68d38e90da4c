"""How well an SAE rebuilds activations: explained variance, L0, shrinkage, dead and dense latents, CE and KL scores.

"Explained variance" has several definitions in the field, and a number without its definition says little. With S =
mean |x|^2, m = mean x, R = mean |x - x_hat|^2 over all tokens of d dimensions:

    centred     1 - R / mean |x - m|^2            the textbook one, r2_score of scikit-learn; the default. 1 - this is
                the FVU
    per_token   mean of 1 - |x - x_hat|^2 / |x - m|^2     SAEBench's `explained_variance_legacy`, with the mean of all
                tokens
    uncentred   1 - R / S                         the most flattering
    saebench    1 - R / (S - (S / d)^2)           `explained_variance` of SAEBench 0.6.0, which means to subtract the
                square of the mean but takes the mean of the squares; near "uncentred" unless norms are of the order of
                d

All sums are in float64, over pieces of a fixed size, so that no score depends on how the tokens were batched.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from masksae.errors import ConfigError, DataError, nearest
from masksae.saes.sae import SAE, at_least_single

KINDS = ("centred", "per_token", "uncentred", "saebench")
CHUNK = 4096
"""Tokens that are encoded at a time."""
TINY = 1e-300
"""Least divisor: a reconstruction of length 0 has cosine 0 with anything."""
DENSE = 0.1
"""A latent that is active on more than this share of tokens is dense."""


def explained_variance(x: Tensor, x_hat: Tensor, kind: str = "centred") -> float:
    """Share of the variance of x [..., d] that x_hat explains: 1 is perfect, 0 no better than the mean (or than zero,
    if "uncentred"). Raises ConfigError for another kind, DataError for shapes that differ or for activations that do
    not vary.

    >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    >>> [round(explained_variance(x, x + 1, kind), 4) for kind in ("centred", "uncentred")]
    [0.25, 0.8286]
    """
    if kind not in KINDS:
        raise ConfigError(f"explained variance has no kind {kind!r}.{nearest(kind, KINDS)}")
    if x.shape != x_hat.shape:
        raise DataError(f"x has shape {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}; they must be the same.")
    x, x_hat = (t.detach().reshape(-1, t.shape[-1]) for t in (x, x_hat))
    sums = _Sums(mean_activation(x))
    for piece, piece_hat in zip(x.split(CHUNK), x_hat.split(CHUNK)):
        sums.add(piece, piece_hat)
    return sums.explained(kind)


class _Sums:
    """Sums over tokens in float64; `mean` [d] is that of all of them."""

    def __init__(self, mean: Tensor):
        self.mean, self.totals, self.tokens = mean, {}, 0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add activations [n, d] and their reconstructions."""
        x, x_hat = x.double(), x_hat.double()
        dot, square, square_hat = (x * x_hat).sum(1), x.square().sum(1), x_hat.square().sum(1)
        error, spread = (x - x_hat).square().sum(1), (x - self.mean).square().sum(1)
        values = {
            "error": error, "spread": spread, "square": square, "square_hat": square_hat, "dot": dot,
            "unexplained": error / spread.clamp(min=TINY), "cosine": dot / (square * square_hat).sqrt().clamp(min=TINY),
            "ratio": (square_hat / square.clamp(min=TINY)).sqrt(),
        }  # fmt: skip
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value.sum().item()
        self.tokens += len(x)

    def mean_of(self, name: str) -> float:
        return self.totals[name] / self.tokens

    def explained(self, kind: str) -> float:
        error, spread, square = (self.mean_of(name) for name in ("error", "spread", "square"))
        if not spread > 0:
            raise DataError(
                "The activations do not vary, so no share of their variance can be explained. Give other tokens."
            )
        if kind == "per_token":
            return 1 - self.mean_of("unexplained")
        saebench = square - (square / len(self.mean)) ** 2
        return 1 - error / {"centred": spread, "uncentred": square, "saebench": saebench}[kind]


@dataclass(frozen=True)
class Reconstruction:
    """Scores on a set of tokens."""

    ev_centred: float
    ev_per_token: float
    ev_uncentred: float
    ev_saebench: float
    fvu: float
    """Fraction of variance unexplained: 1 - ev_centred."""
    mse: float
    """Mean squared error per dimension."""
    cosine: float
    """Mean cosine of x and x_hat."""
    l2_ratio: float
    """Mean of |x_hat| / |x|."""
    relative_bias: float
    """sum |x_hat|^2 / sum x . x_hat; below 1: shrinkage; 0 if nothing is reconstructed."""
    l0: float
    """Mean number of active latents per token."""
    l1: float
    """Mean sum of the latents of a token, decoder rows scaled to norm 1."""
    dead_latents: int
    """Latents that are active on none of these tokens. Depends on how many tokens there are."""
    dense_latents: int
    """Latents that are active on more than a tenth of them."""
    encoder_cosine: float
    """Mean over latents of the largest cosine of its encoder direction with another's."""
    decoder_cosine: float
    """The same of decoder directions."""
    tokens: int

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def reconstruction(sae: SAE, x: Tensor | Iterable[Tensor], *, threshold: float | None = None) -> Reconstruction:
    """Score an SAE on activations x [n, d], or on batches of them in anything that can be gone through twice (a list, a
    stream over a file); the scores are the same bits however the batches are cut. `threshold` takes the place of the
    SAE's own.

    Raises DataError if there is no token, the width is not the SAE's, or the activations are not finite or do not vary.

    >>> from masksae import SAEConfig, TopK
    >>> sae = SAE(SAEConfig(4, 16, TopK(2)))
    >>> reconstruction(sae, torch.randn(100, 4)).l0 <= 2
    True
    """
    if isinstance(x, Iterator):
        raise DataError(
            f"The batches come from a {type(x).__name__}, which can be gone through once; twice are needed. Give a "
            "list, or a tensor."
        )
    w_dec, w_enc = at_least_single(sae.W_dec), at_least_single(sae.W_enc)
    sums, norms = _Sums(mean_activation(x, sae.config.d_model)), w_dec.norm(dim=1)
    active, l1 = torch.zeros(sae.config.n_latents, dtype=torch.int64), 0.0
    for piece in _pieces(x):
        f = sae.encode(piece.to(sae.device), threshold)
        sums.add(piece, sae.decode(f).to(piece.device))
        active += (f > 0).sum(0).cpu()
        l1 += (at_least_single(f) @ norms).double().sum().item()
    centred = sums.explained("centred")
    return Reconstruction(
        **{f"ev_{kind}": sums.explained(kind) for kind in KINDS},
        fvu=1 - centred,
        mse=sums.mean_of("error") / sae.config.d_model,
        cosine=sums.mean_of("cosine"),
        l2_ratio=sums.mean_of("ratio"),
        relative_bias=sums.mean_of("square_hat") / (sums.mean_of("dot") or 1.0),
        l0=active.sum().item() / sums.tokens,
        l1=l1 / sums.tokens,
        dead_latents=int((active == 0).sum()),
        dense_latents=int((active > DENSE * sums.tokens).sum()),
        encoder_cosine=largest_cosines(w_enc.t()).mean().item(),
        decoder_cosine=largest_cosines(w_dec).mean().item(),
        tokens=sums.tokens,
    )


@torch.no_grad()
def active_counts(sae: SAE, x: Tensor | Iterable[Tensor], *, threshold: float | None = None) -> Tensor:
    """Number of tokens of x [n, d], or of batches of them, on which each latent is active: int64 [F]. `threshold` takes
    the place of the SAE's own.

    >>> from masksae import SAEConfig, TopK
    >>> active_counts(SAE(SAEConfig(4, 16, TopK(2))), torch.ones(3, 4)).unique().tolist()
    [0, 3]
    """
    counts = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    for piece in _pieces(x):
        counts += (sae.encode(piece.to(sae.device), threshold) > 0).sum(0).cpu()
    return counts


@dataclass(frozen=True)
class SilentLatents:
    """Latents that are active on no token of a clean text, by where they are active when tokens of it are replaced. The
    three sum to `Reconstruction.dead_latents` on that text."""

    silent_but_masked: int
    """Active at masked positions, at no ordinary one: latents for the replacing token."""
    silent_but_corrupted: int
    """Active at ordinary positions of the corrupted text: latents for what masks do to their neighbours."""
    silent_everywhere: int
    """Active nowhere."""

    def to_dict(self) -> dict:
        return asdict(self)


def silent_latents(clean: Tensor, masked: Tensor, ordinary: Tensor) -> SilentLatents:
    """What the latents that are silent on clean text fire on.

    clean     bool [F]: active on some token of the clean text
    masked    bool [F]: active at some masked position of the corrupted text
    ordinary  bool [F]: active at some other position of it

    Raises DataError for other types, and for shapes that differ.

    >>> clean = torch.tensor([True, False, False, False, False])
    >>> masked, ordinary = torch.tensor([[True, True, True, False, False], [True, False, True, True, False]])
    >>> silent_latents(clean, masked, ordinary)
    SilentLatents(silent_but_masked=1, silent_but_corrupted=2, silent_everywhere=1)
    """
    sets = (clean, masked, ordinary)
    if any(each.dtype != torch.bool or each.ndim != 1 or each.shape != clean.shape for each in sets):
        found = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in sets)
        raise DataError(
            "Which latents are active on clean text, at masked and at ordinary positions must be three bool [F] of one "
            f"SAE, found {found}. Take counts > 0."
        )
    return SilentLatents(
        silent_but_masked=int((~clean & masked & ~ordinary).sum()),
        silent_but_corrupted=int((~clean & ordinary).sum()),
        silent_everywhere=int((~clean & ~masked & ~ordinary).sum()),
    )


def _pieces(x: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows of x in pieces of CHUNK rows, the last one shorter."""
    rest: list[Tensor] = []  # rows of earlier batches, fewer than CHUNK
    for batch in [x] if isinstance(x, Tensor) else x:
        if batch.ndim != 2:
            raise DataError(f"Activations must have shape [tokens, d], found {tuple(batch.shape)}. Flatten them.")
        lacking = CHUNK - sum(map(len, rest)) if rest else 0
        for piece in (batch[:lacking], *batch[lacking:].split(CHUNK)):
            rest += [piece] if len(piece) else []
            if sum(map(len, rest)) == CHUNK:
                yield torch.cat(rest) if len(rest) > 1 else rest[0]
                rest = []
    if rest:
        yield torch.cat(rest) if len(rest) > 1 else rest[0]


def mean_activation(x: Tensor | Iterable[Tensor], width: int | None = None) -> Tensor:
    """Mean over tokens [d]: float64."""
    total, n = 0.0, 0
    for piece in _pieces(x):
        if width not in (None, piece.shape[-1]):
            raise DataError(f"The activations have width {piece.shape[-1]}, the SAE {width}. Take those of its layer.")
        total, n = total + piece.double().sum(0), n + len(piece)
    if n == 0:
        raise DataError(
            "There is no token to score. Give activations [n, d] with n > 0, or batches that can be read twice."
        )
    if not torch.isfinite(total).all():
        raise DataError("The activations hold NaN or infinity. Look at the model or at the stage that made them.")
    return total / n


@torch.no_grad()
def largest_cosines(directions: Tensor) -> Tensor:
    """For each of the directions [F, d] its largest cosine with any other: [F]. A zero vector has cosine 0 with all.

    >>> largest_cosines(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    tensor([1., 1., 0.])
    """
    unit = torch.nn.functional.normalize(directions, dim=1)
    found = []
    for low in range(0, len(unit), CHUNK):
        cosines = unit[low : low + CHUNK] @ unit.t()
        rows = torch.arange(len(cosines), device=unit.device)
        cosines[rows, low + rows] = -torch.inf
        found.append(cosines.max(1).values.clamp(min=-1))  # a single direction has no other
    return torch.cat(found)


@torch.no_grad()
def calibrated_threshold(sae: SAE, x: Tensor, k: float) -> float:
    """The threshold at which L0 on x [n, d] is k: round(k n) margins (`SAE.margins`) lie above it, exactly (ties
    apart).

    It is the next largest margin of a latent that can be active, or the lowest threshold that means anything if there
    is no such; then L0 is as high as this SAE can reach. Needs memory for 2 k n numbers, not for F n. Raises
    ConfigError for a k that is not positive, DataError as `reconstruction`.

    >>> from masksae import BatchTopK, SAEConfig
    >>> sae, x = SAE(SAEConfig(8, 64, BatchTopK(4))), torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    >>> threshold = calibrated_threshold(sae, x, k=3)
    >>> (sae.encode(x, threshold) > 0).sum().item() / len(x)
    3.0
    """
    if not 0 < k < torch.inf:
        raise ConfigError(f"L0 can only be made a positive number, found k = {k!r}.")
    mean_activation(x)  # checks them: of NaN nothing is above any threshold
    wanted = round(k * len(x)) + 1
    best, bound = torch.empty(0, dtype=torch.float32), -torch.inf
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
    """Share of the language model's loss that an SAE recovers, from three mean cross-entropies in nats: with the
    activations as they are, with zeros, with reconstructions in their place. 1: nothing lost; 0: no better than zeros.
    Raises DataError.

    >>> ce_score(original=3.0, zero=11.0, sae=4.0)
    0.875
    """
    if not zero > original:
        raise DataError(
            f"Zeros in place of the activations give a loss of {zero}, not above the original {original}. Look at the "
            "hook point."
        )
    return (zero - sae) / (zero - original)


def kl_score(zero: float, sae: float) -> float:
    """Share of the KL divergence of zeros that an SAE avoids: 1: the model's predictions are untouched; 0: no better
    than zeros. Raises DataError if zeros change nothing.

    >>> kl_score(zero=8.0, sae=1.0)
    0.875
    """
    if not zero > 0:
        raise DataError(f"Zeros in place of the activations give a KL divergence of {zero}. Look at the hook point.")
    return (zero - sae) / zero
