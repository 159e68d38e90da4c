"""Controls of a score: as sparse as the SAE that they are made of, worth what arithmetic says, and never the SAE
itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_saes import ALL_RULES, random_batch, random_sae

from masksae import SAE, ActivationStream, BatchTopK, SAEConfig, TopK, TrainConfig, train
from masksae.errors import ConfigError, DataError
from masksae.metrics import explained_variance
from masksae.metrics.controls import permuted_decoder, random_like
from masksae.metrics.reconstruction import active_counts, reconstruction

X = random_batch(400) + 0.5


def state(sae):
    return {name: value.clone() for name, value in sae.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(params=ALL_RULES, ids=lambda rule: type(rule).__name__)
def sae(request):
    """With random values in every parameter, its rows of norm 1 as a trained one's are."""
    sae = random_sae(request.param).requires_grad_(False)
    if sae.config.selection.estimates_threshold:
        sae.threshold.fill_(1.5)
    else:
        sae.b_enc -= 1.5 * sae.W_enc.norm(dim=0)
    return sae if sae.config.selection.unit_rows else sae.normalise_()


def test_random_weights_are_as_sparse_and_have_the_shape_of_a_start(sae):
    before = state(sae)
    control = random_like(sae, X, seed=5)
    assert same(before, sae.state_dict()), "the SAE itself was changed"
    assert same(state(control), random_like(sae, X, seed=5).state_dict())
    assert not torch.equal(control.W_dec, random_like(sae, X, seed=6).W_dec)
    assert active_counts(control, X).sum() == active_counts(sae, X).sum() > 0
    assert control.config.selection == sae.config.selection and control.dtype == sae.dtype and not control.history
    torch.testing.assert_close(control.W_dec.norm(dim=1), torch.ones(96).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(control.b_dec, X.mean(0))
    assert torch.equal(control.W_enc, control.W_dec.t())


def test_random_weights_against_numpy(sae):
    """Whatever the rule, the latents are the largest products with the distance from the mean, as many as the SAE's."""
    control, x = random_like(sae, X, seed=5), X.numpy()
    w, centred = control.W_dec.numpy(), x - x.mean(0)
    pre = np.maximum(centred @ w.T, 0)
    if sae.config.selection.keeps_k_per_token:
        kept = pre >= np.sort(pre, axis=1)[:, [-sae.config.selection.k]]
    else:
        kept = pre >= np.sort(pre, axis=None)[-int(active_counts(sae, X).sum())]
    f = pre * kept
    np.testing.assert_allclose(control.encode(X).numpy(), f, rtol=1e-6, atol=1e-7)
    error = np.square(x - x.mean(0) - f @ w).sum() / np.square(centred).sum()
    assert reconstruction(control, X).ev_centred == pytest.approx(1 - error, abs=1e-6)


def test_random_weights_of_the_saes_own_seed_are_its_start():
    sae = SAE(SAEConfig(24, 96, TopK(4), seed=9))
    assert torch.equal(random_like(sae, X.float(), seed=9).W_dec, sae.W_dec)


def test_in_one_dimension_random_weights_are_perfect():
    """Rows are 1 and -1, and the mean is b_dec: one latent of the right sign rebuilds everything."""
    x = random_batch(200, d=1) + 3
    control = random_like(SAE(SAEConfig(1, 16, TopK(1))).double(), x, seed=0)
    assert reconstruction(control, x).ev_centred == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 2**63 - 1))
def test_permuting_gives_every_latent_the_row_of_another(n, seed):
    sae = random_sae(TopK(1), n=n).requires_grad_(False)
    before, control = state(sae), permuted_decoder(sae, seed=seed)
    assert same(before, sae.state_dict()), "the SAE itself was changed"
    assert same(state(control), permuted_decoder(sae, seed=seed).state_dict())
    is_row = (control.W_dec[:, None] == sae.W_dec).all(2)
    assert (is_row.sum(0) == 1).all() and (is_row.sum(1) == 1).all() and not is_row.diagonal().any()
    assert same({name: value for name, value in before.items() if name != "W_dec"}, control.state_dict())


def test_permuting_leaves_the_latents(sae):
    control = permuted_decoder(sae, seed=0)
    assert torch.equal(control.encode(X), sae.encode(X)) and not torch.equal(control(X), sae(X))


@pytest.mark.parametrize("d", [2, 4, 16])
def test_permuting_a_perfect_dictionary(d):
    """Each of d equally frequent axes is rebuilt as another: squared error 2, where the variance is 1 - 1/d."""
    sae = SAE(SAEConfig(d, d, TopK(1))).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(d))
    sae.W_dec.copy_(torch.eye(d))
    x = torch.eye(d).repeat(3, 1)
    assert explained_variance(x, sae(x)) == 1
    assert explained_variance(x, permuted_decoder(sae, seed=1)(x)) == pytest.approx(1 - 2 / (1 - 1 / d))


def test_controls_of_a_trained_sae_explain_less():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(24, 8, generator=generator), dim=1)
    x = (torch.rand(4000, 24, generator=generator) < 0.08).float() @ features
    stream = ActivationStream.from_array(x, batch_size=200, seed=0)
    recipe = TrainConfig(400, lr=3e-3, warmup=20, threshold_start=100)
    for sae in train([SAEConfig(8, 48, TopK(2)), SAEConfig(8, 48, BatchTopK(2))], stream, recipe, progress=False):
        ev = [
            reconstruction(each, x).ev_centred
            for each in (sae, random_like(sae, x, seed=0), permuted_decoder(sae, seed=0))
        ]
        assert ev[0] > 0.8 > ev[1] + 0.1 and ev[2] < 0, ev


def test_half_precision_stays():
    sae = random_sae(BatchTopK(4), dtype=torch.bfloat16).requires_grad_(False)
    sae.threshold.fill_(1.0)
    control = random_like(sae, X.bfloat16(), seed=0)
    assert control.dtype == permuted_decoder(sae, seed=0).dtype == torch.bfloat16
    counts = [active_counts(each, X.bfloat16()).sum().item() for each in (control, sae)]
    assert counts[0] == pytest.approx(counts[1], rel=0.03)


def biased(bias):
    """Every latent of every token is active, or none."""
    sae = random_sae(BatchTopK(4)).requires_grad_(False)
    sae.b_enc += bias
    return sae


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: random_like(torch.nn.Linear(24, 96), X, seed=0), ConfigError, "found a Linear. Read yours with"),
        (lambda: permuted_decoder(torch.nn.Linear(24, 96), seed=0), ConfigError, "found a Linear. Read yours with"),
        (
            lambda: permuted_decoder(random_sae(TopK(1), n=1), seed=0),
            ConfigError,
            "one latent has no other decoder row",
        ),
        (lambda: random_like(biased(-99), X, seed=0), DataError, "no L0 to match"),
        (lambda: random_like(biased(99), X, seed=0), DataError, "The SAE has L0 96 on x, random weights reach 4"),
        (lambda: random_like(random_sae(), X[:, :3], seed=0), DataError, "width 3, the SAE 24"),
        (lambda: random_like(random_sae(), X, seed=-1), ConfigError, "seed"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
