"""The probes of the first-letter task: converged, seeded, in agreement with scikit-learn."""

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from masksae.errors import DataError
from masksae.metrics import absorption, probes

LETTERS = "abcdef"


def noisy_letters(n=4000, d=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = [LETTERS[i % 6] + "word" + str(i) for i in range(n)]
    directions = torch.randn(6, d, generator=generator)
    return directions[probes.first_letters(words)] + 3 * torch.randn(n, d, generator=generator), words, directions


def test_probe_agrees_with_scikit_learn():
    x, words, _ = noisy_letters()
    probe = probes.letter_probe(x, words, seed=3)
    letters, is_test = probes.first_letters(words), probe.is_test.numpy()
    for letter in range(6):
        y = (letters == letter).numpy()
        n, negatives = (~is_test).sum(), (~y[~is_test]).sum()
        same_objective = 2 * negatives / n**2 / 1e-4  # its C for our weight decay
        model = LogisticRegression(class_weight="balanced", C=same_objective, max_iter=2000)
        model.fit(x[~probe.is_test], y[~is_test])
        weight = torch.from_numpy(model.coef_[0]).float()
        assert torch.cosine_similarity(weight, probe.weight[letter], dim=0) > 0.99
        expected = f1_score(y[is_test], model.decision_function(x[probe.is_test]) > 0)
        assert probe.f1[letter] == pytest.approx(expected, abs=0.02)
    assert probe.f1[25] == 0


def test_probe_has_converged():
    x, words, _ = noisy_letters(1500)
    y = torch.nn.functional.one_hot(probes.first_letters(words), 26)[:, :6].float()
    short, long = (
        probes.fit_linear(x, y, batch=64, weight_decay=1e-4, seed=0, epochs=epochs)[0] for epochs in (50, 200)
    )
    assert torch.cosine_similarity(short, long).min() > 0.995


def test_probe_depends_on_the_seed_alone():
    x, words, _ = noisy_letters(600)
    one, two, other = (probes.letter_probe(x, words, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.is_test, two.is_test) and one.f1 == two.f1
    assert not torch.equal(one.is_test, other.is_test)


def test_l1_silences_useless_latents():
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 3, (3000,), generator=generator)
    f = torch.rand(3000, 30, generator=generator)
    for i in range(3):
        f[:, i] += 2 * (letters == i)
    ranked = absorption.rank_by_regression(f, torch.nn.functional.one_hot(letters, 3))
    assert [order[0] for order in ranked] == [0, 1, 2] and max(map(len, ranked)) <= 10


def test_rare_latents_do_not_crowd_out_the_good_one():
    """The letter shows in how strongly a dense latent fires; rare latents fire twenty times harder on eight words
    each."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 3, (6000,), generator=generator)
    dense, rare = (20 + 3 * torch.randn(6000, 60, generator=generator)).clamp(min=0), torch.zeros(6000, 300)
    for i in range(3):
        here = (letters == i).nonzero().squeeze(1)
        dense[here, i] += 3
        for j in range(100):
            rare[here[torch.randperm(len(here), generator=generator)[:8]], 100 * i + j] = 20
    f, y = torch.cat([dense, rare], dim=1), torch.nn.functional.one_hot(letters, 3)
    assert [order[0] for order in absorption.rank_by_regression(f, y)] == [0, 1, 2]


def rare_and_dense(seed, n=500, n_latents=24):
    """Latents that fire on 2 to 90 % of the rows, some of them nearly copies, and two unequal parents."""
    rng = np.random.default_rng(seed)
    f = rng.gamma(2.0, 2.0, (n, n_latents)) * (rng.random((n, n_latents)) < np.linspace(0.02, 0.9, n_latents))
    f[:, 1] = f[:, 20] + 0.1 * rng.random(n) * (f[:, 20] > 0)
    logits = f @ rng.normal(size=(n_latents, 2)) * 0.3
    above = [np.quantile(column, q) for column, q in zip(logits.T, (0.9, 0.5))]
    return f, logits + 2 * rng.normal(size=(n, 2)) > above


def kkt_violation(f, y, l1, w, b):
    """By the definition, in dense double precision: distance of 0 from the subdifferential, bias first."""
    s = np.where(y, (~y).sum() / y.sum(), 1.0) / len(y)
    error = s * (1 / (1 + np.exp(-(f @ w + b))) - y)
    gradient = f.T @ error
    at_zero = np.maximum(np.abs(gradient) - l1, 0)
    return abs(error.sum()), np.where(w != 0, np.abs(gradient + l1 * np.sign(w)), at_zero).max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("l1", [0.01, 0.1])
def test_the_ranking_probe_is_at_the_optimum_that_scikit_learn_finds(seed, l1):
    f, y = rare_and_dense(seed)
    weight, bias = probes.l1_logistic(sparse.csr_array(f), torch.from_numpy(y), l1=l1, tolerance=1e-6)
    for column, w, b in zip(y.T, weight.numpy(), bias.tolist()):
        assert max(kkt_violation(f, column, l1, w, b)) <= 1e-6 * l1
        weigh = np.where(column, (~column).sum() / column.sum(), 1.0)
        # liblinear penalises the intercept too, by l1 / intercept_scaling
        options = dict(l1_ratio=1, solver="liblinear", intercept_scaling=1e4, tol=1e-7, max_iter=10_000)
        model = LogisticRegression(C=1 / (len(f) * l1), random_state=0, **options)
        model.fit(f, column, sample_weight=weigh)
        np.testing.assert_allclose(w, model.coef_[0], atol=1e-3)
        assert b == pytest.approx(model.intercept_[0], abs=1e-3)


def test_the_ranking_probe_reaches_its_optimum_on_hard_samples():
    """Nearly equal latents, a small penalty, a latent that never changes (as the bias does), one that never fires."""
    for seed in range(12):
        f, y = rare_and_dense(seed)
        f[:, 3], f[:, 5] = 1.0, 0.0
        weight, bias = probes.l1_logistic(sparse.csr_array(f), torch.from_numpy(y), l1=0.003)
        for column, w, b in zip(y.T, weight.numpy(), bias.tolist()):
            assert max(kkt_violation(f, column, 0.003, w, b)) <= 1.001e-3 * 0.003
            assert w[3] == w[5] == 0  # the bias is not penalised


@pytest.mark.parametrize("seed", [140, 144])
def test_the_ranking_probe_reaches_its_optimum_soon_where_newtons_step_does_not_descend(seed, monkeypatch):
    """60 words, 600 latents of very different sizes, most of which fire on one or two of the words."""
    monkeypatch.setattr(probes, "MAX_STEPS", 100)
    draw = np.random.default_rng(seed)
    often, f = draw.random(600) ** 3, np.zeros((60, 600))
    for row in f:
        row[draw.choice(600, 12, replace=False, p=often / often.sum())] = draw.gamma(3, 1, 12) * 10 ** draw.uniform(
            -0.5, 0.5
        )
    y = np.isin(np.arange(60), draw.choice(60, 20, replace=False))
    weight, bias = probes.l1_logistic(sparse.csr_array(f), torch.from_numpy(y[:, None]), l1=0.01)
    assert max(kkt_violation(f, y, 0.01, weight[0].numpy(), bias.item())) <= 1.001e-3 * 0.01


def test_the_ranking_probe_by_hand():
    """One latent of value a on half of the positives and on no other row. Positives without it and negatives hold the
    bias; at the optimum the latent's rows pull with exactly the penalty: (1 - p) a / 4 = l1, for n = 2 positives."""
    f = sparse.csr_array([[3.0], [0.0], [0.0], [0.0]])
    y, l1 = torch.tensor([[True], [True], [False], [False]]), 0.2
    weight, bias = (v.item() for v in probes.l1_logistic(f, y, l1=l1, tolerance=1e-8))
    fires, silent = (1 / (1 + np.exp(-z)) for z in (3 * weight + bias, bias))
    assert (1 - fires) * 3 / 4 == pytest.approx(l1, rel=1e-6)
    assert (1 - fires) + (1 - silent) - 2 * silent == pytest.approx(0, abs=1e-6)
    assert probes.l1_logistic(f, y, l1=0.375)[0].item() == 0 < probes.l1_logistic(f, y, l1=0.374)[0].item()  # a / 8


def test_the_ranking_probe_refuses_latents_that_are_not_finite():
    f, y = rare_and_dense(0)
    f[2, 3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        probes.l1_logistic(sparse.csr_array(f), torch.from_numpy(y), l1=0.01)


def test_only_positive_weights_are_ranked():
    f = torch.zeros(400, 4)
    y = torch.arange(400) < 100
    f[:80, 2], f[100:, 1], f[300:, 3] = 5.0, 5.0, 1.0  # for it, against it, against it; 0 never fires
    assert absorption.rank_by_regression(f, y[:, None]) == [[2]]
    f[:80, 2] = 0.02  # too weak for the penalty: it would be the first one in
    weight, _ = probes.l1_logistic(absorption.as_sparse(f), y[:, None], l1=absorption.RANKING_L1)
    assert weight.max() <= 0 and absorption.rank_by_regression(f, y[:, None]) == [[2]]
    with pytest.raises(DataError, match="with and without its parent"):
        absorption.rank_by_regression(f, torch.ones(400, 1))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_regressions_on_few_latents_agree_with_scikit_learn(k):
    for seed in range(5):
        f, y = rare_and_dense(seed)
        f, column = f[:, ::2][:, :k].astype(np.float32), y[:, seed % 2]
        weight, bias = probes.balanced_logistic(f, column)
        model = LogisticRegression(class_weight="balanced", max_iter=5000, tol=1e-8).fit(f.astype(float), column)
        np.testing.assert_allclose(weight, model.coef_[0], atol=1e-4)
        assert bias == pytest.approx(model.intercept_[0], abs=1e-4)
        assert ((f @ weight + bias > 0) == (model.decision_function(f.astype(float)) > 0)).all()
    with pytest.raises(DataError, match="both classes"):
        probes.balanced_logistic(f, column | True)


def test_spellings_stay_on_one_side():
    words = [
        form(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}")
        for i in range(200)
        for form in (str.lower, str.upper, str.title)
    ]
    is_test = probes.split_words(words, seed=5)
    assert is_test.double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert len({(w.lower(), t) for w, t in zip(words, is_test.tolist())}) == 200


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_step_that_lowers_nothing_is_not_taken():
    """Squares of 1e200 are infinite, and so is the curvature: there is no step, and no optimum to claim."""
    f, y = rare_and_dense(0)
    with pytest.raises(DataError, match="No step lowers the loss"):
        probes.l1_logistic(sparse.csr_array(f * 1e200), torch.from_numpy(y), l1=0.01)


def test_a_regression_that_is_not_at_its_optimum_is_not_given(monkeypatch):
    f, y = rare_and_dense(0)
    monkeypatch.setattr(probes, "MAX_STEPS", 1)
    with pytest.raises(DataError, match="500 rows is not at its optimum after 1 steps"):
        probes.balanced_logistic(f[:, :3], y[:, 0])
