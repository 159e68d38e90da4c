"""A fraction of a run, measured where it would run: the same step and the same forward on the same shapes, for a few
seconds."""

import copy
import time
from collections import Counter
from dataclasses import replace

import torch

from masksae.app.plan import Plan, step_flop
from masksae.memory import MOST_STACKED
from masksae.saes.sae import SAE
from masksae.tracing import activations
from masksae.training.group import STACKED
from masksae.training.stack import own_stream, stacks
from masksae.training.step import Trainer

BLOCKS = 2
"""Blocks of the language model that are built and timed; its others are alike."""


def hours_here(plan: Plan, device: str) -> dict[str, float]:
    """Hours of the stages "activations" and "training" on this device, from a few forwards and steps on random
    values."""
    harvest, training, _ = plan.work
    rate = forward_rate(plan, device)
    stacked = torch.device(device).type in STACKED
    steps = sum(n * step_seconds(plan, *kind, device) for kind, n in _kinds(plan, stacked).items())
    seen = training.sae_flop / sum(map(step_flop, plan.saes)) / plan.profile.training.batch_size  # steps of an SAE
    return {"activations": harvest.flop / rate / 3600, "training": seen * steps / 3600}


def forward_rate(plan: Plan, device: str) -> float:
    """FLOP/s of the language model's blocks."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(plan.config)
    config.num_hidden_layers = min(BLOCKS, config.num_hidden_layers)
    config.vocab_size = 1000  # the embedding costs no products
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    dtype = getattr(torch, plan.profile.model.dtype)
    model = AutoModelForCausalLM.from_config(config).to(device, dtype).eval().requires_grad_(False)
    batch = 16 if torch.device(device).type == "cpu" else 256
    ids = torch.randint(100, 900, (batch, plan.length), generator=torch.Generator().manual_seed(0))
    last = config.num_hidden_layers - 1
    seconds = _best(lambda: activations(model, ids, block=last, batch=batch, device=device, dtype=None), device)
    return plan.forward_flop(last, ids.numel()) / seconds


def step_seconds(plan: Plan, config, size: int, device: str) -> float:
    """Of one training step, for each of `size` SAEs that take it together (`training/stack.py`; on a CPU alone)."""
    batch, recipe = plan.profile.training.batch_size, plan.profile.training.config(max(plan.steps(), 2))
    x = torch.randn(batch, config.d_model, generator=torch.Generator().manual_seed(0)).to(device) / config.d_model**0.5
    with own_stream(torch.device(device)):
        trainers = [Trainer(SAE(replace(config, seed=seed)), recipe, device) for seed in range(size)]
        found, alone = stacks(trainers, [0] * size) if torch.device(device).type in STACKED else ([], range(size))

        def step() -> None:
            for stack in found:
                stack.step([[x]], recipe.warmup)
            for i in alone:
                trainers[i].step(x, recipe.warmup)

        return _best(step, device) / size


def _kinds(plan: Plan, stacked: bool = False) -> Counter:
    """(SAE, how many take their steps together) and how many SAEs of the plan do so."""
    found: Counter = Counter()
    for group in plan.groups:
        for config, n in Counter(config.alike for config in plan.configs(group)).items():
            found[config, min(n, MOST_STACKED) if stacked else 1] += n
    return found


def _best(act, device: str) -> float:
    """Seconds of the fastest of some calls, the first left out; on a GPU of those after the first steps too, which are
    not captured yet."""
    found = []
    for _ in range(4 if torch.device(device).type == "cpu" else 12):
        start = time.perf_counter()
        act()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
