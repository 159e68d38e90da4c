"""The SAE: configuration errors, selection against a full sort, gradients against autograd and finite differences, files."""

import pytest
import torch

from masksae import MATRYOSHKA, SAE, AuxK, BatchTopK, SAEConfig
from masksae.errors import CheckpointError, ConfigError, DataError
from masksae.saes.loss import aux_loss, dense_loss, select, sparse_gradients

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products on the CPU need MKL")


def random_sae(prefixes=(), weighting="1/G^2", d=24, n=96, k=4, aux=None, dtype=torch.float64):
    sae = SAE(SAEConfig(d, n, BatchTopK(k), prefixes, weighting, aux)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec, sae.W_enc):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return sae


def batch(n=64, d=24, dtype=torch.float64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("quantised", [False, True])
def test_selection_equals_a_full_sort(k, quantised):
    h = torch.relu(torch.randn(50, 200, generator=torch.Generator().manual_seed(k)))
    if quantised:  # many ties
        h = (h * 4).round() / 4
    kept = select(h, k)
    count = min(50 * k, int((h > 0).sum()))
    flat = h.flatten()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i].item(), i))[:count]
    assert (kept.row * 200 + kept.col).tolist() == sorted(order)
    assert torch.equal(kept.value, flat[sorted(order)])


def test_selection_with_a_misleading_sample():
    """The strided sample sees only the large entries, so its bound is too high and must be dropped."""
    h = torch.full((61, 61), 0.5)
    h.view(-1)[::61] = 9.0
    assert len(select(h, 30).value) == 61 * 30


def test_selection_with_too_few_positive():
    h = torch.zeros(10, 20)
    h[3, 4] = 2.0
    kept = select(h, 2)
    assert (kept.row.tolist(), kept.col.tolist(), kept.value.tolist()) == ([3], [4], [2.0])
    assert len(select(torch.zeros(10, 20), 2).value) == 0


def brute_force_loss(sae, x):
    """The definition of metrics literature, with loops: sum over prefixes of the batch mean of squared errors."""
    h = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    smallest = h.flatten().sort(descending=True).values[sae.config.selection.k * len(x) - 1]
    f = torch.where(h >= smallest, h, 0)
    total, low = 0.0, 0
    for size in sae.config.group_sizes:
        low += size
        x_hat = sae.b_dec + f[:, :low] @ sae.W_dec[:low]
        total = total + ((x_hat - x) ** 2).sum(1).mean()
    return (
        total
        * {"1/G^2": 1 / len(sae.config.group_sizes) ** 2, "mean": 1 / len(sae.config.group_sizes), "sum": 1}[
            sae.config.prefix_weighting
        ]
    )


@pytest.mark.parametrize("prefixes", [(), MATRYOSHKA, (0.25, 0.75)])
@pytest.mark.parametrize("weighting", ["1/G^2", "mean", "sum"])
def test_both_losses_equal_the_definition(prefixes, weighting):
    sae, x = random_sae(prefixes, weighting), batch()
    expected = brute_force_loss(sae, x)
    expected_gradients = torch.autograd.grad(expected, list(sae.parameters()))
    h = sae.pre_activations(x)
    kept = select(h.detach(), 4)
    loss, x_hat = dense_loss(sae, x, kept, h)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(loss, list(sae.parameters())), expected_gradients):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    if torch.backends.mkl.is_available():
        sparse, sparse_x_hat = sparse_gradients(sae, x, kept)
        torch.testing.assert_close(sparse, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(sparse_x_hat, x_hat, rtol=1e-10, atol=1e-12)
        for parameter, want in zip(sae.parameters(), expected_gradients):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-10, atol=1e-13)


@needs_mkl
def test_sparse_equals_dense_in_single_precision():
    sae, x = random_sae(MATRYOSHKA, d=64, n=512, k=8, dtype=torch.float32), batch(256, 64, torch.float32)
    h = sae.pre_activations(x)
    kept = select(h.detach(), 8)
    gradients = torch.autograd.grad(dense_loss(sae, x, kept, h)[0], list(sae.parameters()))
    sparse_gradients(sae, x, kept)
    for parameter, want in zip(sae.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6 * want.abs().max().item() * 100)


@needs_mkl
def test_a_group_without_any_kept_latent():
    sae, x = random_sae((0.5, 0.5)), batch()
    with torch.no_grad():
        sae.b_enc[:48] = -100
    h = sae.pre_activations(x)
    kept = select(h.detach(), 4)
    assert (kept.col >= 48).all()
    gradients = torch.autograd.grad(dense_loss(sae, x, kept, h)[0], list(sae.parameters()))
    sparse_gradients(sae, x, kept)
    for parameter, want in zip(sae.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-10, atol=1e-13)


def test_aux_loss_without_dead_with_a_perfect_and_with_a_silent_dead_latent():
    sae, x = random_sae(aux=AuxK(k=1, coefficient=1.0)), batch()
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc[:, 0] = sae.W_dec[0]
        sae.b_enc[0] = 0
    amounts = torch.rand(64, generator=torch.Generator().manual_seed(3)).double()[:, None] + 0.5
    x = amounts * sae.W_dec[0]  # the residual of a zero reconstruction is what latent 0 writes
    dead = torch.zeros(96, dtype=torch.bool)
    assert aux_loss(sae, x, torch.zeros_like(x), dead) == 0
    dead[0] = True
    assert aux_loss(sae, x, torch.zeros_like(x), dead).item() == pytest.approx(
        0, abs=1e-12
    )  # rows have norm 1 to single precision
    with torch.no_grad():
        sae.b_enc[0] = -100
    variance = (x - x.mean(0)).square().sum(1).mean()
    assert aux_loss(sae, x, torch.zeros_like(x), dead).item() == pytest.approx(
        (x.square().sum(1).mean() / variance).item()
    )


def test_aux_gradient_reaches_dead_latents_only():
    sae, x = random_sae(aux=AuxK(k=3)), batch()
    dead = torch.zeros(96, dtype=torch.bool)
    dead[10:20] = True
    loss = aux_loss(sae, x, torch.zeros_like(x), dead)
    w_enc, w_dec = torch.autograd.grad(loss, [sae.W_enc, sae.W_dec])
    assert w_enc[:, dead].abs().max() > 0 and w_dec[dead].abs().max() > 0
    assert w_enc[:, ~dead].abs().max() == 0 and w_dec[~dead].abs().max() == 0


def test_encode_decode_on_two_and_three_dimensions():
    sae, x = random_sae(), batch()
    sae.threshold.fill_(0.5)
    f = sae.encode(x)
    h = sae.pre_activations(x)
    assert torch.equal(f, torch.where(h > 0.5, h, 0)) and 0 < (f > 0).double().mean() < 0.5
    torch.testing.assert_close(sae.encode(x.reshape(8, 8, 24)).reshape(64, 96), f)
    torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec)
    with pytest.raises(DataError, match="width 24, found 7"):
        sae.encode(torch.zeros(3, 7).double())


def test_rescaling_commutes_with_the_input():
    sae, x = random_sae(), batch()
    sae.threshold.fill_(0.3)
    f, x_hat = sae.encode(x), sae(x)
    sae.rescale_(17.0)
    torch.testing.assert_close(sae.encode(17 * x), 17 * f)
    torch.testing.assert_close(sae(17 * x), 17 * x_hat)


def test_initial_decoder_has_unit_rows_ties_the_encoder_and_depends_on_the_seed():
    a, b, c = (SAE(SAEConfig(8, 32, BatchTopK(2), seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)
    assert torch.equal(a.W_enc, a.W_dec.t())
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(32))


def test_save_and_load_bit_for_bit(tmp_path):
    sae = random_sae(MATRYOSHKA, aux=AuxK(), dtype=torch.float32)
    sae.threshold.fill_(0.123)
    sae.history = [{"step": 0, "loss": 1.5}]
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config == sae.config and again.history == sae.history
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in sae.state_dict().items())


def test_damaged_files_are_named(tmp_path):
    folder = random_sae(dtype=torch.float32).save(tmp_path / "sae")
    weights = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        SAE.load(folder)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"sae\.safetensors is missing"):
        SAE.load(folder)
    folder = random_sae(dtype=torch.float32).save(tmp_path / "other")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(CheckpointError, match="schema 99"):
        SAE.load(folder)
    (folder / "config.json").write_text(config.replace('"n_latents": 96', '"n_latents": 95'))
    with pytest.raises(CheckpointError, match="W_dec"):
        SAE.load(folder)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SAEConfig(8, 16, BatchTopK(17)), "k = 17"),
        (lambda: BatchTopK(0), "BatchTopK.k"),
        (lambda: BatchTopK(2.5), "2.5"),
        (lambda: SAEConfig(0, 16, BatchTopK(1)), "d_model"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefixes=(0.5, 0.4)), "sum to 1"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefixes=(1.5, -0.5)), "positive fractions"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefixes=(0.01, 0.99)), "empty group"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefix_weighting="1/g"), "Did you mean '1/G^2'"),
        (lambda: SAEConfig(8, 16, "BatchTopk"), "Did you mean 'BatchTopK'"),
        (lambda: AuxK(k=0), "AuxK.k"),
        (lambda: AuxK(coefficient=-1), "coefficient"),
        (
            lambda: SAEConfig.from_dict(
                {"d_model": 8, "n_latents": 16, "selection": {"rule": "TopKK", "k": 1}, "aux": None}
            ),
            "'TopKK'",
        ),
    ],
)
def test_impossible_configurations(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)


def test_config_round_trip():
    config = SAEConfig(768, 4096, BatchTopK(20), MATRYOSHKA, "mean", AuxK(k=3), seed=4)
    assert SAEConfig.from_dict(config.to_dict()) == config
    assert SAEConfig.from_dict(SAEConfig(8, 16, BatchTopK(1)).to_dict()).aux is None
