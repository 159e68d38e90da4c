"""Training: learns a known dictionary, logs without touching anything, refuses what cannot work."""

import contextlib
import json
import re
from dataclasses import replace

import pytest
import torch
from small_training import EVERY, D, F, configs, poisoned, run, same, sparse_world, stream, train_config

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
    load_snapshots,
)
from masksae.errors import ConfigError, DataError
from masksae.saes.sae import SAE
from masksae.study.sections import Training
from masksae.training import logs
from masksae.training.group import geometric_median
from masksae.training.step import Trainer


def test_recovers_the_directions_that_made_the_data():
    x, directions = sparse_world(40000)
    config = TrainConfig(steps=600, lr=1e-2, warmup=50, threshold_start=200, threshold_ema=0.99)
    source = ActivationStream.from_array(x, batch_size=500, seed=0)
    sae = masksae.train(
        [SAEConfig(D, F, BatchTopK(2), aux=AuxK(dead_after_tokens=50_000))], source, config, progress=False
    )[0]
    assert masksae.metrics.explained_variance(x, sae(x)) > 0.95
    assert (directions @ sae.W_dec.t()).max(1).values.min() > 0.9
    assert (sae.encode(x) > 0).double().sum(1).mean().item() == pytest.approx(2, rel=0.05)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


def test_same_call_same_bytes():
    assert same(run(sae_configs=EVERY), run(sae_configs=EVERY))


def test_each_sae_is_the_same_alone_and_in_company():
    together = run(sae_configs=EVERY)
    for config, sae in zip(EVERY, together):
        assert same(run(sae_configs=[config]), [sae])


def test_logging_and_checkpoints_change_nothing(tmp_path):
    quiet = run(train_config(log_every=10_000, checkpoint_every=10_000), EVERY)
    busy = train_config(log_every=1, checkpoint_every=1, snapshots="log")
    assert same(quiet, run(busy, EVERY, checkpoint_dir=tmp_path))


@pytest.mark.parametrize("config", EVERY[:4], ids=lambda c: type(c.selection).__name__)
def test_each_architecture_meets_its_target(config):
    steps = 1500
    config = replace(config, own_order=False, drop_masked=False)
    recipe = TrainConfig(steps=steps, lr=3e-3, warmup=50, threshold_start=200, threshold_ema=0.99, sparsity_warmup=100)
    x = sparse_world(40000)[0]
    sae = masksae.train([config], ActivationStream.from_array(x, batch_size=500, seed=0), recipe, progress=False)[0]
    l0 = (sae.encode(x) > 0).double().sum(1).mean().item()
    assert l0 == pytest.approx(config.selection.goal, rel=0.15)
    assert masksae.metrics.explained_variance(x, sae(x)) > 0.6


def test_a_larger_coefficient_makes_a_gated_sae_sparser():
    l0 = []
    for l1 in (0.02, 0.2):
        recipe = train_config(steps=600, sparsity_warmup=50)
        sae = run(recipe, [SAEConfig(D, F, Gated(l1))])[0]
        l0.append((sae.encode(sparse_world()[0]) > 0).double().sum(1).mean().item())
    assert l0[1] < 0.7 * l0[0]


def test_history_measures_what_it_names():
    sae = run()[0]
    first, last = sae.history[0], sae.history[-1]
    assert last["loss"] < first["loss"] and last["explained_variance"] > first["explained_variance"]
    assert all(record["l0"] == 2 for record in sae.history)
    assert first["threshold"] < 0 < last["threshold"]


def test_threshold_follows_the_smallest_kept_value():
    sae = run(train_config(threshold_ema=0.0, decay=0.0), configs()[:1])[0]
    l0 = (sae.encode(sparse_world()[0]) > 0).double().sum(1).mean().item()
    assert l0 == pytest.approx(2, rel=0.1)


def test_geometric_median_against_a_minimiser():
    from scipy.optimize import minimize

    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double() ** 3
    best = minimize(lambda m: (x - torch.as_tensor(m)).norm(dim=1).sum().item(), x.mean(0).numpy(), tol=1e-10).x
    torch.testing.assert_close(
        geometric_median(x, tolerance=1e-12, iterations=1000), torch.as_tensor(best), rtol=1e-4, atol=1e-4
    )


def test_a_recipe_left_alone_follows_its_steps():
    """As a profile's does; what is given stands, and long runs are as they were."""
    short, long = TrainConfig(60), TrainConfig(10_000)
    assert (short.warmup, short.threshold_start, short.threshold_ema) == (6, 20, pytest.approx(1 - 1 / 6))
    assert (long.warmup, long.threshold_start, long.threshold_ema) == (1000, 1000, 0.999)
    assert (TrainConfig(60, warmup=0).warmup, TrainConfig(60, threshold_start=7).threshold_start) == (0, 7)
    assert TrainConfig(1).threshold_start == 0
    assert Training().config(60) == replace(short, checkpoint_every=200)
    sae = run(TrainConfig(60, lr=3e-3), configs()[:1])[0]
    assert sae.threshold > 0 and sae.history[-1]["explained_variance"] > sae.history[0]["explained_variance"]


def test_latents_are_revived_in_a_run_of_any_length():
    """By default a latent counts as dead after a sixteenth of the run, 750 of 12,000 tokens here; a fixed number would
    never be reached."""
    without, revived, named = (
        run(sae_configs=[SAEConfig(D, F, BatchTopK(2), aux=aux)])[0]
        for aux in (None, AuxK(), AuxK(dead_after_tokens=750))
    )
    assert same([revived], [named]) and revived.config.aux.dead_after_tokens is None
    assert (revived.W_dec - without.W_dec).norm(dim=1).max() > 0.05


@pytest.mark.parametrize("batch_size, x", [(1, sparse_world(60)[0]), (20, torch.ones(1200, D))], ids=["one", "equal"])
def test_the_variance_of_equal_tokens_is_not_explained(tmp_path, batch_size, x):
    """A history is valid JSON: what has no number, the share of a variance of 0, is null."""
    source = ActivationStream.from_array(x, batch_size=batch_size, seed=0)
    log = logs.JsonLines(tmp_path / "log.jsonl", ["a"])
    sae = run(sae_configs=configs()[:1], source=source, checkpoint_dir=tmp_path / "kept", log=log)[0]
    assert all(record["explained_variance"] is None for record in sae.history)
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    for file in (tmp_path / "kept/checkpoint/state.json", sae.save(tmp_path / "sae") / "config.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_batch_in_which_nothing_fires_leaves_the_threshold():
    for rule in (BatchTopK(2), TopK(2)):
        sae = SAE(SAEConfig(D, F, rule))
        with torch.no_grad():
            sae.b_enc.fill_(-100)
            sae.threshold.fill_(0.5)
        trainer = Trainer(sae, train_config())
        trainer.step(sparse_world(200)[0], 50, record=True)
        assert sae.threshold == 0.5 and sae.history[0]["l0"] == 0 and (sae.tokens_since_fired == 200).all()


def test_learning_rate_by_hand():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.2, threshold_start=0)
    assert [config.lr_at(s) for s in (0, 9, 10, 79, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


@pytest.mark.parametrize(
    "act, error, words",
    [
        (
            lambda: run(sae_configs=[SAEConfig(D + 1, F, BatchTopK(2))]),
            ConfigError,
            f"width {D + 1}, the stream gives {D}",
        ),
        (lambda: masksae.train([], stream(), train_config(), progress=False), ConfigError, "empty"),
        (lambda: train_config(steps=0), ConfigError, "steps"),
        (lambda: train_config(steps=4), ConfigError, "warmup"),
        (lambda: train_config(sparsity_warmup=60), ConfigError, r"sparsity_warmup \(60\) must be below steps \(60\)"),
        (lambda: train_config(lr=-1.0), ConfigError, "lr"),
        (lambda: train_config(steps=60.5), ConfigError, "TrainConfig.steps must be a positive integer, found 60.5"),
        (lambda: train_config(log_every=0), ConfigError, "log_every must be a positive integer, found 0"),
        (lambda: train_config(checkpoint_every=0), ConfigError, "checkpoint_every must be a positive integer, found 0"),
        (lambda: train_config(snapshots=10), ConfigError, r"snapshots must be steps, such as \(10, 20\)"),
        (lambda: train_config(snapshots="lag"), ConfigError, "snapshots must be steps"),
        (lambda: train_config(snapshots=(10, 61)), ConfigError, "snapshots must be a positive integer, 60 at most"),
        (
            lambda: run(sae_configs=configs(aux=AuxK(dead_after_tokens=12_000))),
            ConfigError,
            "dead_after_tokens is 12,000 and the run sees 12,000 tokens: .*sixteenth of the run: 750",
        ),
        (
            lambda: run(sae_configs=[SAEConfig(D, F, BatchTopK(0.001))]),
            ConfigError,
            "k = 0.001 keeps no latent in a batch of 200",
        ),
        (
            lambda: run(source=ActivationStream.from_array(torch.zeros(400, D), batch_size=200, seed=0)),
            DataError,
            "all zero. Look at the model",
        ),
        (
            lambda: run(source=ActivationStream.from_array(sparse_world()[0] * torch.nan, batch_size=200, seed=0)),
            DataError,
            "NaN",
        ),
    ],
)
def test_bad_input(act, error, words):
    with pytest.raises(error, match=words):
        act()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_exploding_loss_stops_with_the_step_the_sae_and_the_last_checkpoint(tmp_path, log_every):
    """The culprit is named by the step at which it happened, however rarely the device is asked."""

    source = poisoned(stream())
    with pytest.raises(DataError, match=r"SAE 0 \(SAEConfig.*at step 24\. The checkpoint of step 20 was kept"):
        run(train_config(log_every=log_every), source=source, checkpoint_dir=tmp_path)
    assert json.loads((tmp_path / "checkpoint/state.json").read_text())["step"] == 20
    assert same(run(checkpoint_dir=tmp_path), run())


def test_denoising_learns_to_undo_noise():
    """Targets are clean activations, inputs have noise: the SAE's output is nearer to the clean ones than an ordinary
    SAE's."""
    x, _ = sparse_world()
    noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    source = ActivationStream.from_array(noisy, batch_size=200, seed=0)
    denoising = source.with_targets(ActivationStream.from_array(x, batch_size=200, seed=0))
    config = [SAEConfig(D, F, BatchTopK(3), seed=0)]
    [plain] = run(train_config(400), config, ActivationStream.from_array(noisy, batch_size=200, seed=0))
    [trained] = run(train_config(400), config, denoising)
    error = lambda sae: (sae(noisy) - x).square().mean().item()
    assert error(trained) < 0.97 * error(plain)


def test_targets_that_are_the_input_change_nothing():
    source = stream()
    [*plain] = run(train_config(30), EVERY)
    same_targets = ActivationStream.from_array(sparse_world()[0], batch_size=200, seed=0)
    [*again] = run(train_config(30), EVERY, source.with_targets(same_targets))
    assert same(plain, again)


@pytest.mark.parametrize("rule", [ReLU(0.05), Gated(0.05), JumpReLU(3.0), TopK(2), BatchTopK(2)], ids=str)
@pytest.mark.parametrize("denoise", [False, True])
def test_what_stands_at_dropped_positions_changes_nothing(rule, denoise):
    """Neither the scale nor anything else: masked rows may be as long as attention sinks are, or hold nothing."""
    x, masked = sparse_world(2000)[0], torch.arange(2000) % 3 == 0
    found = []
    for times in (1.0, 30.0, 0.0):
        rows = torch.where(masked[:, None], times * x, x)
        source = ActivationStream.from_array(rows, batch_size=200, seed=0, is_masked=masked)
        if denoise:
            source = source.with_targets(ActivationStream.from_array(2 * rows, batch_size=200, seed=0))
        found.append(run(sae_configs=[SAEConfig(D, F, rule, drop_masked=True)], source=source))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_each_view_has_a_scale_of_its_own(tmp_path):
    """In company with an SAE that sees the masked rows too, and from a checkpoint and snapshots, an SAE is that of its
    own positions."""
    x, masked = sparse_world(2000)[0], torch.arange(2000) % 3 == 0
    x[masked] *= 30
    source = lambda: ActivationStream.from_array(x, batch_size=200, seed=0, is_masked=masked)
    saes = [SAEConfig(D, F, TopK(2), drop_masked=dropped) for dropped in (False, True)]
    config = train_config(40, snapshots=(20,))
    together = run(config, saes, source(), checkpoint_dir=tmp_path)
    assert same(together, [run(train_config(40), [sae], source())[0] for sae in saes])
    assert same(load_snapshots(tmp_path)[20], [run(config.branch(20), [sae], source())[0] for sae in saes])
    (short, long), ordinary = ((sae(x[~masked]).square().mean() for sae in together), x[~masked].square().mean())
    assert long.item() == pytest.approx(ordinary.item(), rel=0.3) and short != long


def test_the_coefficient_has_warmed_up_in_half_of_a_run():
    """5 warm-ups are 500 steps of 400 here: l1 would never be whole, and its controller never at work."""
    config = TrainConfig(400, lr=3e-3, warmup=100)
    assert (config.sparsity_steps, TrainConfig(4000, warmup=100).sparsity_steps) == (200, 500)
    assert config.branch(100).sparsity_steps == 200  # the trunk's, on which the branch begins
    sae = run(config, [SAEConfig(D, F, ReLU(0.01, target_l0=4))])[0]
    assert 2 < sae.history[-1]["l0"] < 6 and sae.history[-1]["l1"] > 0.02


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def in_single():
    """Trained before anything changes a process's default type."""
    return run(sae_configs=EVERY)


def test_the_default_type_of_a_process_changes_nothing(in_single, double, tmp_path):
    x, masked = sparse_world(dtype=torch.float32)[0], torch.arange(6000) % 3 == 0
    source = ActivationStream.from_array(x, batch_size=200, seed=0, is_masked=masked)
    found = run(sae_configs=EVERY, source=source)
    assert same(found, in_single) and [a.history for a in found] == [b.history for b in in_single]
    for sae in found:
        kept = SAE.load(sae.save(tmp_path / "sae"))
        assert {v.dtype for v in kept.state_dict().values()} == {torch.float32, torch.int64}
        assert kept(x[:3]).dtype == kept(x[:3].double()).dtype == torch.float32


HALF = lambda: torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, HALF], ids=["no_grad", "inference", "autocast"])
def test_the_mode_of_the_caller_changes_nothing(in_single, mode):
    x, masked = sparse_world()[0], torch.arange(6000) % 3 == 0
    with mode():
        source = ActivationStream.from_array(x.clone(), batch_size=200, seed=0, is_masked=masked)
        assert same(run(sae_configs=EVERY, source=source), in_single)


def test_half_precision_inside_an_autocast_sees_the_weights_of_every_step():
    """Autocast keeps a copy of the weights until the outermost one ends."""
    config, x = TrainConfig(20, lr=3e-3, precision="bfloat16"), sparse_world()[0]
    found = []
    for enabled in (False, True):
        trainer = Trainer(SAE(SAEConfig(D, F, TopK(2))), config)
        with torch.autocast("cpu", dtype=torch.bfloat16) if enabled else contextlib.nullcontext():
            for step, batch in enumerate(x[:4000].split(200)):
                trainer.step(batch, step)
        found.append(trainer.sae)
    assert same(found[:1], found[1:])


def test_activations_with_a_gradient_are_trained_on(in_single):
    x = sparse_world()[0].requires_grad_()
    masked = torch.arange(len(x)) % 3 == 0
    source = ActivationStream.from_array(x, batch_size=200, seed=0, is_masked=masked)
    assert same(run(sae_configs=EVERY, source=source), in_single) and x.grad is None


@pytest.mark.parametrize("rule, warned", [(JumpReLU(3.0), True), (ReLU(0.05), True), (TopK(2), False)], ids=str)
def test_a_mean_of_many_times_the_spread_is_warned_of(rule, warned, recwarn):
    x = sparse_world(2000)[0]
    x = x - x.mean(0)
    spread = x.square().sum(1).mean().sqrt()
    for times in (1, 40):
        source = ActivationStream.from_array(x + times * spread / D**0.5, batch_size=200, seed=0)
        run(TrainConfig(2), [SAEConfig(D, F, rule)], source)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == int(warned)
    if warned:
        assert recwarn[0].filename.endswith("small_training.py")  # where `train` was called
        assert re.search(f"(39|40|41) times their spread.*{type(rule).__name__}.*Subtract the mean", told[0])
