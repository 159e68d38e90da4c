"""For the first machine that has a GPU: `pytest -m gpu tests/core/test_gpu.py`. Skipped elsewhere; none of it has run
yet.

What is asserted must hold on any GPU. What should be fast is printed as a ratio with the value to expect, since times
are no tests: overlapping the forwards with training 1.2 or more where both take about as long, half precision 1.5 or
more on the step, a share of the data sheet of .2 to .5 (`SHARE` in `plan.py` assumes .4). `make benchmark` gives the
ratio to the peers' steps.
"""

import time

import pytest
import torch
from random_saes import ALL_RULES
from small_training import EVERY, configs, run, same, stream, train_config
from tiny_project import tiny_model

import masksae
from masksae import C2R, MATRYOSHKA, AuxK, BatchTopK, OrtSAE, SAEConfig, TrainConfig
from masksae.activations import from_model
from masksae.memory import training_bytes
from masksae.metrics.reconstruction import reconstruction
from masksae.saes.sae import SAE
from masksae.training.step import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(**options):
    return run(device="cuda", **options)


def test_the_same_device_gives_the_same_bytes():
    assert same(on_gpu(sae_configs=EVERY), on_gpu(sae_configs=EVERY))


def test_a_gpu_agrees_with_the_cpu_to_rounding():
    """Selection may flip at near-ties, so what is compared is what the SAEs do."""
    x = stream()._current()[0]
    for here, there in zip(run(sae_configs=EVERY), on_gpu(sae_configs=EVERY), strict=True):
        ours, theirs = (reconstruction(sae, x) for sae in (here, there.cpu()))
        assert ours.ev_centred == pytest.approx(theirs.ev_centred, abs=0.02)
        assert ours.l0 == pytest.approx(theirs.l0, rel=0.05)


def test_resuming_changes_no_byte(tmp_path):
    class Killed(Exception):
        pass

    source = stream()
    take, left = source.batches, [35]

    def failing(views):
        for batch in take(views):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            yield batch

    source.batches = failing
    with pytest.raises(Killed):
        on_gpu(source=source, checkpoint_dir=tmp_path)
    assert same(on_gpu(checkpoint_dir=tmp_path), on_gpu())


@pytest.mark.parametrize("prefixes", [(), MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_no_step_waits_for_the_device(rule, prefixes):
    aux = AuxK(dead_after_tokens=100) if rule.revived else None
    trainer = Trainer(
        SAE(SAEConfig(24, 96, rule, prefixes, aux=aux, penalties=(OrtSAE(every=2, chunk=40), C2R(every=3)))),
        TrainConfig(steps=1000, warmup=5, threshold_start=3),
        "cuda",
    )
    x = torch.randn(64, 24, device="cuda")
    trainer.step(x, 0)  # Adam makes its state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 8):
            trainer.step(x, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_pool_made_beside_training_changes_nothing(kind, dtype, ids):
    from types import SimpleNamespace

    model = SimpleNamespace(model=tiny_model(kind).to("cuda", dtype))
    options = dict(
        block=1, p=0.4, token_id=1, mask_seed=0, bos_id=None, batch_size=8, seed=0, pool_tokens=30, progress=False
    )
    config = TrainConfig(steps=40, lr=1e-3, warmup=2, threshold_start=5)
    saes = [SAEConfig(16, 32, BatchTopK(3), seed=s) for s in range(2)]
    found = [
        masksae.train(saes, from_model(model, ids, overlap=overlap, **options), config, device="cuda", progress=False)
        for overlap in (False, True)
    ]
    assert same(*found)


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("replacements", [None, torch.tensor([3, 4])], ids=["token", "drawn"])
def test_masks_are_those_of_the_cpu(ids, p, replacements):
    options = dict(p=p, token_id=1, seed=0, spare=(5,), replacements=replacements)
    for here, there in zip(masksae.mask_tokens(ids, **options), masksae.mask_tokens(ids.cuda(), **options)):
        assert there.is_cuda and torch.equal(here, there.cpu())


def test_a_large_array_stays_in_memory_and_gives_the_same_batches(monkeypatch):
    whole = next(stream().to("cuda").batches([(0, True)]))[0]
    monkeypatch.setattr("masksae.activations.LARGEST_MOVED", 0)
    source = stream().to("cuda")
    for a, b in zip(whole, next(source.batches([(0, True)]))[0]):
        assert a.is_cuda and b.is_cuda and torch.equal(a, b)
    assert not source._current()[0].is_cuda


def test_half_precision_loses_little():
    full = on_gpu(config=train_config(steps=200))
    half = on_gpu(config=train_config(steps=200, precision="bfloat16"))
    x = stream()._current()[0].cuda()
    for a, b in zip(full, half):
        assert reconstruction(b, x).ev_centred > reconstruction(a, x).ev_centred - 0.03


def test_scores_are_those_of_the_cpu():
    x = stream()._current()[0]
    for sae in run(sae_configs=configs()):
        here = reconstruction(sae, x).to_dict()
        there = reconstruction(sae.to("cuda"), x).to_dict()
        for name, value in here.items():
            assert there[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_memory_is_what_the_formula_says():
    saes = [SAEConfig(768, 4096, BatchTopK(k), MATRYOSHKA, aux=AuxK()) for k in (20, 160)]
    x = torch.randn(16384, 768)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    source = masksae.ActivationStream.from_array(x, batch_size=2048, seed=0)
    masksae.train(saes, source, TrainConfig(steps=8, warmup=2, threshold_start=2), device="cuda", progress=False)
    peak = torch.cuda.max_memory_allocated() - before - 4 * x.numel()
    assert 0.5 < peak / training_bytes(saes, 2048, sparse=False) < 1.1


def test_ratios_to_expect(capsys):
    """Prints, asserts only that there is something to print."""
    seconds = {}
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(
            SAE(SAEConfig(768, 4096, BatchTopK(20), MATRYOSHKA)), TrainConfig(steps=10**6, precision=precision), "cuda"
        )
        x = torch.randn(2048, 768, device="cuda") / 28
        for step in range(20):
            if step == 10:
                torch.cuda.synchronize()
                start = time.perf_counter()
            trainer.step(x, 2000 + step)
        torch.cuda.synchronize()
        seconds[precision] = (time.perf_counter() - start) / 10
    rate = 10 * 768 * 4096 * 2048 / seconds["bfloat16"] / 1e12
    with capsys.disabled():
        print(
            f"\nstep {seconds}, bfloat16 {seconds['float32'] / seconds['bfloat16']:.2f} times faster (expect 1.5), "
            f"{rate:.0f} TFLOP/s in bfloat16"
        )
    assert rate > 0
