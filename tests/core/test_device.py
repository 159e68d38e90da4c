"""The training step on the `meta` device: a tensor there has no values, so whatever waits for the device fails."""

import pytest
import torch
from one_device import OneDevice
from random_saes import ALL_RULES, random_batch, random_sae

from masksae import MATRYOSHKA, SAE, AuxK, Gated, ReLU, SAEConfig, TrainConfig
from masksae.training.step import Trainer

RULES = [*ALL_RULES, ReLU(0.1, target_l0=4.0), Gated(0.1, target_l0=4.0)]


@pytest.mark.parametrize("prefixes", [(), MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_step_waits_for_the_device(rule, prefixes):
    aux = AuxK(dead_after_tokens=100) if rule.revived else None
    with torch.device("meta"):
        sae = SAE(SAEConfig(24, 96, rule, prefixes, aux=aux))
    trainer = Trainer(sae, TrainConfig(steps=1000, warmup=5, threshold_start=3), "meta")
    x = torch.empty(64, 24, device="meta")
    with OneDevice():
        for step in range(8):  # from step 2 on latents may be dead, from step 4 on the threshold is estimated
            trainer.step(x, step)


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_is_loaded_where_the_optimiser_wants_it(fused):
    """Fused Adam (GPUs) takes `step` on the parameter's device, the plain one on the CPU; a checkpoint's tensors come
    from the CPU."""
    recipe, x = TrainConfig(steps=9, warmup=1, threshold_start=1), random_batch(dtype=torch.float32)
    saved = Trainer(random_sae(dtype=torch.float32), recipe)
    saved.step(x, 0)
    trainer = Trainer(random_sae(dtype=torch.float32), recipe, "meta")
    trainer.adam.param_groups[0]["fused"] = fused
    trainer.load(saved.tensors())
    assert set(trainer.adam.state) == set(trainer.sae.parameters())
    for parameter, state in trainer.adam.state.items():
        devices = {key: value.device.type for key, value in state.items()}
        assert devices == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
        assert all(state[key].stride() == parameter.stride() for key in ("exp_avg", "exp_avg_sq"))
    assert trainer.sae.device.type == trainer.coefficient.device.type == trainer.sae.threshold.device.type == "meta"


def test_the_meta_device_does_refuse_to_be_read():
    """The test above can fail: these are what it forbids."""
    x = torch.ones(3, device="meta")
    for act in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            act()
    with OneDevice(), pytest.raises(AssertionError, match="mixes"):
        x + torch.ones(3)


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_half_precision_products_keep_master_weights_in_single(rule):
    """Autocast to bfloat16: gradients within its rounding of the single-precision ones; weights, moments and state in
    single."""
    x = random_batch(256, dtype=torch.float32)
    sae, half = (random_sae(rule, MATRYOSHKA, dtype=torch.float32) for _ in range(2))
    recipe = dict(steps=1000, lr=1e-3, warmup=0, threshold_start=3)
    exact, trainer = Trainer(sae, TrainConfig(**recipe)), Trainer(half, TrainConfig(**recipe, precision="bfloat16"))
    assert not trainer.sparse
    exact.gradients(x, 5)
    outcome = trainer.gradients(x, 5)
    assert outcome.loss.dtype == torch.float32
    for (name, a), b in zip(sae.named_parameters(), half.parameters()):
        assert b.dtype == b.grad.dtype == torch.float32
        if name != "thresholds":  # theirs hangs on how many entries fall into a narrow window
            assert 0 < (a.grad - b.grad).norm() < 0.1 * a.grad.norm(), name
    for step in range(5, 10):
        trainer.step(x, step)
    assert all(v.dtype in (torch.float32, torch.int64) for v in trainer.tensors().values())
    assert trainer.failed.item() == -1
