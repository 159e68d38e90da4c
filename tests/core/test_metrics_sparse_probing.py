"""Sparse probing: planted latents are found and scored, ranking against loops, splits without leaks."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import LinAlgWarning

from masksae.errors import DataError
from masksae.metrics.sparse_probing import mean_active, probe, rank_latents, sparse_probing, split
from masksae.parallel import in_threads


def planted(n=400, n_latents=40, seed=0, strength=3.0):
    """Latent 7 fires for positives only, latent 3 for both but more for positives, the rest are noise of any size."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2 == 0
    f = torch.relu(torch.randn(n, n_latents, generator=generator) - 1) * torch.logspace(-2, 2, n_latents)
    f[:, 7] = y * (strength + torch.rand(n, generator=generator))
    f[:, 3] = 1.0 + y + torch.rand(n, generator=generator)
    return f, y


def test_a_concept_told_by_one_latent_scores_one():
    f, y = planted()
    result = sparse_probing(f[:300], y[:300], f[300:], y[300:], ks=(1, 2, 5))
    assert rank_latents(f[:300], y[:300])[0] == 7
    assert [score.auc for score in result.scores.values()] == [1, 1, 1] and result.scores[1].accuracy == 1
    assert result.to_dict()["2"]["auc"] == 1


def test_latents_in_half_precision():
    f, y = planted()
    half = f.bfloat16()
    found, exact = (sparse_probing(v[:300], y[:300], v[300:], y[300:], ks=(1, 5)) for v in (half, half.float()))
    assert found == exact and rank_latents(half, y)[0] == 7
    assert rank_latents(half, y).tolist() == rank_latents(half.float(), y).tolist()


def test_noise_scores_chance():
    f, y = planted(n=2000)
    noise = f[:, 10:]
    result = sparse_probing(noise[:1000], y[:1000], noise[1000:], y[1000:], ks=(1, 16))
    assert all(abs(score.auc - 0.5) < 0.06 for score in result.scores.values())


def test_singular_features_score_the_same_in_threads_as_alone():
    """Norms of thousands and repeated columns, as some models' residual streams: Newton gives up there, by way of a
    process-wide filter."""
    generator = torch.Generator().manual_seed(0)
    x = 1e8 * torch.randn(120, 20, generator=generator).repeat(1, 10)
    y = torch.arange(120) % 2 == 0
    x[y, 0] += 2e8
    cell = lambda seed: probe(x[:80], y[:80], x[80:], y[80:], seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LinAlgWarning)
        alone = [cell(seed) for seed in range(6)]
        assert alone[0].auc > 0.7
        assert in_threads(cell, range(6)) == alone


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), normalised=st.booleans())
def test_ranking_against_loops(seed, normalised):
    f, y = planted(n=30, n_latents=8, seed=seed)
    f[:, 5] = 0  # a latent that never fires
    scores = []
    for j in range(8):
        size = 1.0
        if normalised:
            active = [v for v in f[:, j].tolist() if v != 0]
            size = sum(active) / len(active) if active else 1.0
        positive = [v for v, label in zip(f[:, j].tolist(), y.tolist()) if label]
        negative = [v for v, label in zip(f[:, j].tolist(), y.tolist()) if not label]
        scores.append(abs(sum(positive) / len(positive) - sum(negative) / len(negative)) / size)
    order = rank_latents(f, y, normalised=normalised).tolist()
    assert np.allclose(sorted(scores, reverse=True), [scores[j] for j in order], rtol=1e-4)
    assert rank_latents(f, y)[-1] == 5 or scores[5] == 0


def test_normalising_ignores_the_scale_of_a_latent():
    f, y = planted()
    scale = torch.logspace(-3, 3, f.shape[1])
    assert torch.equal(rank_latents(f, y)[:2], rank_latents(f * scale, y)[:2])
    assert not torch.equal(rank_latents(f, y, normalised=False)[:2], rank_latents(f * scale, y, normalised=False)[:2])
    assert torch.equal(mean_active(torch.zeros(3, 2)), torch.zeros(2))


def test_probe_against_scikit_learn_on_a_known_problem():
    """AUC of the probe on two Gaussians is near the best possible, Phi(distance / sqrt 2)."""
    from scipy.stats import norm

    generator = torch.Generator().manual_seed(0)
    y = torch.rand(6000, generator=generator) < 0.5
    x = torch.randn(6000, 3, generator=generator) + 1.5 * y[:, None] * torch.tensor([1.0, 0, 0])
    score = probe(x[:3000], y[:3000], x[3000:], y[3000:])
    assert score.auc == pytest.approx(norm.cdf(1.5 / 2**0.5), abs=0.01)
    assert score.accuracy == pytest.approx(norm.cdf(0.75), abs=0.02) and score.converged


def test_the_strength_is_chosen_on_training_rows_only():
    f, y = planted()
    a = probe(f[:300], y[:300], f[300:], y[300:])
    b = probe(f[:300], y[:300], f[300:].flip(0), y[300:])  # wrong test rows
    assert a.strength == b.strength and a.auc > b.auc


def test_same_seed_same_numbers():
    f, y = planted()
    runs = [sparse_probing(f[:300], y[:300], f[300:], y[300:], ks=(2,), seed=1).to_dict() for _ in range(2)]
    assert runs[0] == runs[1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), copies=st.integers(1, 4))
def test_splits_are_balanced_and_share_no_prompt(seed, copies):
    prompts = [f"text {i // copies}" for i in range(120)]
    y = torch.tensor([(i // copies) % 2 for i in range(120)])
    train, test = split(prompts, y, train=10, seed=seed)
    assert len(train) == 10 and y[train].sum() == 5 and y[test].float().mean() == 0.5
    assert not {prompts[i] for i in train} & {prompts[i] for i in test}
    assert len({prompts[i] for i in [*train, *test]}) == len(train) + len(test)


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda f, y: sparse_probing(f, y, f, y, ks=(50,)), "k = 50 latents cannot be taken from a dictionary of 40"),
        (lambda f, y: sparse_probing(f, torch.ones(400), f, y, ks=(2,)), "both present, found [1.0]"),
        (lambda f, y: sparse_probing(f, y * 2, f, y, ks=(2,)), "found [0, 2]"),
        (lambda f, y: sparse_probing(f, y[:5], f, y, ks=(2,)), "5 labels for 400 rows"),
        (lambda f, y: probe(f * torch.nan, y, f, y), "train rows hold NaN"),
        (lambda f, y: probe(f, y.sort().values, f, y), "in random order"),
        (lambda f, y: split(["a"] * 400, y, train=10), "has 0 distinct prompts"),
    ],
)
def test_bad_input(act, words):
    f, y = planted()
    with pytest.raises(DataError) as caught:
        act(f, y.long())
    assert words in str(caught.value)
