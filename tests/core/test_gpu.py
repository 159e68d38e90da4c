"""For the first machine that has a GPU: `pytest -m gpu tests/core/test_gpu.py`. Skipped elsewhere; none of it has run
yet.

What is asserted must hold on any GPU; how fast it is, `benchmarks/gpu.py` says.
"""

from dataclasses import replace

import pytest
import torch
from random_saes import ALL_RULES, WITH_TARGETS
from small_training import EVERY, D, F, Killed, configs, killed, run, same, sparse_world, stream, train_config
from tiny_project import tiny_model

import masksae
from masksae import (
    C2R,
    MATRYOSHKA,
    AuxK,
    BatchTopK,
    OrtSAE,
    SAEConfig,
    TopK,
    TrainConfig,
    load_saelens,
    load_snapshots,
)
from masksae.activations import from_model
from masksae.memory import training_bytes
from masksae.metrics.reconstruction import reconstruction
from masksae.saes.sae import SAE
from masksae.training import group
from masksae.training.stack import WARM_UP, Stack, own_stream
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


MANY = [
    *EVERY,
    SAEConfig(D, F, TopK(2), seed=5, drop_masked=True),
    SAEConfig(D, F, BatchTopK(3), (0.25, 0.75), seed=7, aux=AuxK(dead_after_tokens=3000)),
    SAEConfig(D, F, TopK(2), seed=8, penalties=(OrtSAE(every=2), C2R(every=3))),
    SAEConfig(D, F, TopK(2), seed=10, penalties=(C2R(every=3),), frozen_decoder=True),
    SAEConfig(D, F, TopK(2), seed=9, penalties=(OrtSAE(every=2, chunk=12),)),
]


def stack_of(config, recipe, graph: bool) -> Stack:
    trainers = [Trainer(SAE(replace(config, seed=seed)), recipe, "cuda") for seed in range(3)]
    stack = Stack(trainers, [0, 1, 0])
    stack.graphs = stack.graphs if graph else None
    return stack


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefixes", [(), MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("rule", WITH_TARGETS, ids=str)
def test_the_captured_graph_gives_the_bytes_of_the_step_that_it_repeats(rule, prefixes, precision):
    """Through every phase: AuxK from step 7 on, penalties, threshold, controller; each phase is met again after it was
    captured. Another size of batch is captured anew."""
    penalties = (OrtSAE(weight=0.2, every=2), C2R(every=3))
    config = SAEConfig(24, 96, rule, prefixes, aux=AuxK(dead_after_tokens=500), penalties=penalties)
    recipe = TrainConfig(1000, lr=1e-2, warmup=2, threshold_start=13, sparsity_warmup=24, precision=precision)
    generator = torch.Generator("cuda").manual_seed(0)
    with own_stream(torch.device("cuda")):
        captured, plain = (stack_of(config, recipe, graph) for graph in (True, False))
        for step in range(80):
            size = 64 if step < 70 else 48
            views = [[torch.randn(size, 24, device="cuda", generator=generator)] for _ in range(2)]
            for stack in (captured, plain):
                stack.step(views, step, record=step % 9 == 0)
    assert len(captured.graphs.captured) >= 4 and max(captured.graphs.runs.values()) > WARM_UP + 2
    for ours, theirs in zip(captured.members, plain.members):
        expected = theirs.tensors()
        for name, value in ours.tensors().items():
            assert torch.equal(value, expected[name]), name
        assert ours.sae.history == theirs.sae.history


def test_a_stack_agrees_with_single_trainers_to_rounding(monkeypatch):
    ours = on_gpu(sae_configs=MANY)
    monkeypatch.setattr(group, "STACKED", set())
    x = sparse_world()[0].cuda()
    for a, b in zip(ours, on_gpu(sae_configs=MANY), strict=True):
        assert a.history[-1]["explained_variance"] == pytest.approx(b.history[-1]["explained_variance"], abs=0.02)
        assert reconstruction(a, x).ev_centred == pytest.approx(reconstruction(b, x).ev_centred, abs=0.02)


@pytest.mark.parametrize("at", [1, 13, 35])
def test_resuming_and_snapshots_change_no_byte(tmp_path, at):
    source = killed(stream(), at)
    config = train_config(snapshots="log")
    with pytest.raises(Killed):
        on_gpu(config=config, sae_configs=MANY, source=source, checkpoint_dir=tmp_path / "killed")
    resumed, whole = (
        on_gpu(config=config, sae_configs=MANY, checkpoint_dir=tmp_path / name) for name in ("killed", "whole")
    )
    assert same(resumed, whole) and same(whole, on_gpu(sae_configs=MANY))
    ours, theirs = (load_snapshots(tmp_path / name) for name in ("killed", "whole"))
    assert sorted(ours) == [30, 60]
    for step, saes in ours.items():
        assert same(saes, theirs[step])
        assert same(saes, [sae.cpu() for sae in on_gpu(config=config.branch(step), sae_configs=MANY)])


def test_a_checkpoint_goes_on_on_another_device(tmp_path):
    config = train_config(checkpoint_every=60)
    on_gpu(config=config, sae_configs=MANY, checkpoint_dir=tmp_path)
    here = run(config, MANY, checkpoint_dir=tmp_path)
    assert same(here, [sae.cpu() for sae in on_gpu(config=config, sae_configs=MANY, checkpoint_dir=tmp_path)])


def test_an_sae_of_a_stack_has_memory_of_its_own_and_is_exported(tmp_path):
    for number, sae in enumerate(on_gpu(sae_configs=MANY)):
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in sae.state_dict().values())
        kept = SAE.load(sae.save(tmp_path / f"{number}"))
        assert same([kept], [sae.cpu()])
        if not sae.config.prefixes:
            x = sparse_world()[0][:100]
            folder = sae.to_saelens(tmp_path / f"lens{number}")
            torch.testing.assert_close(load_saelens(folder)(x), sae(x), rtol=1e-4, atol=1e-4)


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


def test_a_model_reads_and_is_spliced_as_on_the_cpu(ids):
    from masksae.tracing import activations, spliced_losses

    model = tiny_model("llama")
    here = activations(model, ids, block=1), spliced_losses(model, ids, {"half": lambda x: x / 2}, block=1)
    model.cuda()
    there = activations(model, ids, block=1), spliced_losses(model, ids, {"half": lambda x: x / 2}, block=1)
    torch.testing.assert_close(there[0], here[0], rtol=1e-2, atol=1e-2)
    for name, loss in here[1].items():
        assert there[1][name].ce == pytest.approx(loss.ce, abs=1e-2)


def test_pools_in_scratch_are_those_of_the_cpu_to_rounding(tmp_path, ids):
    """Made ahead, read back, moved; and one pool for the whole text, which stays."""
    from types import SimpleNamespace

    options = dict(block=1, p=0.4, token_id=1, mask_seed=0, bos_id=None, batch_size=8, seed=0, progress=False)
    for pool_tokens in (30, 10_000):
        found = []
        for device in ("cpu", "cuda"):
            model = SimpleNamespace(model=tiny_model("llama").to(device))
            scratch = tmp_path / f"{device}{pool_tokens}"
            source = from_model(model, ids, scratch=scratch, pool_tokens=pool_tokens, **options).to(device)
            found.append([x.cpu() for _, (x, _) in zip(range(30), source)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


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


def test_graphs_of_all_stacks_share_their_memory_and_change_no_byte(monkeypatch):
    """Ten architectures, each with phases of its own, replayed in another order than they were captured in."""
    shared = on_gpu(sae_configs=MANY)
    monkeypatch.setattr("masksae.training.stack.WARM_UP", 10**9)
    assert same(shared, on_gpu(sae_configs=MANY))
    found = group.Group(MANY, stream(), train_config(), "cuda")
    assert len(found.stacks) > 3 and len({each.graphs.pool for each in found.stacks}) == 1
