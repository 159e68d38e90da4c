"""Absorption: each clause of the rule at its edge, an independent brute force, planted absorbers, and the probes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score

from masksae import SAE, BatchTopK, SAEConfig
from masksae.errors import DataError
from masksae.metrics import absorption, probes
from masksae.metrics.absorption import absorbed, first_letter

E1, E2 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def at_cosine(c: float) -> torch.Tensor:
    return torch.tensor([c, math.sqrt(1 - c * c)])


def one_word(f, decoder, a=1.0):
    """The rule on one word whose activation has component `a` along the probe; latent 0 is the main one."""
    full, fraction = absorbed(a * E1[None], torch.tensor([f]), torch.stack(decoder), 5 * E1, [0])
    return bool(full[0]), fraction[0].item()


@pytest.mark.parametrize(
    "f, decoder, a, full, fraction",
    [
        ([0.0, 1.0], [E1, at_cosine(0.5)], 1.0, True, 1.0),
        ([1e-7, 1.0], [E1, at_cosine(0.5)], 1.0, False, 0.5 / (0.5 + 1e-7)),  # the main latent fires a little
        ([1e-9, 1.0], [E1, at_cosine(0.5)], 1.0, True, 0.5 / (0.5 + 1e-9)),  # ... below 1e-8 it counts as silent
        ([0.0, 17.0], [E1, at_cosine(0.0249)], 1.0, False, 0.0),  # not aligned
        ([0.0, 17.0], [E1, at_cosine(0.0251)], 1.0, True, 0.0),  # aligned enough for full, not for the fraction
        ([0.0, 5.0], [E1, at_cosine(0.0999)], 1.0, True, 0.0),
        ([0.0, 5.0], [E1, at_cosine(0.1001)], 1.0, True, 1.0),
        ([0.0, 0.799], [E1, at_cosine(0.5)], 1.0, False, 0.0),  # carries less than .4 of the direction
        ([0.0, 0.801], [E1, at_cosine(0.5)], 1.0, True, 1.0),
        ([0.0, 1.0], [E1, at_cosine(0.5)], -1.0, False, 0.0),  # the word has the direction reversed
        ([1.0, 1.0], [E1, at_cosine(0.5)], 1.0, False, 0.0),  # the main latent carries it all
        ([0.25, 1.0], [E1, at_cosine(0.5)], 1.0, False, 2 / 3),
        ([0.75, 1.0], [E1, at_cosine(0.5)], 1.0, False, 0.25),  # absorbers are credited with what is missing only
        ([0.0, 0.0], [E1, at_cosine(0.5)], 1.0, False, 0.0),
        ([0.0, 0.3, 0.3, 0.3, 9.0], [E1, E1, E1, E1, E2], 1.0, False, 1.0),  # three small ones together
        ([0.0, 0.19, 0.1, 0.1, 0.1], [E1, E1, E1, E1, E1], 1.0, False, 0.0),  # a fourth does not count: .39
        ([0.5, 0.0], [-E1, at_cosine(0.5)], 1.0, False, 0.0),
    ],
)
def test_clauses(f, decoder, a, full, fraction):
    got = one_word(f, decoder, a)
    assert got[0] is full and got[1] == pytest.approx(fraction, abs=1e-6)


def test_a_word_without_the_direction_is_no_division_by_zero():
    assert one_word([0.0, 0.0], [E1, E2], a=0.0) == (False, 0.0)


def brute(x, f, w_dec, direction, main):
    """The rule again, word by word in plain Python floats."""
    p = direction / np.linalg.norm(direction)
    full, fraction = [], []
    for word, latents in zip(x, f):
        a = float(word @ p)
        cosine = [float(w @ p / np.linalg.norm(w)) for w in w_dec]
        carried = [v * c for v, c in zip(latents, cosine)]
        best = max(range(len(carried)), key=lambda j: carried[j])
        silent = all(latents[j] < 1e-8 for j in main)
        full.append(silent and cosine[best] >= 0.025 and a > 0 and carried[best] >= 0.4 * a)
        by_main = sum(carried[j] for j in main)
        others = [carried[j] for j in range(len(carried)) if j not in main and cosine[j] >= 0.1 and carried[j] > 0]
        total = sum(sorted(others, reverse=True)[:3])
        if a <= 0 or by_main >= a or total < 0.4 * a:
            fraction.append(0.0)
        elif by_main <= 0:
            fraction.append(1.0)
        else:
            fraction.append(min(total, a - by_main) / (min(total, a - by_main) + by_main))
    return full, fraction


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n_main=st.integers(1, 4))
def test_against_brute_force(seed, n_main):
    rng = np.random.default_rng(seed)
    d, n_latents, n = 5, 12, 40
    x, w_dec, direction = rng.normal(size=(n, d)), rng.normal(size=(n_latents, d)), rng.normal(size=d)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    f = np.maximum(rng.normal(size=(n, n_latents)) - rng.choice([0.0, 1.0]), 0)
    main = rng.choice(n_latents, n_main, replace=False).tolist()
    full, fraction = absorbed(*(torch.from_numpy(v) for v in (x, f, w_dec, direction)), main)
    expected = brute(x, f, w_dec, direction, main)
    assert full.tolist() == expected[0]
    np.testing.assert_allclose(fraction.numpy(), expected[1], atol=1e-9)


LETTERS = "abcdef"


def world(n=1200, absorbed_word=None, seed=0):
    """Activations with one direction per first letter and one per word, and an SAE that knows both exactly.

    On `absorbed_word` the letter's latent is silent and the word's latent holds the letter's direction as well.
    """
    rng = torch.Generator().manual_seed(seed)
    spelled = [
        c + tail for c in LETTERS for tail in ("ax", "bex", "cix", "dox", "fux", "gan", "hen", "kin", "lon", "mun")
    ]
    words = [spelled[i % len(spelled)] for i in range(n)]
    d = len(LETTERS) + len(spelled)
    basis = torch.eye(d)
    sae = SAE(SAEConfig(d, d, BatchTopK(2)))
    letter = torch.tensor([LETTERS.index(w[0]) for w in words])
    which = torch.tensor([len(LETTERS) + spelled.index(w) for w in words])
    x = basis[letter] + basis[which] + 0.01 * torch.randn(n, d, generator=rng)
    with torch.no_grad():
        sae.W_dec.copy_(basis)
        sae.W_enc.copy_(basis)
        sae.b_enc.fill_(-0.2)
        if absorbed_word is not None:
            parent, child = LETTERS.index(absorbed_word[0]), len(LETTERS) + spelled.index(absorbed_word)
            sae.W_dec[child] = (basis[parent] + basis[child]) / 2**0.5
            sae.W_enc[child, parent] = -10.0
            sae.W_enc[child, child] = 2.0
        sae.threshold.fill_(0.0)
    return sae.requires_grad_(False), x, words


def test_an_sae_without_absorption_scores_zero():
    sae, x, words = world()
    result = first_letter(sae, x, words, min_letters=6)
    assert result.mean_full == result.mean_fraction == 0 and result.mean_split_latents == 1
    assert [r.main for r in result.letters] == [(i,) for i in range(6)]
    assert all(r.f1 == 1 and r.probe_f1 == 1 for r in result.letters)
    assert "".join(r.letter for r in result.letters) == LETTERS and len(result.excluded) == 20


def test_a_planted_absorber_is_found_and_only_it():
    word = "bbex"
    sae, x, words = world(absorbed_word=word)
    seed = next(s for s in range(100) if probes.split_words(words, s)[words.index(word)])  # a test word
    result = first_letter(sae, x, words, min_letters=6, seed=seed)
    is_test = probes.split_words(words, seed)
    mine = [w for w, t in zip(words, is_test.tolist()) if t and w[0] == "b"]
    by_letter = {r.letter: r for r in result.letters}
    assert by_letter["b"].words == len(mine)
    assert by_letter["b"].full == pytest.approx(mine.count(word) / len(mine)) and by_letter["b"].full > 0
    assert all(r.full == 0 for name, r in by_letter.items() if name != "b")
    assert result.mean_full == pytest.approx(by_letter["b"].full / 6)


def test_an_sae_in_half_precision_on_activations_in_double():
    sae, x, words = world(absorbed_word="bbex")
    seed = next(s for s in range(100) if probes.split_words(words, s)[words.index("bbex")])
    exact = first_letter(sae, x, words, min_letters=6, seed=seed)
    found = first_letter(sae.bfloat16(), x.double(), words, min_letters=6, seed=seed)
    assert found.mean_full == exact.mean_full > 0 and found.mean_split_latents == exact.mean_split_latents
    assert found.mean_fraction == pytest.approx(exact.mean_fraction, abs=0.01)
    assert found.mean_fraction_legacy == pytest.approx(exact.mean_fraction_legacy, abs=0.02)


def test_a_higher_threshold_silences_the_main_latents():
    sae, x, words = world()
    assert first_letter(sae, x, words, min_letters=6, threshold=10.0).mean_full == 0  # and nobody carries the letter
    assert first_letter(sae, x, words, min_letters=6, threshold=0.0) == first_letter(sae, x, words, min_letters=6)


def test_errors():
    sae, x, words = world()
    with pytest.raises(DataError, match=r"Only 6 letters .* 20 are needed"):
        first_letter(sae, x, words)
    with pytest.raises(DataError, match="1199 activations, 1200 words"):
        first_letter(sae, x[1:], words, probe=probes.letter_probe(x, words))
    with pytest.raises(DataError, match="one per word"):
        probes.letter_probe(x[1:], words)
    with pytest.raises(DataError, match="'9lives' does not start"):
        probes.first_letters(["cat", "9lives"])
    with pytest.raises(DataError, match="too few for 2 prefixes"):
        absorption.icl_prefixes(["cat", "dog"], n_prefixes=2)


def test_the_length_of_decoder_rows_counts_with_the_latents():
    """An SAE whose rows are not of norm 1 scores like the same SAE with the norms folded into the latents."""
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(50, 8, generator=generator), torch.randn(8, generator=generator)
    f, w_dec = torch.relu(torch.randn(50, 20, generator=generator)), torch.randn(20, 8, generator=generator)
    norm = w_dec.norm(dim=1)
    folded = absorbed(x, f * norm, w_dec / norm[:, None], direction, [3])
    for ours, expected in zip(absorbed(x, f, w_dec, direction, [3]), folded):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_legacy_fraction_by_hand():
    f = torch.tensor([[0.0, 2.0, 0.0], [3.0, 1.0, 0.0], [1.0, 0.0, 9.0], [0.0, 0.0, 9.0]])
    decoder = torch.stack([E1, E1, E2])
    assert absorption.legacy_fraction(f, decoder, 7 * E1, [0]).tolist() == pytest.approx([1.0, 0.25, 0.0, 0.0])


def test_an_sae_of_another_width_is_refused():
    sae, x, words = world()
    other = SAE(SAEConfig(x.shape[1] + 1, 8, BatchTopK(2)))
    with pytest.raises(DataError, match=f"width {x.shape[1]}, the SAE {x.shape[1] + 1}"):
        first_letter(other, x, words, min_letters=6)


def test_what_failed_the_gate_is_said_by_how_much():
    sae, x, words = world()
    with pytest.raises(DataError, match=r"failed: .*z 0\.00"):
        first_letter(sae, x, words, min_letters=7)


def test_a_letter_without_recognised_test_words_is_left_out(monkeypatch):
    sae, x, words = world()
    monkeypatch.setattr(absorption, "PROBE_GATE", -1.0)
    result = first_letter(sae, x, words, min_letters=26)
    assert len(result.letters) == 6 and len(result.excluded) == 20 and math.isfinite(result.mean_full)


def test_main_latents_stop_where_a_further_one_adds_too_little():
    generator = torch.Generator().manual_seed(0)
    n = 2000
    positive = torch.rand(n, generator=generator) < 0.5
    half = torch.rand(n, generator=generator) < 0.5
    f = torch.rand(n, 5, generator=generator) * 0.01
    f[:, 0] += (positive & half).float()  # two latents split the feature; a third repeats, a fourth would help
    f[:, 1] += (positive & ~half).float()
    f[:, 2] = f[:, 0]
    is_test = torch.arange(n) % 5 == 0
    found = absorption.main_latents(f, positive, ~is_test, is_test, [0, 1, 2, 3])
    assert found.latents == (0, 1)
    assert found == absorption.main_latents(absorption.as_sparse(f).tocsc(), positive, ~is_test, is_test, [0, 1, 2, 3])
    assert absorption.main_latents(f, positive, ~is_test, is_test, [0, 2, 1]).latents == (0,)  # the first failure
    model = LogisticRegression(class_weight="balanced", max_iter=500).fit(f[~is_test][:, [0]], positive[~is_test])
    predicted, one = model.decision_function(f[is_test][:, [0]]) > 0, [0]
    found = absorption.main_latents(f, positive, ~is_test, is_test, one)
    assert found.f1 == pytest.approx(f1_score(positive[is_test], predicted))
    assert found.recall == pytest.approx(recall_score(positive[is_test], predicted))


@pytest.mark.parametrize("also_on, kind", [(0, "specific"), (1, "middle"), (3, "dense")])
def test_absorption_is_split_by_how_often_the_absorber_fires(also_on, kind):
    """The absorber of one of 60 words fires on those of 0, 1 or 3 of six letters as well: on 2, 18 or 52 % of all."""
    word = "bbex"
    sae, x, words = world(absorbed_word=word)
    seed = next(s for s in range(100) if probes.split_words(words, s)[words.index(word)])
    child = len(LETTERS) + [w for w in dict.fromkeys(words)].index(word)
    for other in range(also_on):
        sae.W_enc[2 + other, child] = 2.0  # of c, d, e
    result = first_letter(sae, x, words, min_letters=6, seed=seed)
    by_letter = {r.letter: r for r in result.letters}
    b = by_letter["b"]
    assert b.full > 0 and {name: getattr(b, name) for name in ("specific", "middle", "dense")} == {
        name: b.full if name == kind else 0 for name in ("specific", "middle", "dense")
    }
    assert result.mean_specific + result.mean_middle + result.mean_dense == pytest.approx(result.mean_full, abs=1e-12)
    assert result.dense_absorbers == (kind == "dense")
    assert first_letter(*world(), min_letters=6, seed=seed).dense_absorbers is None


def test_an_sae_without_a_letter_is_told_by_its_f1():
    """The latent for b fires on every word, so it is no main latent, and every word of b is absorbed by it."""
    sae, x, words = world()
    sae.W_enc[:, 1], sae.b_enc[1] = 0, 1
    result = first_letter(sae, x, words, min_letters=6)
    b = next(r for r in result.letters if r.letter == "b")
    assert b.full == b.dense == 1 == result.dense_absorbers and b.specific == 0
    assert b.f1 < 0.5 and b.recall < 0.6
    assert all(r.recall == 1 for r in result.letters if r.letter != "b")
    assert result.main_f1 == pytest.approx(sum(r.f1 for r in result.letters) / 6)
    assert result.main_recall == pytest.approx(sum(r.recall for r in result.letters) / 6)


def test_words_that_do_not_count_leave_the_means_and_nothing_else():
    word = "bbex"
    sae, x, words = world(absorbed_word=word)
    seed = next(s for s in range(100) if probes.split_words(words, s)[words.index(word)])
    probe, options = probes.letter_probe(x, words, seed=seed), dict(min_letters=6, seed=seed)
    plain = first_letter(sae, x, words, probe=probe, **options)
    everything = first_letter(sae, x, words, probe=probe, counted=torch.ones(len(words), dtype=torch.bool), **options)
    assert plain == everything and plain.words_left_out == 0
    counted = torch.tensor([w != word for w in words])
    result = first_letter(sae, x, words, probe=probe, counted=counted, **options)
    assert result.mean_full == 0 < plain.mean_full and result.words_left_out == words.count(word)
    assert [r.main for r in result.letters] == [r.main for r in plain.letters]
    counted &= torch.tensor([w[0] != "c" for w in words])
    assert "c" in first_letter(sae, x, words, probe=probe, counted=counted, **options).excluded
    with pytest.raises(DataError, match=r"none of the 0 test words that count.*min_count"):
        first_letter(sae, x, words, probe=probe, counted=torch.zeros(len(words), dtype=torch.bool), **options)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(30, 60), n_prefixes=st.integers(1, 3), seed=st.integers(0, 50))
def test_prefixes_never_show_their_own_words(n, n_prefixes, seed):
    words = [f"{chr(97 + i % 26)}word{chr(97 + i // 26)}" for i in range(n)] if n_prefixes > 1 else []
    if not words:
        with pytest.raises(DataError):
            absorption.icl_prefixes(["only"], n_prefixes=1)
        return
    for i, prefix in enumerate(absorption.icl_prefixes(words, n_prefixes=n_prefixes, seed=seed)):
        shown = [line.split(" has the first letter: ") for line in prefix.strip().split("\n")]
        assert len(shown) == 10 == len({w for w, _ in shown})
        assert all(word[0].upper() == letter for word, letter in shown)
        assert not {w for w, _ in shown} & set(words[i::n_prefixes])
        assert prefix.startswith("\n") and prefix.endswith("\n")
