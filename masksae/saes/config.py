"""Architectures as data: SAE = selection rule x prefixes x auxiliary loss. Each part is a small frozen config.

"Matryoshka BatchTopK" is `SAEConfig(d, n, BatchTopK(20), prefixes=MATRYOSHKA)`. Impossible combinations raise ConfigError
here, so nothing that follows needs to check again.
"""

from dataclasses import asdict, dataclass

from masksae.errors import ConfigError, nearest

MATRYOSHKA = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)
"""Group fractions of SAEBench's own Matryoshka suite."""

WEIGHTINGS = ("1/G^2", "mean", "sum")


@dataclass(frozen=True)
class BatchTopK:
    """Keep the k x batch largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    k: int
    """Mean number of latents kept per token. At inference a threshold takes over: the running mean of the smallest kept."""

    def __post_init__(self):
        _positive_int("BatchTopK.k", self.k)


@dataclass(frozen=True)
class AuxK:
    """Revive dead latents: they reconstruct what the living ones left over (Gao et al. 2024, arXiv 2406.04093)."""

    k: int | None = None
    """Dead latents used per token; None: half of d_model."""
    coefficient: float = 1 / 32
    """Weight of this loss; the loss itself is normalised by the variance of the residual."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for so many tokens."""

    def __post_init__(self):
        if self.k is not None:
            _positive_int("AuxK.k", self.k)
        _positive_int("AuxK.dead_after_tokens", self.dead_after_tokens)
        if not self.coefficient >= 0:
            raise ConfigError(f"AuxK.coefficient must be at least 0, found {self.coefficient!r}.")


@dataclass(frozen=True)
class SAEConfig:
    """Everything that defines an SAE before training."""

    d_model: int
    """Width of the activations."""
    n_latents: int
    """Width of the dictionary, F."""
    selection: BatchTopK
    """Which latents stay active."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka group fractions in dictionary order, summing to 1 (Bussmann et al. 2025, arXiv 2503.17547). () is off."""
    prefix_weighting: str = "1/G^2"
    """Weight of each of the G prefix losses: "1/G^2" (dictionary_learning's mean of means), "mean" (1/G) or "sum" (1)."""
    aux: AuxK | None = None
    """Auxiliary loss; None is off."""
    seed: int = 0
    """Of the initial decoder directions."""

    def __post_init__(self):
        _positive_int("d_model", self.d_model)
        _positive_int("n_latents", self.n_latents)
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if isinstance(self.selection, str) or type(self.selection).__name__ not in SELECTIONS:
            raise ConfigError(
                f"selection must be one of the selection configs, such as BatchTopK(20), found {self.selection!r}.{nearest(self.selection, SELECTIONS)}"
            )
        if self.selection.k > self.n_latents:
            raise ConfigError(
                f"k = {self.selection.k} latents cannot be kept of n_latents = {self.n_latents}. Lower k or widen the dictionary."
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
        """Inverse of `to_dict`. Raises ConfigError for an unknown selection rule."""
        values = dict(values)
        selection = dict(values.pop("selection"))
        rule = selection.pop("rule", None)
        if rule not in SELECTIONS:
            raise ConfigError(f"Unknown selection rule {rule!r}.{nearest(rule, SELECTIONS)}")
        aux = values.pop("aux")
        return cls(selection=SELECTIONS[rule](**selection), aux=AuxK(**aux) if aux else None, **values)


SELECTIONS = {"BatchTopK": BatchTopK}


def _positive_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, found {value!r}.")
