"""Training: learns a known dictionary, resumes bit for bit, logs without touching anything, refuses what cannot work."""

import json

import pytest
import torch

import masksae
from masksae import MATRYOSHKA, ActivationStream, AuxK, BatchTopK, SAEConfig, TrainConfig
from masksae.errors import CheckpointError, ConfigError, DataError
from masksae.saes.sae import SAE
from masksae.training import geometric_median

D, F = 16, 32


def sparse_world(n=6000, seed=0):
    """Activations that are sparse sums of 20 known directions, plus an offset."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(20, D, generator=generator), dim=1)
    active = torch.rand(n, 20, generator=generator) < 0.1
    amounts = 3 * (0.5 + torch.rand(n, 20, generator=generator))
    return (active * amounts) @ directions + 2.0, directions


def stream(seed=0, batch_size=200, **changes):
    return ActivationStream.from_array(sparse_world(**changes)[0], batch_size=batch_size, seed=seed)


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


def same(a: list[SAE], b: list[SAE]) -> bool:
    return all(
        torch.equal(x.state_dict()[k], y.state_dict()[k]) for x, y in zip(a, b, strict=True) for k in x.state_dict()
    )


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
    assert same(run(), run())


def test_each_sae_is_the_same_alone_and_in_company():
    together = run()
    for config, sae in zip(configs(), together):
        assert same(run(sae_configs=[config]), [sae])


def test_logging_and_checkpoints_change_nothing(tmp_path):
    quiet = run(train_config(log_every=10_000, checkpoint_every=10_000))
    assert same(quiet, run(train_config(log_every=1, checkpoint_every=1), checkpoint_dir=tmp_path))


@pytest.mark.parametrize("stop_at", [1, 10, 27, 59])
def test_resumes_to_the_same_bytes(tmp_path, stop_at):
    class Stop(Exception):
        pass

    class Stopping(ActivationStream):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == stop_at:
                    raise Stop
                yield batch

    broken = Stopping.from_array(sparse_world()[0], batch_size=200, seed=0)
    with pytest.raises(Stop):
        run(source=broken, checkpoint_dir=tmp_path)
    assert stop_at < 10 or json.loads((tmp_path / "checkpoint/state.json").read_text())["step"] == stop_at // 10 * 10
    resumed = run(checkpoint_dir=tmp_path)
    assert same(resumed, run())
    assert [r["step"] for r in resumed[0].history] == [0, 7, 14, 21, 28, 35, 42, 49, 56, 59]
    assert same(run(checkpoint_dir=tmp_path), resumed)  # finished: nothing is trained again


def test_interrupted_between_the_two_renames(tmp_path):
    run(train_config(checkpoint_every=10), checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / ".old-checkpoint")
    assert same(run(checkpoint_dir=tmp_path), run()) and not (tmp_path / ".old-checkpoint").exists()


def test_history_measures_what_it_names():
    sae = run()[0]
    first, last = sae.history[0], sae.history[-1]
    assert last["loss"] < first["loss"] and last["explained_variance"] > first["explained_variance"]
    assert all(record["l0"] == 2 for record in sae.history)
    assert first["threshold"] < 0 < last["threshold"]


def test_trained_on_scaled_activations_saved_for_raw_ones():
    x = sparse_world()[0]
    small, large = (run(source=ActivationStream.from_array(x * s, batch_size=200, seed=0))[0] for s in (1.0, 64.0))
    torch.testing.assert_close(large(64 * x), 64 * small(x), rtol=1e-4, atol=1e-2)


def test_a_step_with_dead_latents_follows_the_whole_loss():
    """The sparse gradient plus that of AuxK equals autograd on the definition of both."""
    from masksae.saes.loss import dense_loss, select
    from masksae.training import _Member

    x = sparse_world()[0][:300].double()
    x = (x - x.mean(0)) / x.norm(dim=1).mean()
    sae = SAE(SAEConfig(D, F, BatchTopK(2), (0.25, 0.75), aux=AuxK(k=3, dead_after_tokens=1000))).double()
    sae.tokens_since_fired[10:20] = 5000
    with torch.no_grad():
        sae.b_enc[10:20] -= 0.9 * sae.pre_activations(x)[:, 10:20].amax(0)  # they fire, but are hardly ever kept
    h = sae.pre_activations(x)
    kept = select(h.detach(), 2)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[10:20] = True
    dead[kept.col] = False
    assert dead.any()
    expected = torch.autograd.grad(dense_loss(sae, x, kept, h, dead)[0], list(sae.parameters()))
    without = torch.autograd.grad(dense_loss(sae, x, kept, sae.pre_activations(x))[0], list(sae.parameters()))
    assert not torch.allclose(expected[0], without[0])
    member = _Member(sae, train_config(lr=1e-12))
    member.to("cpu")
    seen = []
    member._descend = lambda lr: seen.extend(p.grad.clone() for p in sae.parameters())
    member.step(x, step=0, record=False)
    for got, want in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


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


def test_learning_rate_by_hand():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.2, threshold_start=0)
    assert [config.lr_at(s) for s in (0, 9, 10, 79, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


def test_checkpoint_of_another_configuration(tmp_path):
    run(checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="train differ"):
        run(train_config(lr=1e-3), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="saes differ"):
        run(sae_configs=configs(aux=AuxK()), checkpoint_dir=tmp_path)
    assert same(run(checkpoint_dir=tmp_path), run())


def test_truncated_checkpoint(tmp_path):
    run(checkpoint_dir=tmp_path)
    file = tmp_path / "checkpoint/state.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        run(checkpoint_dir=tmp_path)


def test_read_only_folder(tmp_path, as_nobody):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    source = stream()
    kind, message = as_nobody(lambda: run(source=source, checkpoint_dir=folder / "x"))
    assert kind == "OutputError" and "permission denied" in message


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
        (lambda: train_config(lr=-1.0), ConfigError, "lr"),
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


def test_exploding_loss_stops_with_the_step(tmp_path):
    with pytest.raises(DataError, match="at step"):
        run(train_config(lr=1e30, warmup=0, log_every=1), checkpoint_dir=tmp_path)


def test_matryoshka_trains(tmp_path):
    sae = run(sae_configs=[SAEConfig(D, F, BatchTopK(2), (0.25, 0.25, 0.5))])[0]
    assert sae.history[-1]["explained_variance"] > 0.3
    assert MATRYOSHKA[0] == 1 / 32
