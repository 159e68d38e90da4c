"""A fraction of a run, measured where it would run: the same step and the same forward on the same shapes, for a few
seconds."""

import copy
import time
from collections import Counter

import torch

from masksae.app.plan import Plan, step_flop
from masksae.saes.sae import SAE
from masksae.tracing import activations
from masksae.training.step import Trainer

BLOCKS = 2
"""Blocks of the language model that are built and timed; its others are alike."""


def hours_here(plan: Plan, device: str) -> dict[str, float]:
    """Hours of the stages "activations" and "training" on this device, from a few forwards and steps on random
    values."""
    harvest, training, _ = plan.work
    rate = forward_rate(plan, device)
    steps = sum(count * step_seconds(plan, config, device) for config, count in _kinds(plan).items())
    seen = training.sae_flop / sum(map(step_flop, plan.saes)) / plan.profile.training.batch_size
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


def step_seconds(plan: Plan, config, device: str) -> float:
    """Of one training step of one SAE."""
    batch = plan.profile.training.batch_size
    trainer = Trainer(SAE(config), plan.profile.training.config(max(plan.steps, 2)), device)
    x = torch.randn(batch, config.d_model, generator=torch.Generator().manual_seed(0)).to(device) / config.d_model**0.5
    return _best(lambda: trainer.step(x, trainer.config.warmup), device)


def _kinds(plan: Plan) -> Counter:
    """SAEs that differ in more than their seed, and how many there are of each."""
    from dataclasses import replace

    return Counter(replace(config, seed=0) for config in plan.saes)


def _best(act, device: str, times: int = 4) -> float:
    """Seconds of the fastest of some calls, the first left out."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
