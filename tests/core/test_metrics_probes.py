"""The probes of the first-letter task: converged, seeded, in agreement with scikit-learn."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

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
    ranked = absorption.rank_by_regression(f, torch.nn.functional.one_hot(letters, 26).float(), seed=0)
    assert ranked[:3, 0].tolist() == [0, 1, 2] and ranked.shape == (26, 10)


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
    f, y = torch.cat([dense, rare], dim=1), torch.nn.functional.one_hot(letters, 26).float()
    assert absorption.rank_by_regression(f, y, seed=0)[:3, 0].tolist() == [0, 1, 2]
    early, _ = probes.fit_linear(f, y, batch=4096, weight_decay=1e-6, l1=0.01, seed=0)  # SAEBench's batch
    assert (early[:3].argmax(1) >= 60).all()


def test_spellings_stay_on_one_side():
    words = [
        form(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}")
        for i in range(200)
        for form in (str.lower, str.upper, str.title)
    ]
    is_test = probes.split_words(words, seed=5)
    assert is_test.double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert len({(w.lower(), t) for w, t in zip(words, is_test.tolist())}) == 200
