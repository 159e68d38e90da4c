"""The recipe that the SAEs of a group share: steps, learning rate, warm-ups, snapshots. Every number that training
needs, checked."""

import copy
from dataclasses import asdict, dataclass

from masksae.errors import ConfigError, nearest
from masksae.saes.fields import keep_whole, whole

PRECISIONS = ("float32", "bfloat16")

LEAST_BRANCH = 0.1
"""Share of its steps over which a snapshot's branch is a run of its own, where the decay is shorter: room to estimate a
threshold."""


def sized(steps: int) -> dict[str, float]:
    """What a run of so many steps takes where its recipe says nothing: a tenth of the steps to warm up, the threshold
    after a third of them with a memory of a tenth; 1,000 steps each at most.

    >>> sized(60)
    {'warmup': 6, 'threshold_start': 20, 'threshold_ema': 0.8333333333333334}
    >>> sized(100_000)
    {'warmup': 1000, 'threshold_start': 1000, 'threshold_ema': 0.999}
    """
    memory = max(0.0, min(0.999, 1 - 10 / steps))
    return {"warmup": min(1000, steps // 10), "threshold_start": min(1000, steps // 3), "threshold_ema": memory}


@dataclass(frozen=True)
class TrainConfig:
    """What the SAEs of a group share. `warmup`, `threshold_start` and `threshold_ema` follow `steps` where they are
    left out (`sized`), and hold the number that was taken.

    >>> TrainConfig(400, warmup=40, threshold_start=100, snapshots="log").snapshot_steps[-3:]
    [100, 200, 400]
    >>> TrainConfig(60).warmup
    6
    """

    steps: int
    """Optimiser steps."""
    lr: float = 3e-4
    """Peak learning rate of Adam."""
    warmup: int | None = None
    """Steps of linear warm-up; None: a tenth of the steps, 1,000 at most."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    clip: float = 1.0
    """Largest norm of an SAE's gradient."""
    threshold_start: int | None = None
    """Step after which the inference threshold is estimated, the last step in any case (rules that need one); None: a
    third of the steps, 1,000 at most."""
    threshold_ema: float | None = None
    """Memory of the threshold's running mean, per step; None: .999, or a memory of a tenth of the steps in a shorter
    run."""
    sparsity_warmup: int | None = None
    """Steps over which the sparsity coefficient of L1 kinds and of JumpReLU grows linearly from 0, fewer than `steps`;
    None: 5 times `warmup`, half of the steps at most. What adapts the coefficient starts after them."""
    precision: str = "float32"
    """"bfloat16": products in half precision by autocast, weights and Adam in single; worth it on GPUs, slow on most
    CPUs. "float32" on a GPU is what PyTorch is told: TF32 in a run of the command line, else whole single precision
    (`torch.set_float32_matmul_precision`)."""
    snapshots: tuple[int, ...] | str = ()
    """Steps n at which every SAE is also saved, each finished on a branch with a decay of its own: byte for byte the
    SAE of `branch(n)`, that is of `steps = n` with this run's other values (an AuxK that says no `dead_after_tokens`
    takes those of the whole run, not of n steps). "log": `steps` and its halves, quarters, ... Changes no result."""
    log_every: int = 20
    """Steps between records of `SAE.history`; changes no result."""
    checkpoint_every: int = 200
    """Steps between checkpoints; changes no result."""

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every"):
            keep_whole(self, name)
        for name, value in sized(self.steps).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        keep_whole(self, "warmup", least=0)
        keep_whole(self, "threshold_start", least=0)
        if self.warmup >= self.steps or self.threshold_start >= self.steps:
            raise ConfigError(
                f"warmup ({self.warmup}) and threshold_start ({self.threshold_start}) must be below "
                f"steps ({self.steps}). Train longer, lower them, or leave them out."
            )
        if not self.lr > 0 or not 0 <= self.decay <= 1 or not 0 <= self.threshold_ema < 1 or not self.clip > 0:
            raise ConfigError(f"lr and clip must be positive, decay in [0, 1], threshold_ema in [0, 1): found {self}.")
        if self.sparsity_warmup is not None:
            keep_whole(self, "sparsity_warmup", least=0)
            if self.sparsity_warmup >= self.steps:
                raise ConfigError(
                    f"sparsity_warmup ({self.sparsity_warmup}) must be below steps ({self.steps}), or the sparsity "
                    "coefficient never takes its value. Train longer, lower it, or leave it out."
                )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is unknown.{nearest(self.precision, PRECISIONS)}")
        self._check_snapshots()

    def _check_snapshots(self) -> None:
        if self.snapshots == "log":
            return
        if isinstance(self.snapshots, str) or not hasattr(self.snapshots, "__iter__"):
            raise ConfigError(f'snapshots must be steps, such as (10, 20), or "log", found {self.snapshots!r}.')
        steps = tuple(whole("snapshots", n, most=self.steps) for n in self.snapshots)
        object.__setattr__(self, "snapshots", steps)

    @property
    def sparsity_steps(self) -> int:
        """`sparsity_warmup` with its default filled in."""
        return min(5 * self.warmup, self.steps // 2) if self.sparsity_warmup is None else self.sparsity_warmup

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps of the snapshots, ascending.

        >>> TrainConfig(steps=3000, snapshots="log").snapshot_steps
        [23, 46, 93, 187, 375, 750, 1500, 3000]
        """
        if self.snapshots == "log":
            return [self.steps >> i for i in range(self.steps.bit_length()) if self.steps >> i >= 16][::-1]
        return sorted({int(n) for n in self.snapshots})

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        up = (step + 1) / self.warmup if step < self.warmup else 1.0
        left = self.steps - step
        down = min(1.0, left / (self.decay * self.steps)) if self.decay else 1.0
        return self.lr * min(up, down)

    def leaves(self, n: int) -> int:
        """Step at which the branch to a snapshot of step n leaves the trunk: where its decay begins, or a tenth of its
        steps before the end."""
        return n if n == self.steps else int(n - max(self.decay, LEAST_BRANCH) * n)

    def branch(self, n: int) -> "TrainConfig":
        """The recipe of a snapshot: that of a run of n steps with this run's other values. Where n steps are too few
        for `threshold_start`, the threshold is estimated on the branch, with the memory of a run that short.

        >>> config = TrainConfig(1000, warmup=50, threshold_start=200, threshold_ema=0.98)
        >>> [(c.steps, c.threshold_start, c.threshold_ema) for c in (config.branch(400), config.branch(100))]
        [(400, 200, 0.98), (100, 79, 0.9)]
        """
        changes = {"steps": n, "snapshots": (), "sparsity_warmup": self.sparsity_steps}
        if self.threshold_start >= n - 1:
            changes["threshold_start"] = max(0, self.leaves(n) - 1)
            changes["threshold_ema"] = min(self.threshold_ema, sized(n)["threshold_ema"])
        short = copy.copy(self)  # n may lie within the warm-up here, which a whole run may not
        for name, value in changes.items():
            object.__setattr__(short, name, value)
        return short

    def identity(self) -> dict:
        """The values that change results."""
        neutral = ("log_every", "checkpoint_every", "snapshots")
        return {name: value for name, value in asdict(self).items() if name not in neutral}
