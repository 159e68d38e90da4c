"""What nnsight costs: `masksae.tracing.activations` against a bare forward hook that stops at the same block.

    python benchmarks/tracing.py [--rounds 15]

Both read the same blocks of the same model; rounds alternate, so that a slower moment of the machine hits both. Prints
the median of the ratios with their quartiles.
"""

import argparse
import contextlib
import time

import torch

from masksae.data.models import load_model
from masksae.tracing import activations, hook_point

BLOCK, SEQUENCES, LENGTH, BATCH = 4, 64, 128, 16


class Stop(Exception):
    pass


@torch.no_grad()
def bare(model, ids):
    """The same activations without nnsight."""
    parts = []

    def keep(module, inputs, output):
        parts.append(output[0] if isinstance(output, tuple) else output)
        raise Stop

    handle = model.get_submodule(hook_point(model, BLOCK)).register_forward_hook(keep)
    for part in ids.split(BATCH):
        with contextlib.suppress(Stop):
            model(input_ids=part, use_cache=False)
    handle.remove()
    return torch.cat(parts)


def seconds(function, *arguments, **options):
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    model = load_model("smollm2-135m").model
    ids = torch.randint(100, 40_000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    assert torch.equal(activations(model, ids, block=BLOCK, batch=BATCH), bare(model, ids))
    ratios, plain = [], []
    for i in range(rounds):
        if i % 2:
            ours, theirs = seconds(activations, model, ids, block=BLOCK, batch=BATCH), seconds(bare, model, ids)
        else:
            theirs, ours = seconds(bare, model, ids), seconds(activations, model, ids, block=BLOCK, batch=BATCH)
        ratios.append(ours / theirs)
        plain.append(theirs)
    low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    print(f"tracing / bare hook: {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {rounds} rounds)")
    print(
        f"bare hook: {SEQUENCES * LENGTH / min(plain):,.0f} tokens/s at best, block {BLOCK}, {BATCH} x {LENGTH} tokens "
        "a batch"
    )


if __name__ == "__main__":
    main()
