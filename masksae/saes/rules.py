"""The selection rules: which latents stay active. What is particular to a rule stands on its class; others ask it.

A rule is a frozen dataclass of its parameters under `Selection`, here or in anybody's module. Once it is defined,
configs and saved SAEs know it by its class's name, profiles by that name in snake case (`JumpReLU`: jump_relu). `dense`
is its definition and all that it must have. What it takes besides, each with a default on `Selection`:

    tensors, scaled                           parameters of its own
    magnitudes, margins, select               inference
    support, sparse, backward                 the sparse step of a CPU; without them the dense one is taken
    estimates_threshold, smallest             a threshold for inference that training estimates
    project_, coefficient, controlled, ...    the recipe of its training

What it is called in other libraries stands in `saes/formats.py`.

The formulas of the five rules here are those of dictionary_learning 0.1.0, but for JumpReLU's thresholds, which stay at
least 0, and for tokens and batches without an active latent, which the mean of a threshold leaves out: why, says
`training/group.py`, with all that differs in the recipe.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from masksae.errors import ConfigError
from masksae.saes.fields import check_positive, keep_whole, register

SELECTIONS: dict[str, type["Selection"]] = {}
"""Every rule that is defined, by the name of its class."""


class Selection:
    """Base of the selection rules. Methods get the `SAE` for its tensors; `pre` [B, F] are pre-activations, and `e` the
    `Entries` of a sparse step."""

    centred: ClassVar[bool] = True
    """The encoder reads x - b_dec, not x."""
    scaled: ClassVar[tuple[str, ...]] = ()
    """Those of `tensors` that are in units of the pre-activations: they grow with the activations, and with decoder
    norms."""
    keeps_k_per_token: ClassVar[bool] = False
    """At inference every token keeps the same number of latents: no threshold decides, and clean L0 cannot be
    matched."""
    ranked: ClassVar[bool] = False
    """Latents are compared with each other, so the norms of decoder rows cannot be folded into the encoder."""
    estimates_threshold: ClassVar[bool] = False
    """Training estimates `SAE.threshold`: a running mean of `smallest`. Otherwise it is 0."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    """Of Adam."""
    clipped: ClassVar[bool] = True
    """Gradients are clipped (`TrainConfig.clip`)."""
    unit_rows: ClassVar[bool] = True
    """Decoder rows have norm 1 all through training; otherwise their norms are folded away at the end."""
    decoder_norm: ClassVar[float] = 1.0
    """Norm of the initial decoder rows."""
    median_start: ClassVar[bool] = False
    """b_dec starts at the geometric median of the first batch, not at 0."""
    coefficient: ClassVar[str | None] = None
    """Field with the sparsity coefficient after its warm-up, recorded under this name; None: it is 1."""
    revived: ClassVar[bool] = False
    """The grids of a profile train it with AuxK."""
    stated: ClassVar[tuple[str, ...] | None] = None
    """Fields that a profile must give; None: those without a default."""

    dense_copies: ClassVar[int] = 6
    """Tensors [B, F] that live at once in its dense step."""
    stacked: ClassVar[bool] = False
    """On a GPU SAEs of one architecture take their steps together, as a CUDA graph: `dense` and `smallest` work under
    `torch.vmap` and never read a number back. Otherwise each takes its own, kernel by kernel."""
    always_sparse: ClassVar[bool] = False
    """`goal` bounds the active entries at every step, the first ones too, so on a CPU training needs no dense step."""

    def __init_subclass__(cls, base: bool = False, **options):
        """Makes a rule known; `base`: it is what rules have in common, and none itself."""
        super().__init_subclass__(**options)
        if not base:
            register(SELECTIONS, cls, "selection rule")

    @property
    def goal(self) -> float | None:
        """Mean number of active latents per token that the rule aims at; None if a coefficient decides."""
        return None

    @property
    def trainable(self) -> bool:
        """Whether everything that training needs is known."""
        return True

    @property
    def controlled(self) -> bool:
        """Whether the sparsity coefficient is adapted in training until L0 is `goal`."""
        return False

    def check_batch(self, batch: int) -> None:
        """Raise ConfigError if batches of so many tokens cannot be trained on."""

    def tensors(self, n: int) -> dict[str, Tensor]:
        """Initial values of the parameters that it adds to an SAE of n latents."""
        return {}

    def magnitudes(self, sae, pre: Tensor) -> Tensor:
        """Value [..., F] that each latent has if it is selected, at least 0."""
        return torch.relu(pre)

    def margins(self, sae, pre: Tensor) -> Tensor:
        """What is compared with the inference threshold [..., F]."""
        return pre

    def select(self, sae, pre: Tensor, threshold: float | None = None) -> Tensor:
        """Latents [..., F] at inference; `threshold` takes the place of the trained one."""
        cut = sae.threshold if threshold is None else threshold
        return self.magnitudes(sae, pre) * (self.margins(sae, pre) > cut)

    def dense(self, sae, pre: Tensor, weight) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """(f [B, F], gate [B, F] or None, penalty) in training, with autograd.

        weight  sparsity coefficient of the step, warm-up and controller included
        gate    a second set of latents whose reconstruction is trained too, through a frozen decoder
        """
        raise NotImplementedError

    def support(self, sae, pre: Tensor, most: float) -> Tensor | None:
        """Flat indices, ascending, of the entries of pre that can have a gradient; None for more than `most`, and for a
        rule that has no sparse step."""
        return None

    def sparse(self, sae, e) -> tuple[Tensor, Tensor | None]:
        """(f, gate or None) at the entries of the support."""
        raise NotImplementedError

    def backward(self, sae, e, f: Tensor, grad_f: Tensor, grad_gate: Tensor | None, weight):
        """(gradient of pre at the entries, penalty). Sets the gradients of the rule's own parameters, adds to those of
        the decoder."""
        raise NotImplementedError

    def smallest(self, f: Tensor, row: Tensor | None, batch: int) -> Tensor:
        """What the inference threshold follows, a scalar; 0 if nothing is active. f of the entries, whose tokens `row`
        names, or of all latents [B, F] without it."""
        raise NotImplementedError

    def project_(self, sae) -> None:
        """Bring the rule's own parameters back to where they make sense, after an update."""


class Ranked(Selection, base=True):
    """The largest are kept, k per token on average. Without a penalty, gradients are those of what is kept."""

    k: float
    ranked = estimates_threshold = median_start = revived = stacked = always_sparse = True

    @property
    def goal(self) -> float:
        return self.k

    def sparse(self, sae, e):
        return e.pre, None

    def backward(self, sae, e, f, grad_f, grad_gate, weight):
        return grad_f, 0.0


@dataclass(frozen=True)
class TopK(Ranked):
    """Keep the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    """Latents kept per token, at inference too."""

    keeps_k_per_token = True

    def __post_init__(self):
        keep_whole(self, "k")

    def select(self, sae, pre, threshold=None):
        if threshold is not None:
            return super().select(sae, pre, threshold)
        value, index = torch.relu(pre).topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, index, value)

    def dense(self, sae, pre, weight):
        value, index = pre.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, index, torch.relu(value)), None, 0.0  # few passes over [B, F]

    def support(self, sae, pre, most):
        if self.k * len(pre) > most:
            return None
        value, index = top_k(pre, self.k)
        index = torch.where(value > 0, index, -1).sort(dim=1).values
        kept = index >= 0
        return (index + torch.arange(len(pre))[:, None] * pre.shape[1])[kept]

    def smallest(self, f, row, batch):
        """Mean over tokens of the smallest positive value kept."""
        active = torch.where(f > 0, f, torch.inf)
        if row is None:
            least = active.amin(1)
        else:
            least = f.new_full((batch,), torch.inf).scatter_reduce_(0, row, active, "amin")
        some = least < torch.inf
        return torch.where(some, least, 0).sum() / some.sum().clamp(min=1)


@dataclass(frozen=True)
class BatchTopK(Ranked):
    """Keep the k x batch largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    At inference a threshold takes over: the running mean of the smallest value kept. Of equal values the first are kept
    (on a GPU: any).
    """

    k: int | float
    """Mean number of latents kept per token; need not be whole."""

    def __post_init__(self):
        check_positive(self, "k")

    def check_batch(self, batch):
        if round(self.k * batch) == 0:
            raise ConfigError(f"BatchTopK.k = {self.k:g} keeps no latent in a batch of {batch}. Raise k or batch_size.")

    def dense(self, sae, pre, weight):
        flat = pre.reshape(-1)
        value, index = flat.topk(min(round(self.k * len(pre)), len(flat)), sorted=False)
        return torch.zeros_like(flat).scatter(0, index, torch.relu(value)).view_as(pre), None, 0.0

    def support(self, sae, pre, most):
        count = round(self.k * len(pre))
        return largest(pre, count) if count <= most else None

    def smallest(self, f, row, batch):
        """The smallest positive value kept."""
        if f.numel() == 0:
            return f.new_zeros(())
        return torch.where(f > 0, f, torch.inf).min().nan_to_num(posinf=0.0)


@dataclass(frozen=True)
class JumpReLU(Selection):
    """Keep what exceeds a threshold that each latent learns (Rajamanoharan et al. 2024, arXiv 2407.14435).

    The step's derivative is a rectangle of width `bandwidth`; the loss (L0 / target_l0 - 1)^2 steers the thresholds. As
    in dictionary_learning the step of L0 is taken of f, not of pre: values just above a threshold move it, values below
    don't.
    """

    target_l0: float | None
    """Mean number of active latents per token. None: not known, of an SAE that was trained elsewhere; it cannot be
    trained."""
    bandwidth: float = 0.001
    """Width of the rectangle, in units of the scaled activations (root mean square norm 1)."""
    initial_threshold: float = 0.001
    """In the same units."""

    betas = (0.0, 0.999)
    centred = False
    stacked = True
    scaled = ("thresholds",)

    def __post_init__(self):
        if self.target_l0 is not None:
            check_positive(self, "target_l0")
        check_positive(self, "bandwidth", "initial_threshold")

    @property
    def goal(self) -> float | None:
        return self.target_l0

    @property
    def trainable(self) -> bool:
        return self.target_l0 is not None

    def tensors(self, n):
        return {"thresholds": torch.full((n,), self.initial_threshold)}

    def project_(self, sae):
        sae.thresholds.clamp_(min=0)

    def margins(self, sae, pre):
        return pre - sae.thresholds

    def dense(self, sae, pre, weight):
        f, l0 = _Jump.apply(pre, sae.thresholds, self.bandwidth)
        return f, None, weight * (l0 / self.target_l0 - 1).square()

    def support(self, sae, pre, most):
        return _indices(pre > sae.thresholds - 0.5 * self.bandwidth, most)

    def sparse(self, sae, e):
        return e.pre * (e.pre > sae.thresholds[e.col]), None

    def backward(self, sae, e, f, grad_f, grad_gate, weight):
        batch, theta, width = e.shape[0], sae.thresholds, self.bandwidth
        active = e.pre > theta[e.col]
        count = e.per_latent(active.to(f.dtype))
        excess = count.sum() / batch / self.target_l0 - 1
        step = 2 * weight * excess / (self.target_l0 * batch)  # derivative of the penalty by each entry's step
        near, near_f = _window(e.pre - theta[e.col], width), _window(f - theta[e.col], width) & active
        grad = -(theta / width) * e.per_latent(near * grad_f) - step / width * e.per_latent(near_f.to(f.dtype))
        sae.thresholds.grad = grad - step / width * (batch - count) * _window(theta, width)  # silent entries have f = 0
        return grad_f * active, weight * excess.square()


@dataclass(frozen=True)
class Penalised(Selection, base=True):
    """What is positive stays; an L1 penalty keeps it little."""

    l1: float | None
    """Coefficient of the penalty, in units of the scaled activations. None: not known; such an SAE cannot be
    trained."""
    target_l0: float | None = None
    """If given, a controller multiplies `l1` until the training L0 is this; None: `l1` stays as it is."""

    coefficient = "l1"
    stated = ("l1", "target_l0")
    stacked = True

    def __post_init__(self):
        check_positive(self, *(name for name in ("l1", "target_l0") if getattr(self, name) is not None))

    @property
    def goal(self) -> float | None:
        return self.target_l0

    @property
    def trainable(self) -> bool:
        return self.l1 is not None

    @property
    def controlled(self) -> bool:
        return self.target_l0 is not None

    def support(self, sae, pre, most):
        return _indices(pre > 0, most)


@dataclass(frozen=True)
class ReLU(Penalised):
    """Keep what is positive; an L1 penalty weighted by decoder norms keeps it little (Anthropic, April 2024 update).

    The penalty is l1 mean_b sum_j f_j |d_j|.
    """

    decoder_norm = 0.1
    unit_rows = False

    def dense(self, sae, pre, weight):
        f = torch.relu(pre)
        return f, None, weight * (f @ sae.W_dec.norm(dim=1)).mean()

    def sparse(self, sae, e):
        return e.pre, None

    def backward(self, sae, e, f, grad_f, grad_gate, weight):
        norm, batch = sae.W_dec.norm(dim=1), e.shape[0]
        total = e.per_latent(f)
        sae.W_dec.grad.addcmul_(sae.W_dec, (weight / batch * total / norm.clamp(min=1e-12))[:, None])
        return grad_f + (weight / batch * norm)[e.col], weight / batch * (total @ norm)


@dataclass(frozen=True)
class Gated(Penalised):
    """A gate decides which latents are active, a tied magnitude how much (Rajamanoharan et al. 2024, arXiv 2404.16014).

    f = ReLU(exp(r_mag) z + b_mag) where the gate pre = z + b_enc is open; the penalty is l1 mean_b sum_j ReLU(pre_j).
    """

    betas = (0.0, 0.999)
    clipped = False
    scaled = ("b_mag",)
    dense_copies = 9

    def tensors(self, n):
        return {"r_mag": torch.zeros(n), "b_mag": torch.zeros(n)}

    def magnitudes(self, sae, pre):
        return torch.relu(sae.r_mag.exp() * (pre - sae.b_enc) + sae.b_mag)

    def dense(self, sae, pre, weight):
        gate = torch.relu(pre)
        return self.magnitudes(sae, pre) * (pre > 0), gate, weight * gate.sum(1).mean()

    def sparse(self, sae, e):
        z = e.pre - sae.b_enc[e.col]
        return torch.relu(sae.r_mag.exp()[e.col] * z + sae.b_mag[e.col]), e.pre

    def backward(self, sae, e, f, grad_f, grad_gate, weight):
        grad_f = grad_f * (f > 0)
        scaled = grad_f * sae.r_mag.exp()[e.col]
        sae.b_mag.grad = e.per_latent(grad_f)
        sae.r_mag.grad = e.per_latent(scaled * (e.pre - sae.b_enc[e.col]))
        grad_gate = grad_gate + weight / e.shape[0]
        # the magnitude does not see b_enc; the caller adds all of the pre-activation's
        sae.b_enc.grad = -e.per_latent(scaled)
        return scaled + grad_gate, weight * e.pre.sum() / e.shape[0]


class _Jump(torch.autograd.Function):
    """(pre, thresholds, bandwidth) -> (f, mean number of active latents per token)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre, theta, width):
        active = pre > theta
        return pre * active, active.sum(dtype=pre.dtype) / len(pre)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pre, theta, ctx.width = inputs
        ctx.save_for_backward(pre, theta)

    @staticmethod
    def backward(ctx, grad_f, grad_l0):
        (pre, theta), width = ctx.saved_tensors, ctx.width
        active = pre > theta
        near = _window(pre - theta, width)
        grad_theta = -(theta / width) * torch.where(near, grad_f, 0).sum(0)
        near_f = (near & active).sum(0) + (~active).sum(0) * _window(theta, width)  # where f, 0 if silent, is near
        return grad_f * active, grad_theta - grad_l0 / (len(pre) * width) * near_f, None


def _window(x: Tensor, width: float) -> Tensor:
    """Where the rectangle kernel is not 0."""
    return x.abs() < 0.5 * width


def _indices(mask: Tensor, most: float) -> Tensor | None:
    return None if torch.count_nonzero(mask) > most else mask.view(-1).nonzero().squeeze(1)


def top_k(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns) [B, k] of the k largest entries of each row of h [B, F], in any order; of equal ones any."""
    rows, width = h.shape
    if width % 8 or not width / 64 < k <= width / 16:
        return h.topk(k, dim=1, sorted=False)
    # from width / 64 on PyTorch takes twice the time. The k largest are among the 8 k entries of those k columns of
    # [8, width / 8] whose largest entries are the largest; two top-k of an eighth or less cost half of the one
    folded = h.view(rows, 8, -1)
    column = folded.amax(1).topk(k, dim=1, sorted=False).indices
    value, place = folded.gather(2, column[:, None].expand(-1, 8, -1)).flatten(1).topk(k, dim=1, sorted=False)
    line = torch.div(place, k, rounding_mode="floor")
    return value, line * folded.shape[2] + column.gather(1, place - line * k)


def largest(h: Tensor, count: int) -> Tensor:
    """Flat indices, ascending, of the `count` largest positive entries of h [B, F]; of equal ones, the first in
    row-major order."""
    flat = h.view(-1)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=h.device)
    index = _above_lower_bound(flat, count)
    if len(index) <= count:
        return index
    value = flat[index]
    edge = value.topk(count, sorted=False).values.min()
    keep = value > edge
    ties = (value == edge).nonzero().squeeze(1)[: count - int(keep.sum())]
    keep[ties] = True
    return index[keep]


def _above_lower_bound(flat: Tensor, count: int) -> Tensor:
    """Indices of a small superset of the `count` largest positive entries: a strided sample tells where to cut."""
    # a top-k of all B F numbers takes two thirds of the encoder's product, this an eighth of that. One number in 61 (a
    # prime: in step with no width) tells the edge well enough: with 15 % and 64 to spare the bound lies below it but
    # for bad luck, which the count notices
    sample = flat[::61]
    bound = sample.topk(min(len(sample), int(1.15 * count / 61) + 64)).values[-1].clamp(min=0)
    index = (flat > bound).nonzero().squeeze(1)
    if len(index) < count and bound > 0:
        index = (flat > 0).nonzero().squeeze(1)
    return index
