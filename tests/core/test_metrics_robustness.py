"""Robustness scores at their anchors, against loops over sets and scikit-learn, and what they must not depend on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from masksae import SAE, BatchTopK, ReLU, SAEConfig, TopK
from masksae.errors import ConfigError, DataError
from masksae.metrics.robustness import jaccard, robustness


def random_sae(d=6, n_latents=24, rule=None, seed=0):
    sae = SAE(SAEConfig(d, n_latents, rule or BatchTopK(3), seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(d, generator=generator))
        sae.W_dec.mul_(0.5 + torch.rand(n_latents, 1, generator=generator))
        if sae.config.selection.estimates_threshold:
            sae.threshold.fill_(0.7)
    return sae.requires_grad_(False)


def identity(d=6):
    """An SAE that rebuilds everything: a latent for each direction and sign."""
    sae = SAE(SAEConfig(d, 2 * d, ReLU(1e-3))).requires_grad_(False)
    sae.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)], 1))
    sae.W_dec.copy_(sae.W_enc.t())
    return sae


def pair(n=300, d=6, seed=1):
    """Clean and changed activations; the change is large in some rows and small in others."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(n, d, generator=generator) + 1
    return x, x + torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator)


def test_the_identity_moves_as_far_as_the_activation():
    x, changed = pair()
    scores = robustness(identity(), x, changed)
    torch.testing.assert_close(scores.recon, scores.x, rtol=1e-5, atol=1e-7)
    expected = np.linalg.norm((changed - x).numpy(), axis=1) / np.linalg.norm(x - x.mean(0), axis=1)
    assert scores.x.numpy() == pytest.approx(expected, rel=1e-5)
    same_sign = (x.sign() == changed.sign()).sum(1)  # each keeps its latent, every other coordinate swaps one for one
    torch.testing.assert_close(scores.jaccard, same_sign / (12 - same_sign))
    kept = same_sign == 6
    assert 0 < kept.sum() < len(x)
    torch.testing.assert_close(scores.code[kept], scores.x[kept], rtol=1e-5, atol=1e-7)
    assert (scores.code[~kept] < scores.x[~kept]).all()  # |a| + |b| apart in x, sqrt(a^2 + b^2) in two latents


def test_an_sae_that_ignores_its_input_is_perfectly_robust():
    sae, (x, changed) = random_sae(), pair()
    scores = robustness(sae, x, changed, threshold=1e9)
    assert (scores.jaccard == 1).all() and (scores.top_jaccard == 1).all()
    assert not scores.recon.any() and not scores.code.any() and (scores.x > 0).all()


@pytest.mark.parametrize("rule", [BatchTopK(3), TopK(4), ReLU(1e-3)], ids=str)
def test_nothing_changes_where_nothing_was_replaced(rule):
    scores = robustness(random_sae(rule=rule), pair()[0], pair()[0].clone())
    assert (scores.jaccard == 1).all() and (scores.top_jaccard == 1).all()
    assert not scores.recon.any() and not scores.code.any() and not scores.x.any()


def by_hand(sae, x, changed, top, threshold):
    """The five scores in double precision, one row and one latent at a time."""
    w_enc, w_dec, b_enc, b_dec = (t.double().numpy() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    x, changed = x.double().numpy(), changed.double().numpy()
    mean, rows = x.mean(0), []
    for pair_of_rows in zip(x, changed):
        active, largest, values, rebuilt = [], [], [], []
        for a in pair_of_rows:
            pre = (a - b_dec) @ w_enc + b_enc
            f = {j: p for j, p in enumerate(pre) if p > max(threshold, 0)}
            size = {j: p * np.sqrt((w_dec[j] ** 2).sum()) for j, p in f.items()}
            active.append(set(f))
            largest.append(set(sorted(size, key=lambda j, size=size: -size[j])[:top]))
            values.append(size)
            rebuilt.append(b_dec + sum(p * w_dec[j] for j, p in f.items()))
        unit = np.sqrt(((pair_of_rows[0] - mean) ** 2).sum())
        moved = sum((values[1].get(j, 0) - values[0].get(j, 0)) ** 2 for j in active[0] | active[1])
        overlaps = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in (active, largest)]
        distances = [np.linalg.norm(rebuilt[1] - rebuilt[0]), moved**0.5]
        distances.append(np.linalg.norm(pair_of_rows[1] - pair_of_rows[0]))
        rows.append([*overlaps, *(distance / unit for distance in distances)])
    return np.array(rows).T


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), top=st.integers(1, 30), threshold=st.sampled_from([0.2, 0.7, 2.0]))
def test_against_sets_and_sums_by_hand(seed, top, threshold):
    sae, (x, changed) = random_sae(seed=seed), pair(60, seed=seed + 1)
    scores = robustness(sae, x, changed, top=top, threshold=threshold)
    expected = by_hand(sae, x, changed, top, threshold)
    for name, values in zip(("jaccard", "top_jaccard", "recon", "code", "x"), expected):
        assert getattr(scores, name).numpy() == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_overlap_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 200, 30, generator=generator) < 0.2
    expected = [jaccard_score(x, y) for x, y in zip(a.numpy(), b.numpy())]
    assert jaccard(a, b).numpy() == pytest.approx(expected, rel=1e-6)


def test_overlap_and_the_share_of_latents_that_stay_active():
    """The overlap of Li et al. (EACL 2026) follows from the Jaccard index where the sets have one size."""
    sae, (x, changed) = random_sae(rule=TopK(4)), pair()
    f, f_changed = sae.encode(x) > 0, sae.encode(changed) > 0
    fours = (f.sum(1) == 4) & (f_changed.sum(1) == 4)
    assert fours.sum() > 200
    index, shared = robustness(sae, x, changed).jaccard, (f & f_changed).sum(1) / 4
    torch.testing.assert_close((2 * index / (1 + index))[fours], shared[fours])


def test_scores_do_not_hang_on_units_or_on_how_latents_are_scaled():
    sae, (x, changed) = random_sae(), pair()
    before = robustness(sae, x, changed)
    larger = robustness(random_sae().rescale_(10.0), 10 * x, 10 * changed)
    loose = robustness(random_sae(rule=ReLU(1e-3)), x, changed, top=2)
    normalised = robustness(random_sae(rule=ReLU(1e-3)).normalise_(), x, changed, top=2)
    for name in ("jaccard", "top_jaccard", "recon", "code", "x"):
        torch.testing.assert_close(getattr(larger, name), getattr(before, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(getattr(normalised, name), getattr(loose, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64], ids=str)
def test_any_type_of_weights_and_of_activations(own, given):
    x, changed = pair(2000)
    exact, scores = (
        robustness(random_sae(), x, changed),
        robustness(random_sae().to(own), x.to(given), changed.to(given)),
    )
    for name in ("jaccard", "top_jaccard", "recon", "code", "x"):
        assert getattr(scores, name).mean().item() == pytest.approx(getattr(exact, name).mean().item(), abs=0.01)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: robustness(random_sae(), *pair(), top=0), ConfigError, "found 0; expected 1 or more"),
        (lambda: robustness(random_sae(), *pair(), top=True), ConfigError, "found True"),
        (lambda: robustness(random_sae(), pair()[0], pair(200)[1]), DataError, r"\(300, 6\) and \(200, 6\)"),
        (lambda: robustness(random_sae(), *(x[:0] for x in pair())), DataError, "n > 0"),
        (lambda: robustness(random_sae(), *(x[None] for x in pair())), DataError, r"found \(1, 300, 6\)"),
        (lambda: robustness(random_sae(), pair()[0], pair()[1] * torch.inf), DataError, "NaN or infinity"),
        (lambda: robustness(random_sae(), torch.ones(4, 6), torch.zeros(4, 6)), DataError, "4 of 4 .* that vary"),
        (lambda: robustness(random_sae(), *(x.long() for x in pair())), DataError, "int64"),
        (lambda: robustness(random_sae(d=5), *pair()), DataError, "width 5, found 6"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
