"""Random SAEs of every architecture, and batches for them."""

import torch

from masksae import SAE, BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK

ALL_RULES = (TopK(4), BatchTopK(4), JumpReLU(6.0, bandwidth=0.2, initial_threshold=0.3), ReLU(0.02), Gated(0.03))

WITH_TARGETS = (*ALL_RULES, ReLU(0.1, target_l0=4.0), Gated(0.1, target_l0=4.0))
"""All, and those whose coefficient a controller moves."""


def random_sae(rule=ALL_RULES[1], prefixes=(), weighting="1/G^2", d=24, n=96, aux=None, dtype=torch.float64) -> SAE:
    """An SAE of an architecture with random values in every parameter."""
    sae = SAE(SAEConfig(d, n, rule, prefixes, weighting, aux)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                parameter += (0.1 if name == "thresholds" else 0.2) * torch.randn(parameter.shape, generator=generator)
        if not rule.unit_rows:
            sae.W_dec *= 5 * (0.5 + torch.rand(n, 1, generator=generator))
            sae.W_enc *= 5
        if isinstance(rule, JumpReLU):
            sae.thresholds.clamp_(min=0)
    return sae


def random_batch(n=64, d=24, dtype=torch.float64, seed=0):
    """Activations [n, d]."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
