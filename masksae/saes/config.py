"""Architectures as data: SAE = selection rule x prefixes x auxiliary loss. Each part is a small frozen config.

"Matryoshka BatchTopK" is `SAEConfig(d, n, BatchTopK(20), prefixes=MATRYOSHKA)`; any rule takes prefixes. What a rule computes is in
`saes/rules.py`; what dictionary_learning's recipe fixes for it (Adam's betas, clipping, norms) stands here as class constants.
Impossible combinations raise ConfigError here, so nothing that follows needs to check again.
"""

from dataclasses import asdict, dataclass
from numbers import Integral
from typing import ClassVar

from masksae.errors import ConfigError, nearest

MOST_GROUPS = 255
"""Prefix groups; a step keeps their numbers in a byte each."""

MOST_SILENT = 10_000_000
"""Tokens without firing after which a latent is dead in a long run; dictionary_learning's number."""

MOST_SEED = 2**64 - 1
"""Of what PyTorch's and NumPy's generators take."""

MATRYOSHKA = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)
"""Group fractions of SAEBench's own Matryoshka suite."""

WEIGHTINGS = ("1/G^2", "mean", "sum")


@dataclass(frozen=True)
class Selection:
    """Base of the selection rules: which latents stay active."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    """Of Adam."""
    clipped: ClassVar[bool] = True
    """Gradients are clipped (`TrainConfig.clip`)."""
    unit_rows: ClassVar[bool] = True
    """Decoder rows have norm 1 all through training; otherwise their norms are folded away at the end."""
    decoder_norm: ClassVar[float] = 1.0
    """Norm of the initial decoder rows."""
    centred: ClassVar[bool] = True
    """The encoder reads x - b_dec, not x."""
    median_start: ClassVar[bool] = False
    """b_dec starts at the geometric median of the first batch, not at 0."""

    @property
    def goal(self) -> float | None:
        """Mean number of active latents per token that the rule aims at; None if a coefficient decides."""
        return None

    @property
    def trainable(self) -> bool:
        """Whether everything that training needs is known."""
        return True


@dataclass(frozen=True)
class TopK(Selection):
    """Keep the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    """Latents kept per token, at inference too."""

    median_start = True

    def __post_init__(self):
        keep_whole(self, "k")

    @property
    def goal(self) -> float:
        return self.k


@dataclass(frozen=True)
class BatchTopK(TopK):
    """Keep the k x batch largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    At inference a threshold takes over: the running mean of the smallest value kept. k need not be whole.
    """

    k: float
    """Mean number of latents kept per token."""

    def __post_init__(self):
        _positive("BatchTopK.k", self.k)


@dataclass(frozen=True)
class JumpReLU(Selection):
    """Keep what exceeds a threshold that each latent learns (Rajamanoharan et al. 2024, arXiv 2407.14435).

    The step's derivative is a rectangle of width `bandwidth`; the loss (L0 / target_l0 - 1)^2 steers the thresholds.
    """

    target_l0: float | None
    """Mean number of active latents per token. None: not known, of an SAE that was trained elsewhere; it cannot be trained."""
    bandwidth: float = 0.001
    """Width of the rectangle, in units of the scaled activations (root mean square norm 1)."""
    initial_threshold: float = 0.001
    """In the same units."""

    betas = (0.0, 0.999)
    centred = False

    def __post_init__(self):
        if self.target_l0 is not None:
            _positive("JumpReLU.target_l0", self.target_l0)
        _positive("JumpReLU.bandwidth", self.bandwidth)
        _positive("JumpReLU.initial_threshold", self.initial_threshold)

    @property
    def goal(self) -> float | None:
        return self.target_l0

    @property
    def trainable(self) -> bool:
        return self.target_l0 is not None


@dataclass(frozen=True)
class ReLU(Selection):
    """Keep what is positive; an L1 penalty weighted by decoder norms keeps it little (Anthropic, April 2024 update)."""

    l1: float | None
    """Coefficient of mean_b sum_j f_j |d_j|, in units of the scaled activations. None: not known; such an SAE cannot be trained."""
    target_l0: float | None = None
    """If given, a controller multiplies `l1` until the training L0 is this; None: `l1` stays as it is."""

    decoder_norm = 0.1
    unit_rows = False

    def __post_init__(self):
        if self.l1 is not None:
            _positive(f"{type(self).__name__}.l1", self.l1)
        if self.target_l0 is not None:
            _positive(f"{type(self).__name__}.target_l0", self.target_l0)

    @property
    def goal(self) -> float | None:
        return self.target_l0

    @property
    def trainable(self) -> bool:
        return self.l1 is not None


@dataclass(frozen=True)
class Gated(ReLU):
    """A gate decides which latents are active, a tied magnitude how much (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    betas = (0.0, 0.999)
    clipped = False
    decoder_norm = 1.0
    unit_rows = True


SELECTIONS = {rule.__name__: rule for rule in (TopK, BatchTopK, JumpReLU, ReLU, Gated)}


@dataclass(frozen=True)
class AuxK:
    """Revive dead latents: they reconstruct what the living ones left over (Gao et al. 2024, arXiv 2406.04093)."""

    k: int | None = None
    """Dead latents used per token; None: half of d_model."""
    coefficient: float = 1 / 32
    """Weight of this loss; the loss itself is normalised by the variance of the residual."""
    dead_after_tokens: int | None = None
    """A latent is dead when it has not fired for so many tokens; None: a sixteenth of the run's, 10,000,000 at most (`dead_after`)."""

    def __post_init__(self):
        for name in ("k", "dead_after_tokens"):
            if getattr(self, name) is not None:
                keep_whole(self, name)
        if not self.coefficient >= 0:
            raise ConfigError(f"AuxK.coefficient must be at least 0, found {self.coefficient!r}.")

    def dead_after(self, tokens: int) -> int:
        """Tokens without firing after which a latent is dead, in a run of so many tokens. dictionary_learning has 10,000,000 whatever the run's
        length; in a run that is shorter no latent would ever be revived.

        >>> [AuxK().dead_after(n) for n in (1_000_000, 500_000_000)], AuxK(dead_after_tokens=5000).dead_after(1_000_000)
        ([62500, 10000000], 5000)
        """
        return self.dead_after_tokens or max(1, min(MOST_SILENT, tokens // 16))


@dataclass(frozen=True)
class SAEConfig:
    """Everything that defines an SAE before training.

    >>> SAEConfig(64, 512, BatchTopK(8), prefixes=(0.25, 0.75)).group_sizes
    (128, 384)
    >>> SAEConfig(64, 512, JumpReLU(target_l0=20)).selection.goal
    20
    """

    d_model: int
    """Width of the activations."""
    n_latents: int
    """Width of the dictionary, F."""
    selection: Selection
    """Which latents stay active."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka group fractions in dictionary order, summing to 1 (Bussmann et al. 2025, arXiv 2503.17547). () is off."""
    prefix_weighting: str = "1/G^2"
    """Weight of each of the G prefix losses: "1/G^2" (dictionary_learning's mean of means), "mean" (1/G) or "sum" (1)."""
    aux: AuxK | None = None
    """Auxiliary loss; None is off."""
    seed: int = 0
    """Of the initial decoder directions: 0 to 2**64 - 1."""
    drop_masked: bool = False
    """Train on ordinary positions only: the place of a masked one is taken by another ordinary one of the same pool."""
    own_order: bool = False
    """Draw the order of the tokens from this SAE's seed; otherwise all SAEs of a group see the same batches."""

    def __post_init__(self):
        keep_whole(self, "d_model")
        keep_whole(self, "n_latents")
        keep_whole(self, "seed", least=0, most=MOST_SEED)
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if not isinstance(self.selection, tuple(SELECTIONS.values())):
            raise ConfigError(
                f"selection must be one of the selection configs, such as BatchTopK(20), found {self.selection!r}.{nearest(self.selection, SELECTIONS)}"
            )
        if (self.selection.goal or 0) > self.n_latents:
            raise ConfigError(
                f"k = {self.selection.goal} latents cannot be kept of n_latents = {self.n_latents}. Lower k or widen the dictionary."
            )
        if self.prefix_weighting not in WEIGHTINGS:
            raise ConfigError(
                f"prefix_weighting {self.prefix_weighting!r} is unknown.{nearest(self.prefix_weighting, WEIGHTINGS)}"
            )
        if self.prefixes:
            if any(not 0 < share <= 1 for share in self.prefixes) or abs(sum(self.prefixes) - 1) > 1e-6:
                raise ConfigError(
                    f"prefixes must be positive fractions that sum to 1, found {self.prefixes} with sum {sum(self.prefixes):.6g}."
                )
            if len(self.prefixes) > MOST_GROUPS:
                raise ConfigError(f"prefixes: at most {MOST_GROUPS} groups, found {len(self.prefixes)}.")
            if min(self.group_sizes) < 1:
                raise ConfigError(
                    f"prefixes {self.prefixes} leave an empty group in a dictionary of {self.n_latents} latents. Use fewer groups or more latents."
                )

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Latents of each prefix group: fractions rounded down, the remainder to the last group.

        >>> SAEConfig(768, 4096, BatchTopK(20), MATRYOSHKA).group_sizes
        (128, 256, 512, 1024, 2176)
        """
        if not self.prefixes:
            return (self.n_latents,)
        sizes = [int(share * self.n_latents) for share in self.prefixes[:-1]]
        return (*sizes, self.n_latents - sum(sizes))

    @property
    def prefix_weight(self) -> float:
        """Weight of each prefix's mean squared error in the loss."""
        groups = len(self.group_sizes)
        return {"1/G^2": 1 / groups**2, "mean": 1 / groups, "sum": 1.0}[self.prefix_weighting]

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self) | {
            "selection": {"rule": type(self.selection).__name__} | asdict(self.selection),
            "prefixes": list(self.prefixes),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "SAEConfig":
        """Inverse of `to_dict`. Raises ConfigError for an unknown selection rule, and for what is no such dictionary."""
        try:
            values = dict(values)
            selection = dict(values.pop("selection"))
            rule = selection.pop("rule", None)
            if rule not in SELECTIONS:
                raise ConfigError(f"Unknown selection rule {rule!r}.{nearest(rule, SELECTIONS)}")
            aux = values.pop("aux")
            return cls(selection=SELECTIONS[rule](**selection), aux=AuxK(**aux) if aux else None, **values)
        except ConfigError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"This is no configuration of an SAE ({type(error).__name__}: {error}).") from error


def whole(name: str, value, least: int = 1, most: int | None = None) -> int:
    """A whole number, NumPy's too, as an int. Raises ConfigError for anything else, and outside of least .. most."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least or (most and value > most):
        kind = {1: "a positive integer"}.get(least, f"an integer of at least {least}")
        limit = "" if most is None else f", {most} at most"
        raise ConfigError(f"{name} must be {kind}{limit}, found {value!r}.")
    return int(value)


def keep_whole(config, name: str, least: int = 1, most: int | None = None) -> None:
    """Check a field of a frozen config and keep it as an int. Raises ConfigError."""
    value = whole(f"{type(config).__name__}.{name}", getattr(config, name), least, most)
    object.__setattr__(config, name, value)


def _positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number, found {value!r}.")
