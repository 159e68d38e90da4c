"""The stacked step of GPUs, run on the CPU as it is: of every architecture the updates of the plain dense step, and
nothing that a CUDA graph could not repeat."""

import json
from dataclasses import replace

import pytest
import torch
from one_device import OneDevice, Repeatable
from random_saes import WITH_TARGETS, random_batch, random_sae
from small_training import EVERY, D, F, Killed, killed, poisoned, run, same, sparse_world, stream, train_config

from masksae import C2R, MATRYOSHKA, SAE, AuxK, BatchTopK, OrtSAE, SAEConfig, TopK, TrainConfig
from masksae.errors import DataError
from masksae.memory import MOST_STACKED, training_bytes
from masksae.training import group
from masksae.training.group import load_snapshots
from masksae.training.stack import Stack
from masksae.training.step import Trainer

PENALTIES = (OrtSAE(every=2, chunk=40), C2R(every=3))

MANY = [
    *EVERY,
    SAEConfig(D, F, TopK(2), seed=5, drop_masked=True),
    SAEConfig(D, F, TopK(2), seed=6, own_order=True),
    SAEConfig(D, F, BatchTopK(3), (0.25, 0.75), seed=7, aux=AuxK(dead_after_tokens=3000)),
    SAEConfig(D, F, TopK(2), seed=8, penalties=PENALTIES[1:], frozen_decoder=True),
]
"""Stacks of one, two and three, on four views of the stream."""


@pytest.fixture
def stacked(monkeypatch):
    monkeypatch.setattr(group, "STACKED", {"cpu"})


def trainers(config: SAEConfig, recipe: TrainConfig, seeds=(0, 1, 2), aux_tokens=0) -> list[Trainer]:
    """In double precision, dense, with random values in every parameter."""
    found = []
    for seed in seeds:
        sae = random_sae(config.selection, config.prefixes)
        sae.config = replace(config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True) if config.selection.unit_rows else 1
            sae.tokens_since_fired[::3] = aux_tokens
        trainer = Trainer(sae, recipe)
        trainer.sparse = False
        found.append(trainer)
    return found


@pytest.mark.parametrize("prefixes", [(), MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("rule", WITH_TARGETS, ids=str)
def test_the_updates_are_those_of_the_dense_step(rule, prefixes):
    """In double precision to rounding, for 8 steps: with AuxK from the first on, penalties on most of them, the
    threshold from the fourth, the controller from the fifth; targets on every second one."""
    config = SAEConfig(24, 96, rule, prefixes, aux=AuxK(dead_after_tokens=100), penalties=PENALTIES)
    recipe = TrainConfig(steps=1000, lr=1e-2, warmup=12, threshold_start=13, sparsity_warmup=14, clip=0.5)
    plain, members = (trainers(config, recipe, aux_tokens=1000) for _ in range(2))
    stack = Stack(members, [0, 2, 0])
    stack.look(10)
    assert stack.views == [0, 2]
    for step in range(10, 18):
        views = [[random_batch(seed=10 * step + view)] for view in stack.views]
        if step % 2:
            views = [[x, x + 0.1 * random_batch(seed=99)] for [x] in views]
        stack.step(views, step, record=True)
        for trainer, view in zip(plain, stack.seen):
            x, *target = views[view]
            trainer.step(x, step, True, *target)
    for ours, theirs in zip(members, plain):
        expected, found = theirs.tensors(), ours.tensors()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")
        for a, b in zip(ours.sae.history, theirs.sae.history, strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    assert len({record["loss"] for trainer in plain for record in trainer.sae.history}) == 24


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_group_trains_as_its_members_do(stacked, monkeypatch, precision):
    """Whole runs in single precision, where near-ties may be decided otherwise: what the SAEs do is compared."""
    recipe = train_config(precision=precision)
    ours = run(recipe, MANY)
    monkeypatch.setattr(group, "STACKED", set())
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)  # the dense step
    x = sparse_world()[0]
    for a, b in zip(ours, run(recipe, MANY), strict=True):
        assert a.history[-1]["explained_variance"] == pytest.approx(b.history[-1]["explained_variance"], abs=0.01)
        assert (a(x) - b(x)).norm() < 0.05 * (b(x) - b(x).mean(0)).norm()
        assert a.W_dec.storage_offset() == 0 and a.W_enc.stride() == b.W_enc.stride()


def test_same_call_same_bytes(stacked):
    recipe = train_config(30)
    assert same(run(recipe, MANY), run(recipe, MANY))


def test_an_sae_hardly_depends_on_who_is_in_its_stack(stacked):
    recipe = train_config(30)
    together = run(recipe, MANY)
    for config, sae in zip(MANY, together):
        [alone] = run(recipe, [config])
        torch.testing.assert_close(alone.W_dec, sae.W_dec, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at", [1, 25])
def test_resuming_changes_no_byte(stacked, tmp_path, at):
    source = killed(stream(), at)
    config, saes = train_config(30, snapshots=(16,)), [MANY[1], *MANY[6:]]
    with pytest.raises(Killed):
        run(config, saes, source, checkpoint_dir=tmp_path / "killed")
    resumed, whole = (run(config, saes, checkpoint_dir=tmp_path / name) for name in ("killed", "whole"))
    assert same(resumed, whole) and same(whole, run(replace(config, snapshots=()), saes))
    snapshots = [load_snapshots(tmp_path / name) for name in ("killed", "whole")]
    assert same(snapshots[0][16], snapshots[1][16]) and same(snapshots[0][16], run(config.branch(16), saes))


def test_a_checkpoint_of_single_trainers_goes_on_in_a_stack(monkeypatch, tmp_path):
    """And the other way round: the files are the same."""
    saes = MANY[4:]
    whole = run(sae_configs=saes)
    for first, then in (({}, {"cpu"}), ({"cpu"}, {})):
        folder = tmp_path / str(len(first))
        monkeypatch.setattr(group, "STACKED", first)
        with monkeypatch.context() as patch:
            patch.setattr(group.Group, "check", lambda self: self.step < 22 or pytest.skip())
            try:
                run(sae_configs=saes, checkpoint_dir=folder)
            except pytest.skip.Exception:
                pass
        assert json.loads((folder / "checkpoint/state.json").read_text())["step"] == 20
        monkeypatch.setattr(group, "STACKED", then)
        for a, b in zip(run(sae_configs=saes, checkpoint_dir=folder), whole):
            assert a.history[-1]["explained_variance"] == pytest.approx(b.history[-1]["explained_variance"], abs=0.02)
            assert [r["step"] for r in a.history] == [r["step"] for r in b.history]


@pytest.mark.filterwarnings("error:There is a performance drop")  # vmap, of an operation that it repeats for each SAE
@pytest.mark.parametrize("prefixes", [(), MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("rule", WITH_TARGETS, ids=str)
def test_a_graph_could_repeat_every_step(rule, prefixes):
    """Nothing is read back, no shape depends on data, and what the host decides is in the phase: two steps of one phase
    run the same operations on the same shapes and numbers."""
    config = SAEConfig(
        24, 96, rule, prefixes, aux=AuxK(dead_after_tokens=500), penalties=(OrtSAE(every=2), C2R(every=3))
    )
    recipe = TrainConfig(steps=1000, lr=1e-2, warmup=2, threshold_start=3, sparsity_warmup=4)
    stack = Stack([Trainer(SAE(replace(config, seed=seed)), recipe) for seed in range(2)], [0, 1])
    seen: dict = {}
    for step in range(24):
        phase = stack.phase(step, 64)
        assert phase.fixed
        stack.schedule(step)
        inputs = [torch.stack([random_batch(dtype=torch.float32, seed=2 * step + view) for view in range(2)])]
        with Repeatable() as operations:
            stack.update(inputs, phase, step)
        assert seen.setdefault(phase, operations.seen) == operations.seen, step
        assert len(operations.seen) > 80
        stack.gradients(inputs[0], step)
        assert all(p.grad.stride() == p.stride() for p in stack.sae.parameters())
    assert {phase.dead_after for phase in seen} == {None, 500} and 8 <= len(seen) <= 16


def test_what_a_graph_cannot_repeat_is_refused():
    """The test above can fail."""
    x = torch.ones(3)
    for act in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0]):
        with Repeatable(), pytest.raises(AssertionError, match="waits for the device"):
            act()


def test_chunks_that_the_host_draws_are_not_captured():
    trainer = Trainer(SAE(SAEConfig(24, 96, TopK(4), penalties=(OrtSAE(every=2, chunk=40),))), TrainConfig(100))
    stack = Stack([trainer], [0])
    assert [stack.phase(step, 64).fixed for step in range(4)] == [False, True, False, True]


def test_aux_has_no_work_while_no_latent_can_be_dead():
    """Where AuxK is left out its loss was 0: looking more often, or resuming, changes nothing."""
    config = SAEConfig(D, F, BatchTopK(2), aux=AuxK(dead_after_tokens=2000))
    stack = Stack([Trainer(SAE(config), TrainConfig(1000))], [0])
    assert [stack.phase(step, 200).dead_after for step in (8, 9)] == [None, 2000]
    stack.sae.tokens_since_fired[0, 3] = 400
    stack.look(100)
    assert [stack.phase(step, 200).dead_after for step in (100, 106, 107)] == [None, None, 2000]


def test_a_rule_that_cannot_be_stacked_trains_beside_the_others(stacked, monkeypatch):
    monkeypatch.setattr(TopK, "stacked", False)
    saes = [SAEConfig(D, F, TopK(2), seed=1), SAEConfig(D, F, BatchTopK(2), seed=2), SAEConfig(D, F, TopK(2), seed=3)]
    found = group.Group(saes, stream(), train_config(), "cpu")
    assert found.alone == [0, 2] and [len(stack.members) for stack in found.stacks] == [1]
    mixed = run(sae_configs=saes)
    monkeypatch.setattr(group, "STACKED", set())
    assert same(mixed[::2], run(sae_configs=saes)[::2])


def test_stacks_are_of_one_architecture_and_not_too_large(stacked):
    saes = [SAEConfig(D, F, TopK(2 + i % 2), seed=i, drop_masked=i % 3 == 0) for i in range(2 * MOST_STACKED + 6)]
    found = group.Group(saes, stream(), train_config(), "cpu")
    assert [len(stack.members) for stack in found.stacks] == [MOST_STACKED, 3, MOST_STACKED, 3] and not found.alone
    assert all(len({m.sae.config.alike for m in stack.members}) == 1 for stack in found.stacks)
    one, all_of_them = (training_bytes(each, 200, sparse=False) for each in (saes[:1], saes))
    assert one < all_of_them < len(saes) * one


def test_an_exploding_loss_names_the_sae(stacked):
    source = poisoned(stream())
    with pytest.raises(DataError, match=r"SAE 0 \(SAEConfig.*at step 24"):
        run(sae_configs=MANY[:2], source=source)


@pytest.mark.parametrize("rule", WITH_TARGETS, ids=str)
def test_no_step_mixes_devices(rule, monkeypatch):
    """On `meta`, but for Adam, which reads numbers there, and penalties, whose autocast does not know it."""
    config = SAEConfig(24, 96, rule, MATRYOSHKA, aux=AuxK(dead_after_tokens=100))
    with torch.device("meta"):
        saes = [SAE(replace(config, seed=seed)) for seed in range(2)]
    stack = Stack([Trainer(sae, TrainConfig(steps=100, threshold_start=1), "meta") for sae in saes], [0, 0])
    monkeypatch.setattr(stack.adam, "step", lambda: None)
    x = torch.empty(1, 64, 24, device="meta")
    with OneDevice(numbers=True):
        for step in (0, 5):
            stack.schedule(step)
            stack.update([x, x], stack.phase(step, 64), step)
