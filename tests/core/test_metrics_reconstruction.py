"""Reconstruction scores against scikit-learn, against sums written out by hand, and at their edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from masksae import SAE, BatchTopK, ReLU, SAEConfig
from masksae.errors import ConfigError, DataError
from masksae.metrics import explained_variance
from masksae.metrics.reconstruction import (
    CHUNK,
    _pieces,
    active_counts,
    calibrated_threshold,
    ce_score,
    kl_score,
    largest_cosines,
    reconstruction,
    silent_latents,
)


def random_sae(d=6, n_latents=24, seed=0):
    sae = SAE(SAEConfig(d, n_latents, BatchTopK(3), seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(d, generator=generator))
        sae.threshold.fill_(0.7)
    return sae.requires_grad_(False)


def tokens(n=500, d=6, seed=1):
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), offset=st.floats(-100, 100), noise=st.floats(0.01, 3))
def test_centred_is_sklearns_r2(seed, offset, noise):
    x = tokens(seed=seed) + offset
    x_hat = x + noise * tokens(seed=seed + 1)
    expected = r2_score(x.double().numpy(), x_hat.double().numpy(), multioutput="variance_weighted")
    assert explained_variance(x, x_hat) == pytest.approx(expected, abs=1e-9)


def test_the_four_kinds_by_hand():
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 6.0]])
    x_hat = torch.tensor([[0.0, 1.0], [4.0, 0.0], [2.0, 4.0]])
    spread = [8.0, 8.0, 16.0]  # squared distances from the mean (2, 2)
    assert explained_variance(x, x_hat) == pytest.approx(1 - 5 / 32)
    assert explained_variance(x, x_hat, "per_token") == pytest.approx(1 - (1 / spread[0] + 0 + 4 / spread[2]) / 3)
    assert explained_variance(x, x_hat, "uncentred") == pytest.approx(1 - 5 / 56)
    square = 56 / 3
    assert explained_variance(x, x_hat, "saebench") == pytest.approx(1 - (5 / 3) / (square - (square / 2) ** 2))


def test_predicting_the_mean_explains_nothing():
    x = tokens()
    assert explained_variance(x, x.mean(0).expand_as(x)) == pytest.approx(0, abs=1e-6)
    assert explained_variance(x, x) == explained_variance(x, x, "per_token") == 1
    assert explained_variance(x, torch.zeros_like(x), "uncentred") == 0


def test_sums_are_in_double_precision():
    x = tokens(n=20000) + 3000  # float32 sums of squares would lose the variance altogether
    x_hat = x + 1
    expected = r2_score(x.double().numpy(), x_hat.double().numpy(), multioutput="variance_weighted")
    assert explained_variance(x, x_hat) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: explained_variance(tokens(), tokens(), "centered"), ConfigError, "Did you mean 'centred'"),
        (lambda: explained_variance(tokens(5), tokens(6)), DataError, "(5, 6), x_hat (6, 6)"),
        (lambda: explained_variance(torch.ones(4, 2), torch.ones(4, 2)), DataError, "do not vary"),
        (lambda: ce_score(3.0, 2.0, 3.0), DataError, "not above the original 3.0"),
        (lambda: kl_score(0.0, 0.0), DataError, "KL divergence of 0.0"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_reconstruction_against_numpy():
    sae, x = random_sae(), tokens(n=9000)  # more than one chunk
    result = reconstruction(sae, x)
    w_enc, w_dec, b_enc, b_dec = (t.double().numpy() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    a = x.double().numpy()
    h = np.maximum((a - b_dec) @ w_enc + b_enc, 0)
    f = np.where(h > 0.7, h, 0)
    b = f @ w_dec + b_dec
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    assert result.l0 == pytest.approx((f > 0).sum(1).mean(), abs=1e-3)
    assert result.dead_latents == ((f > 0).sum(0) == 0).sum()
    assert result.cosine == pytest.approx(((a * b).sum(1) / norms[0] / norms[1]).mean(), abs=1e-6)
    assert result.l2_ratio == pytest.approx((norms[1] / norms[0]).mean(), abs=1e-6)
    assert result.relative_bias == pytest.approx((b * b).sum() / (a * b).sum(), abs=1e-6)
    assert result.ev_centred == pytest.approx(r2_score(a, b, multioutput="variance_weighted"), abs=1e-6)
    assert result.tokens == 9000
    norm = np.linalg.norm(w_dec, axis=1)
    assert result.l1 == pytest.approx((f * norm).sum(1).mean(), rel=1e-6)
    assert result.mse == pytest.approx(((a - b) ** 2).mean(), rel=1e-6) and result.fvu == 1 - result.ev_centred
    assert result.dense_latents == ((f > 0).mean(0) > 0.1).sum() > 0
    for directions, found in ((w_dec, result.decoder_cosine), (w_enc.T, result.encoder_cosine)):
        cosines = directions @ directions.T
        cosines /= np.linalg.norm(directions, axis=1)[:, None] * np.linalg.norm(directions, axis=1)
        np.fill_diagonal(cosines, -1)
        assert found == pytest.approx(cosines.max(1).mean(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 9000), max_size=6))
def test_scores_are_the_same_bits_however_the_tokens_come(cuts):
    sae, x = random_sae(), tokens(n=9000)
    bounds = [0, *sorted(cuts), 9000]
    assert reconstruction(sae, [x[a:b] for a, b in zip(bounds, bounds[1:])]) == reconstruction(sae, x)


def test_a_tensor_is_not_copied_whole():
    x = tokens(n=2 * CHUNK + 5)
    pieces = list(_pieces(x))
    assert [len(piece) for piece in pieces] == [CHUNK, CHUNK, 5]
    assert all(piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for piece in pieces)


def constant_sae(value):
    """An SAE without latents that fire: it predicts `value` everywhere."""
    sae = random_sae()
    sae.b_dec.copy_(value)
    sae.threshold.fill_(1e9)
    return sae


def test_perfect_mean_and_zero_reconstruction():
    x = tokens()
    mean = reconstruction(constant_sae(x.mean(0)), x)
    assert mean.ev_centred == pytest.approx(0, abs=1e-6) and mean.l0 == mean.l1 == 0 and mean.dead_latents == 24
    zero = reconstruction(constant_sae(torch.zeros(6)), x)
    assert zero.ev_uncentred == zero.cosine == zero.l2_ratio == 0 and zero.ev_centred < 0
    identity = SAE(SAEConfig(6, 12, ReLU(1e-3))).requires_grad_(False)
    identity.W_enc.copy_(torch.cat([torch.eye(6), -torch.eye(6)], 1))
    identity.W_dec.copy_(identity.W_enc.t())
    perfect = reconstruction(identity, x)
    assert perfect.ev_centred == pytest.approx(1) == perfect.cosine == perfect.l2_ratio == perfect.relative_bias
    assert perfect.l0 == 6 and perfect.decoder_cosine == 0


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.zeros(0, 6), "no token"),
        ([], "no token"),
        (tokens(d=5), "width 5, the SAE 6"),
        (tokens().fill_(torch.nan), "NaN"),
        (torch.ones(9, 6), "do not vary"),
        (tokens()[None], "shape \\[tokens, d\\], found \\(1, 500, 6\\)"),
        (tokens().long(), "found torch.int64"),
        ((part for part in tokens().split(100)), "come from a generator, .* gone through once"),
        (iter(tokens().split(100)), "gone through once"),
    ],
)
def test_tokens_that_cannot_be_scored(x, words):
    with pytest.raises(DataError, match=words):
        reconstruction(random_sae(), x)


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_type_of_weights_and_of_activations(own, given):
    """An SAE in half precision scores what the same weights do in single, to the rounding of its own latents."""
    sae, x = random_sae().to(own), tokens()
    exact = reconstruction(random_sae(), x).to_dict()
    for name, value in reconstruction(sae, x.to(given)).to_dict().items():
        assert value == pytest.approx(exact[name], rel=0.03, abs=0.01), name
    threshold = calibrated_threshold(sae, x.to(given), k=3)
    assert (sae.encode(x.to(given), threshold) > 0).sum().item() / len(x) == pytest.approx(3, abs=0.1)
    assert explained_variance(x.to(given), sae(x.to(given))) == pytest.approx(exact["ev_centred"], rel=0.01)


@pytest.mark.parametrize("k", [0, -3, float("nan"), float("inf")])
def test_no_threshold_gives_an_impossible_l0(k):
    with pytest.raises(ConfigError, match="positive number"):
        calibrated_threshold(random_sae(), tokens(), k=k)
    with pytest.raises(DataError, match="Flatten"):
        calibrated_threshold(random_sae(), tokens()[None], k=3)
    for x, words in ((tokens()[:0], "no token to score"), (tokens() * torch.nan, "NaN or infinity")):
        with pytest.raises(DataError, match=words):
            calibrated_threshold(random_sae(), x, k=3)


def test_dead_latents_are_counted():
    sae = random_sae()
    sae.b_enc[[2, 5]] = -1e6
    before = reconstruction(random_sae(), tokens()).dead_latents
    assert before == 0 and reconstruction(sae, tokens()).dead_latents == 2


@settings(max_examples=30, deadline=None)
@given(k=st.floats(0.05, 12), seed=st.integers(0, 1000), n=st.sampled_from([50, 4096, 9001]))
def test_calibrated_threshold_gives_exactly_k(k, seed, n):
    sae, x = random_sae(seed=seed), tokens(n, seed=seed + 1)
    h = torch.cat([sae.pre_activations(part) for part in x.split(4096)])
    reachable = int((h > 0).sum())
    threshold = calibrated_threshold(sae, x, k)
    wanted = min(round(k * n), reachable)
    largest = h.flatten().sort(descending=True).values
    tied = wanted < reachable and largest[wanted - 1] == largest[wanted]  # then no threshold lies between the two
    expected = int((h > largest[wanted]).sum()) if tied else wanted
    assert int((h > threshold).sum()) == expected
    positive = h[h > 0].sort(descending=True).values  # the definition: a full sort
    assert threshold == (positive[round(k * n)].item() if round(k * n) < reachable else 0.0)


def test_an_sae_that_cannot_reach_k_gets_threshold_zero():
    assert calibrated_threshold(random_sae(n_latents=4), tokens(), 4) == 0.0


def test_encode_at_another_threshold_leaves_the_sae_alone():
    sae, x = random_sae(), tokens()
    f = sae.encode(x, 1.5)
    assert ((f == 0) | (f > 1.5)).all() and torch.equal(sae.encode(x, 0.7), sae.encode(x))
    assert sae.threshold.item() == pytest.approx(0.7)


def test_score_anchors():
    assert kl_score(8.0, 0.0) == 1 and kl_score(8.0, 8.0) == 0
    assert ce_score(3.0, 11.0, 3.0) == 1 and ce_score(3.0, 11.0, 11.0) == 0 and ce_score(3.0, 11.0, 15.0) == -0.5


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.floats(3, 9))
def test_what_silent_latents_fire_on_against_sets(seed, threshold):
    sae, clean, corrupted = random_sae(seed=seed), tokens(seed=seed), tokens(seed=seed + 1) + 1
    masked = torch.rand(500, generator=torch.Generator().manual_seed(seed)) < 0.3
    f = [sae.encode(x, threshold).numpy() for x in (clean, corrupted)]
    fires = lambda rows: {int(j) for j in np.nonzero(rows)[1]}
    silent = set(range(24)) - fires(f[0])
    beside, at = silent & fires(f[1][~masked.numpy()]), silent & fires(f[1][masked.numpy()])
    counts = [active_counts(sae, x, threshold=threshold) for x in (clean, corrupted[masked], corrupted[~masked])]
    assert counts[0].tolist() == (f[0] > 0).sum(0).tolist()
    found = silent_latents(*(each > 0 for each in counts))
    assert (found.silent_but_masked, found.silent_but_corrupted) == (len(at - beside), len(beside))
    assert found.silent_everywhere == len(silent - at - beside)
    dead = reconstruction(sae, clean, threshold=threshold).dead_latents
    assert sum(found.to_dict().values()) == dead == len(silent)


def test_silent_latents_takes_three_sets_of_one_sae():
    active = torch.ones(4, dtype=torch.bool)
    for sets in (
        (active, active, active[:3]),
        (active, active, active.long()),
        (active[None], active[None], active[None]),
    ):
        with pytest.raises(DataError, match=r"must be three bool \[F\]"):
            silent_latents(*sets)


def test_a_single_latent_has_no_other_to_be_near():
    """The least cosine there is, so that the mean over latents is a number."""
    assert largest_cosines(torch.ones(1, 3)).tolist() == [-1]
