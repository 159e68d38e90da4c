"""Architectures as data: SAE = selection rule x prefixes x auxiliary loss x penalties. Each part is a small frozen
config.

"Matryoshka BatchTopK" is `SAEConfig(d, n, BatchTopK(20), prefixes=MATRYOSHKA)`; any rule of `saes/rules.py` takes
prefixes. Impossible combinations raise ConfigError here, so nothing that follows needs to check again.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from masksae.errors import ConfigError, nearest
from masksae.saes.fields import keep_whole
from masksae.saes.penalties import PENALTIES, Penalty
from masksae.saes.rules import SELECTIONS, Selection

MOST_SILENT = 10_000_000
"""Tokens without firing after which a latent is dead in a long run; dictionary_learning's number."""

MOST_SEED = 2**64 - 1
"""Of what PyTorch's and NumPy's generators take."""

MATRYOSHKA = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)
"""Group fractions of SAEBench's own Matryoshka suite."""

WEIGHTINGS = ("1/G^2", "mean", "sum")


@dataclass(frozen=True)
class AuxK:
    """Revive dead latents: they reconstruct what the living ones left over (Gao et al. 2024, arXiv 2406.04093)."""

    k: int | None = None
    """Dead latents used per token; None: half of d_model."""
    coefficient: float = 1 / 32
    """Weight of this loss; the loss itself is normalised by the variance of the residual."""
    dead_after_tokens: int | None = None
    """A latent is dead when it has not fired for so many tokens; None: a sixteenth of the run's, 10,000,000 at most
    (`dead_after`)."""

    def __post_init__(self):
        for name in ("k", "dead_after_tokens"):
            if getattr(self, name) is not None:
                keep_whole(self, name)
        if not self.coefficient >= 0:
            raise ConfigError(f"AuxK.coefficient must be at least 0, found {self.coefficient!r}.")

    def dead_after(self, tokens: int) -> int:
        """Tokens without firing after which a latent is dead, in a run of so many tokens. dictionary_learning has
        10,000,000 whatever the run's length; in a run that is shorter no latent would ever be revived.

        >>> [AuxK().dead_after(n) for n in (1_000_000, 500_000_000)], AuxK(dead_after_tokens=5000).dead_after(1_000_000)
        ([62500, 10000000], 5000)
        """
        return self.dead_after_tokens or max(1, min(MOST_SILENT, tokens // 16))


@dataclass(frozen=True)
class SAEConfig:
    """Everything that defines an SAE before training.

    >>> from masksae import BatchTopK, JumpReLU
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
    """Matryoshka group fractions in dictionary order, summing to 1 (Bussmann et al. 2025, arXiv 2503.17547). () is
    off."""
    prefix_weighting: str | tuple[float, ...] = "1/G^2"
    """Weight of each of the G prefix losses: "1/G^2" (dictionary_learning's mean of means), "mean" (1/G), "sum" (1), or
    one weight per prefix, the shortest first. Balanced Matryoshka (Chanin et al. 2025, arXiv 2505.11756) gives the
    whole dictionary 1 and each shorter prefix m times the weight of the next longer one, best near m = 0.75: of four,
    (0.421875, 0.5625, 0.75, 1.0)."""
    aux: AuxK | None = None
    """Auxiliary loss; None is off."""
    seed: int = 0
    """Of the initial decoder directions: 0 to 2**64 - 1."""
    drop_masked: bool = False
    """Train on ordinary positions only: the place of a masked one is taken by another ordinary one of the same pool."""
    own_order: bool = False
    """Draw the order of the tokens from this SAE's seed; otherwise all SAEs of a group see the same batches."""
    penalties: tuple[Penalty, ...] = ()
    """Further terms of the loss, such as OrtSAE() or C2R() (`saes/penalties.py`)."""
    frozen_decoder: bool = False
    """Decoder rows stay at their random initial directions, a control: their gradient is dropped before clipping, so it
    does not count in the clipped norm, and everything else trains."""

    def __post_init__(self):
        keep_whole(self, "d_model")
        keep_whole(self, "n_latents")
        keep_whole(self, "seed", least=0, most=MOST_SEED)
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if not isinstance(self.selection, Selection):
            raise ConfigError(
                f"selection must be one of the selection configs, such as BatchTopK(20), found {self.selection!r}."
                f"{nearest(self.selection, SELECTIONS)}"
            )
        if (self.selection.goal or 0) > self.n_latents:
            raise ConfigError(
                f"k = {self.selection.goal} latents cannot be kept of n_latents = {self.n_latents}. "
                "Lower k or widen the dictionary."
            )
        self._check_prefixes()
        self._check_penalties()

    def _check_prefixes(self) -> None:
        if self.prefixes:
            if any(not 0 < share <= 1 for share in self.prefixes) or abs(sum(self.prefixes) - 1) > 1e-6:
                raise ConfigError(
                    f"prefixes must be positive fractions that sum to 1, found {self.prefixes} with "
                    f"sum {sum(self.prefixes):.6g}."
                )
            if min(self.group_sizes) < 1:
                raise ConfigError(
                    f"prefixes {self.prefixes} leave an empty group in a dictionary of {self.n_latents} latents. "
                    "Use fewer groups or more latents."
                )
        if self.prefix_weighting in WEIGHTINGS:
            return
        if not isinstance(self.prefix_weighting, tuple | list):
            raise ConfigError(
                f"prefix_weighting {self.prefix_weighting!r} is unknown.{nearest(self.prefix_weighting, WEIGHTINGS)} "
                "Or give one weight per prefix."
            )
        weights = tuple(self.prefix_weighting)
        if len(weights) != len(self.prefixes):
            raise ConfigError(
                f"prefix_weighting gives {len(weights)} weights for {len(self.prefixes)} prefixes. Give one per prefix."
            )
        numbers = all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights)
        if not numbers or weights[-1] == 0:
            raise ConfigError(
                f"prefix_weighting must be finite weights of at least 0, the last above 0, found {weights}."
            )
        object.__setattr__(self, "prefix_weighting", tuple(map(float, weights)))

    def _check_penalties(self) -> None:
        if not isinstance(self.penalties, tuple | list):
            raise ConfigError(f"penalties must be a tuple of penalty configs, found {self.penalties!r}.")
        object.__setattr__(self, "penalties", tuple(self.penalties))
        for penalty in self.penalties:
            if not isinstance(penalty, Penalty):
                raise ConfigError(
                    f"penalties must be penalty configs, such as OrtSAE(), found {penalty!r}."
                    f"{nearest(penalty, PENALTIES)}"
                )
            penalty.check(self)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Latents of each prefix group: fractions rounded down, the remainder to the last group.

        >>> from masksae import BatchTopK
        >>> SAEConfig(768, 4096, BatchTopK(20), MATRYOSHKA).group_sizes
        (128, 256, 512, 1024, 2176)
        """
        if not self.prefixes:
            return (self.n_latents,)
        sizes = [int(share * self.n_latents) for share in self.prefixes[:-1]]
        return (*sizes, self.n_latents - sum(sizes))

    @property
    def alike(self) -> "SAEConfig":
        """The same for all SAEs that differ in their seed and in their view of the stream only."""
        return replace(self, seed=0, own_order=False, drop_masked=False)

    @property
    def architecture(self) -> str:
        """Name for figures and tables, such as "Matryoshka BatchTopK"."""
        return ("Matryoshka " if self.prefixes else "") + type(self.selection).__name__

    @property
    def prefix_weight(self) -> float:
        """Weight of the whole reconstruction's mean squared error in the loss."""
        if not isinstance(self.prefix_weighting, str):
            return self.prefix_weighting[-1]
        groups = len(self.group_sizes)
        return {"1/G^2": 1 / groups**2, "mean": 1 / groups, "sum": 1.0}[self.prefix_weighting]

    @property
    def prefix_shares(self) -> tuple[float, ...]:
        """Weight of each prefix's error as a share of that of the whole reconstruction; the last is 1."""
        if isinstance(self.prefix_weighting, str):
            return (1.0,) * len(self.group_sizes)
        return tuple(weight / self.prefix_weighting[-1] for weight in self.prefix_weighting)

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` reads them back. What was added later is there only where it is in use,
        so that an SAE keeps its identity."""
        rule: Any = self.selection  # a dataclass, which the type of its base does not say
        selection = {"rule": type(rule).__name__} | asdict(rule)
        values = asdict(self) | {"selection": selection, "prefixes": list(self.prefixes)}
        if not isinstance(self.prefix_weighting, str):
            values["prefix_weighting"] = list(self.prefix_weighting)
        values["penalties"] = [{"penalty": type(penalty).__name__} | asdict(penalty) for penalty in self.penalties]
        return {name: value for name, value in values.items() if value or name not in ("penalties", "frozen_decoder")}

    @classmethod
    def from_dict(cls, values: dict) -> "SAEConfig":
        """Inverse of `to_dict`. Raises ConfigError for an unknown selection rule or penalty, and for what is no such
        dictionary."""
        try:
            values = dict(values)
            selection = _part(values.pop("selection"), "rule", "selection rule", SELECTIONS)
            penalties = tuple(_part(p, "penalty", "penalty", PENALTIES) for p in values.pop("penalties", ()))
            aux = values.pop("aux")
            return cls(selection=selection, aux=AuxK(**aux) if aux else None, penalties=penalties, **values)
        except ConfigError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"This is no configuration of an SAE ({type(error).__name__}: {error}).") from error


def _part(values: dict, key: str, what: str, known: dict):
    """A selection rule or a penalty from its dictionary, whose `key` holds the name of its class."""
    values = dict(values)
    name = values.pop(key, None)
    if name not in known:
        raise ConfigError(f"Unknown {what} {name!r}.{nearest(name, known)} Import the module of a {what} of your own.")
    return known[name](**values)
