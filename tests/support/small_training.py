"""A small world of sparse sums, and short trainings on it."""

import torch

import masksae
from masksae import (
    ActivationStream,
    AuxK,
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SAEConfig,
    TopK,
    TrainConfig,
)  # fmt: skip
from masksae.saes.sae import SAE

D, F = 16, 32


def sparse_world(n=6000, seed=0, dtype=None):
    """Activations that are sparse sums of 20 known directions, plus an offset."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(20, D, generator=generator, dtype=dtype), dim=1)
    active = torch.rand(n, 20, generator=generator, dtype=dtype) < 0.1
    amounts = 3 * (0.5 + torch.rand(n, 20, generator=generator, dtype=dtype))
    return (active * amounts) @ directions + 2.0, directions


def stream(seed=0, batch_size=200, **changes):
    x = sparse_world(**changes)[0]
    return ActivationStream.from_array(x, batch_size=batch_size, seed=seed, is_masked=torch.arange(len(x)) % 3 == 0)


EVERY = [
    SAEConfig(D, F, TopK(2), seed=0),
    SAEConfig(D, F, BatchTopK(3), (0.25, 0.75), seed=1, own_order=True, aux=AuxK(dead_after_tokens=3000)),
    SAEConfig(D, F, JumpReLU(3.0), seed=2, drop_masked=True),
    SAEConfig(D, F, ReLU(0.05, target_l0=3.0), (0.5, 0.5), seed=3),
    SAEConfig(D, F, Gated(0.05), seed=4),
]
"""One SAE of each architecture, with every option in use."""


def configs(**changes):
    return [
        SAEConfig(D, F, BatchTopK(2), seed=0, **changes),
        SAEConfig(D, F, BatchTopK(3), (0.25, 0.75), seed=1, **changes),
    ]


def train_config(steps=60, **changes):
    return TrainConfig(
        **(
            dict(
                steps=steps, lr=3e-3, warmup=5, threshold_start=20, threshold_ema=0.9, log_every=7, checkpoint_every=10
            )
            | changes
        )
    )


def run(config=None, sae_configs=None, source=None, **options):
    return masksae.train(
        sae_configs or configs(), source or stream(), config or train_config(), progress=False, **options
    )


class Killed(Exception):
    """What a `killed` stream ends a training with."""


def killed(source: ActivationStream, at: int) -> ActivationStream:
    """The stream, which raises Killed in place of its batch number `at`, counted from 1."""
    take, left = source.batches, [at]

    def failing(views):
        for batch in take(views):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            yield batch

    source.batches = failing
    return source


class Poisoned(ActivationStream):
    """Batch 24 is a million times too large."""

    def batches(self, views):
        for i, batch in enumerate(super().batches(views)):
            yield [(x * 1e6 if i == 24 else x, m) for x, m in batch]


def poisoned(source: ActivationStream) -> ActivationStream:
    """The stream as a `Poisoned` one."""
    source.__class__ = Poisoned
    return source


def same(a: list[SAE], b: list[SAE]) -> bool:
    return all(
        torch.equal(x.state_dict()[k], y.state_dict()[k]) for x, y in zip(a, b, strict=True) for k in x.state_dict()
    )
