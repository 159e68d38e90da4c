"""The SAE of every architecture: configuration errors, encode and decode, folding, files. Losses are in
test_loss.py."""

import json
import re

import numpy as np
import pytest
import torch
from random_saes import ALL_RULES, random_batch, random_sae

from masksae import MATRYOSHKA, SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from masksae.errors import CheckpointError, ConfigError, DataError


def by_hand(sae, x):
    """Latents from the sentences of the module's docstring, token by token and latent by latent."""
    rule, f = sae.config.selection, torch.zeros(len(x), sae.config.n_latents, dtype=x.dtype)
    for b in range(len(x)):
        for j in range(sae.config.n_latents):
            seen = x[b] if isinstance(rule, JumpReLU) else x[b] - sae.b_dec
            z = torch.dot(seen, sae.W_enc[:, j])
            pre = z + sae.b_enc[j]
            if isinstance(rule, Gated):
                f[b, j] = torch.relu(sae.r_mag[j].exp() * z + sae.b_mag[j]) if pre > 0 else 0
            elif isinstance(rule, JumpReLU):
                f[b, j] = torch.relu(pre) if pre > sae.thresholds[j] else 0
            else:
                f[b, j] = pre if pre > (sae.threshold if isinstance(rule, BatchTopK) else 0) else 0
        if type(rule) is TopK:
            f[b, f[b].argsort(descending=True)[rule.k :]] = 0
    return f


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_encode_and_decode_on_two_and_three_dimensions(rule):
    sae, x = random_sae(rule).requires_grad_(False), random_batch()
    if rule.estimates_threshold:
        sae.threshold.fill_(0.5)
    f = sae.encode(x)
    torch.testing.assert_close(f, by_hand(sae, x), rtol=1e-9, atol=1e-12)
    assert 0 < (f > 0).double().mean() < 0.9
    torch.testing.assert_close(sae.encode(x.reshape(8, 8, 24)).reshape(64, 96), f)
    torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec)
    with pytest.raises(DataError, match="width 24, found 7"):
        sae.encode(torch.zeros(3, 7).double())


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_a_higher_threshold_keeps_the_upper_margins(rule):
    sae, x = random_sae(rule).requires_grad_(False), random_batch()
    pre = sae.pre_activations(x)
    f = sae.encode(x, 0.8)
    assert torch.equal(f > 0, (sae.margins(pre) > 0.8) & (sae.magnitudes(pre) > 0)) and (f > 0).any()
    assert torch.equal(f[f > 0], sae.magnitudes(pre)[f > 0])


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_rescaling_commutes_with_the_input(rule):
    sae, x = random_sae(rule).requires_grad_(False), random_batch()
    sae.threshold.fill_(0.3 if rule.estimates_threshold else 0)
    f, x_hat = sae.encode(x), sae(x)
    sae.rescale_(17.0)
    torch.testing.assert_close(sae.encode(17 * x), 17 * f)
    torch.testing.assert_close(sae(17 * x), 17 * x_hat)


@pytest.mark.parametrize("rule", ALL_RULES[2:], ids=lambda r: type(r).__name__)
def test_normalising_keeps_the_reconstruction(rule):
    sae, x = random_sae(rule).requires_grad_(False), random_batch()
    sae.W_dec *= 0.5 + torch.rand(96, 1, generator=torch.Generator().manual_seed(0))
    f, x_hat, norm = sae.encode(x), sae(x), sae.W_dec.norm(dim=1)
    sae.normalise_()
    torch.testing.assert_close(sae(x), x_hat)
    torch.testing.assert_close(sae.encode(x), f * norm)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96).double())


def test_initial_decoder_has_unit_rows_ties_the_encoder_and_depends_on_the_seed():
    a, b, c = (SAE(SAEConfig(8, 32, BatchTopK(2), seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)
    assert torch.equal(a.W_enc, a.W_dec.t())
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_save_and_load_bit_for_bit(tmp_path, rule):
    sae = random_sae(rule, MATRYOSHKA, aux=AuxK(), dtype=torch.float32)
    sae.threshold.fill_(0.123)
    sae.history = [{"step": 0, "loss": 1.5}]
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config == sae.config and again.history == sae.history
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in sae.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_save_and_load_keep_the_type(tmp_path, rule, dtype):
    sae = random_sae(rule, dtype=torch.float64).to(dtype)
    again = SAE.load(sae.save(tmp_path / "sae"))
    for name, value in sae.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == value.dtype and torch.equal(found, value) and found.stride() == value.stride(), name


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_float_is_taken_and_computed_with_as_the_weights_are(rule, own, given):
    sae = random_sae(rule).requires_grad_(False).to(own)
    x = random_batch().to(given)
    f = sae.encode(x)
    assert f.dtype == sae(x).dtype == sae.decode(f.to(given)).dtype == own
    assert torch.equal(f, sae.encode(x.to(own))) and torch.equal(sae(x), sae.decode(f))


@pytest.mark.parametrize(
    "act, words",
    [
        (
            lambda sae: sae.encode(torch.ones(3, 24, dtype=torch.int64)),
            "activations as a tensor of floats, found torch.int64",
        ),
        (lambda sae: sae(torch.ones(3, 24).bool()), "found torch.bool"),
        (lambda sae: sae.encode(torch.ones(3, 24).numpy()), "found ndarray"),
        (lambda sae: sae.encode(torch.ones(24, 3)), "activations of width 24, found 3"),
        (lambda sae: sae.encode(torch.tensor(1.0)), "width 24, found none"),
        (lambda sae: sae.decode(torch.ones(3, 24)), "latents of width 96, found 24"),
        (lambda sae: sae.decode(torch.ones(3, 96).int()), "latents as a tensor of floats, found torch.int32"),
    ],
)  # fmt: skip
def test_what_is_no_activation_is_refused(act, words):
    with pytest.raises(DataError, match=words):
        act(random_sae(dtype=torch.float32))


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
    smaller = config.replace('"n_latents": 96', '"n_latents": 95')
    (folder / "config.json").write_text(smaller)
    with pytest.raises(CheckpointError, match="damaged, or was changed"):
        SAE.load(folder)
    (folder / "config.json").write_text(re.sub(r',\s*"sha256": "\w+"', "", config))
    with pytest.raises(CheckpointError, match="sha256 differs.*Restore it from a copy") as caught:
        SAE.load(folder)
    assert "elete" not in str(caught.value)  # it may be anybody's folder


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SAEConfig(8, 16, BatchTopK(17)), "k = 17"),
        (lambda: BatchTopK(0), "BatchTopK.k"),
        (lambda: TopK(2.5), "2.5"),
        (lambda: BatchTopK(float("nan")), "nan"),
        (lambda: SAEConfig(0, 16, BatchTopK(1)), "d_model"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefixes=(0.5, 0.4)), "sum to 1"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefixes=(1.5, -0.5)), "positive fractions"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefixes=(0.01, 0.99)), "empty group"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), prefix_weighting="1/g"), "Did you mean '1/G^2'"),
        (lambda: SAEConfig(8, 16, "BatchTopk"), "Did you mean 'BatchTopK'"),
        (lambda: AuxK(k=0), "AuxK.k"),
        (lambda: TopK(0), "TopK.k"),
        (lambda: JumpReLU(-1), "JumpReLU.target_l0"),
        (lambda: JumpReLU(20, bandwidth=0), "JumpReLU.bandwidth"),
        (lambda: ReLU(0.0), "ReLU.l1"),
        (lambda: Gated(0.1, target_l0=float("nan")), "Gated.target_l0"),
        (lambda: SAEConfig(8, 16, JumpReLU(20.0)), "k = 20.0"),
        (lambda: SAEConfig(8, 16, AuxK()), "selection must be"),
        (lambda: AuxK(coefficient=-1), "coefficient"),
        (lambda: AuxK(dead_after_tokens=0), "AuxK.dead_after_tokens"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), seed=-1), "SAEConfig.seed must be an integer of at least 0"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), seed=2**64), "18446744073709551615 at most"),
        (lambda: SAEConfig(8, 16, BatchTopK(1), seed=0.5), "SAEConfig.seed"),
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
    for rule in ALL_RULES:
        config = SAEConfig(768, 4096, rule, MATRYOSHKA, "mean", AuxK(k=3), seed=4, drop_masked=True, own_order=True)
        assert SAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SAEConfig.from_dict(SAEConfig(8, 16, BatchTopK(1)).to_dict()).aux is None


def test_seeds_and_sizes_of_numpy_are_kept_as_integers():
    config = SAEConfig(np.int64(8), np.int32(16), TopK(np.int64(2)), seed=np.uint64(2**64 - 1))
    assert json.loads(json.dumps(config.to_dict()))["seed"] == 2**64 - 1 and type(config.selection.k) is int
    SAE(config)


def test_when_a_latent_is_dead_in_old_and_new_files():
    """0.1 wrote a number for it, and that number stands; None is kept as None and follows the run that trains with
    it."""
    values = SAEConfig(8, 16, BatchTopK(1), aux=AuxK()).to_dict()
    assert values["aux"]["dead_after_tokens"] is None and SAEConfig.from_dict(values).aux == AuxK()
    old = SAEConfig.from_dict(values | {"aux": {"k": None, "coefficient": 1 / 32, "dead_after_tokens": 10_000_000}})
    assert old.aux.dead_after(1000) == 10_000_000 == AuxK().dead_after(10**9) and AuxK().dead_after(8) == 1
