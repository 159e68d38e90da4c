"""The recipe that the SAEs of a group share: steps, learning rate, warm-ups, snapshots. Every number that training needs, checked."""

import copy
from dataclasses import asdict, dataclass

from masksae.errors import ConfigError, nearest

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """What the SAEs of a group share.

    >>> TrainConfig(400, warmup=40, threshold_start=100, snapshots="log").snapshot_steps[-3:]
    [100, 200, 400]
    """

    steps: int
    """Optimiser steps."""
    lr: float = 3e-4
    """Peak learning rate of Adam."""
    warmup: int = 1000
    """Steps of linear warm-up."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    clip: float = 1.0
    """Largest norm of an SAE's gradient."""
    threshold_start: int = 1000
    """Step after which the inference threshold is estimated (TopK kinds)."""
    threshold_ema: float = 0.999
    """Memory of the threshold's running mean, per step."""
    sparsity_warmup: int | None = None
    """Steps over which the sparsity coefficient of L1 kinds and of JumpReLU grows linearly from 0; None: 5 times `warmup`."""
    precision: str = "float32"
    """"bfloat16": products in half precision by autocast, weights and Adam in single; worth it on GPUs, slow on most CPUs."""
    snapshots: tuple[int, ...] | str = ()
    """Steps n at which every SAE is also saved; "log": `steps` and its halves, quarters, ... Changes no result."""
    snapshot_decay: bool = True
    """Finish each snapshot on a branch with its own decay, so that it is the SAE that `steps = n` gives, byte for byte."""
    log_every: int = 20
    """Steps between records of `SAE.history`; changes no result."""
    checkpoint_every: int = 200
    """Steps between checkpoints; changes no result."""

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps must be positive, found {self.steps}.")
        if not 0 <= self.warmup < self.steps or not 0 <= self.threshold_start < self.steps:
            raise ConfigError(
                f"warmup ({self.warmup}) and threshold_start ({self.threshold_start}) must be below steps ({self.steps}). Train longer or lower them."
            )
        if not self.lr > 0 or not 0 <= self.decay <= 1 or not 0 <= self.threshold_ema < 1 or not self.clip > 0:
            raise ConfigError(f"lr and clip must be positive, decay in [0, 1], threshold_ema in [0, 1): found {self}.")
        if self.sparsity_steps < 0:
            raise ConfigError(f"sparsity_warmup must be at least 0, found {self.sparsity_warmup}.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is unknown.{nearest(self.precision, PRECISIONS)}")
        if isinstance(self.snapshots, str) and self.snapshots != "log":
            raise ConfigError(f'snapshots must be steps or "log", found {self.snapshots!r}.')
        if any(not 0 < n <= self.steps for n in self.snapshot_steps):
            raise ConfigError(f"snapshots must be steps from 1 to {self.steps}, found {self.snapshots}.")

    @property
    def sparsity_steps(self) -> int:
        """`sparsity_warmup` with its default filled in."""
        return 5 * self.warmup if self.sparsity_warmup is None else self.sparsity_warmup

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps of the snapshots, ascending.

        >>> TrainConfig(steps=3000, snapshots="log").snapshot_steps
        [23, 46, 93, 187, 375, 750, 1500, 3000]
        """
        if self.snapshots == "log":
            return [self.steps >> i for i in range(self.steps.bit_length()) if self.steps >> i >= 16][::-1]
        return sorted(set(self.snapshots))

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        up = (step + 1) / self.warmup if step < self.warmup else 1.0
        left = self.steps - step
        down = min(1.0, left / (self.decay * self.steps)) if self.decay else 1.0
        return self.lr * min(up, down)

    def branch(self, steps: int) -> "TrainConfig":
        """The same recipe for another number of steps."""
        short = copy.copy(self)  # steps may lie within the warm-up here, which a whole run may not
        object.__setattr__(short, "steps", steps)
        return short

    def identity(self) -> dict:
        """The values that change results."""
        neutral = ("log_every", "checkpoint_every", "snapshots", "snapshot_decay")
        return {name: value for name, value in asdict(self).items() if name not in neutral}
