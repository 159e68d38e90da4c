"""SCR and TPP: the identity against brute force with real encodes and padding, planted surgeons and butchers."""

import pytest
import torch
from random_saes import ALL_RULES, random_sae

from masksae.errors import DataError
from masksae.metrics.perturbation import Probe, Texts, fit_probe, scr, scr_effects, strongest, tpp, tpp_effects
from masksae.saes.sae import at_least_single

D, F = 24, 96


def sequences(n=40, s=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, s, D, generator=generator).double()
    is_token = torch.arange(s) < torch.randint(1, s + 1, (n, 1), generator=generator)
    return x, is_token, torch.arange(n) % 2 == 0


def pooled(values, is_token):
    """Mean over the tokens of each text: [n, s, m] -> [n, m]."""
    return torch.stack([value[mine].mean(0) for value, mine in zip(at_least_single(values), is_token)])


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
def test_the_identity_equals_ablating_in_the_sae(rule):
    """decode(f with the set zeroed) + (x - decode(f)) at every real token, averaged, then the probe."""
    sae = random_sae(rule, dtype=torch.float64).requires_grad_(False)
    x, is_token, y = sequences()
    f = sae.encode(x)
    texts = Texts(pooled(x, is_token), pooled(f, is_token), y)
    probe = Probe(torch.randn(D, generator=torch.Generator().manual_seed(1)).double(), 0.1)
    for chosen in ([3], list(range(50)), list(range(F))):
        without = f.clone()
        without[..., chosen] = 0
        changed = sae.decode(without) + (x - sae.decode(f))
        averaged = torch.stack([changed[i, is_token[i]].mean(0) for i in range(len(x))])
        logits = averaged @ probe.weight + probe.bias
        identity = texts.x @ probe.weight + probe.bias - texts.f[:, chosen] @ (sae.W_dec[chosen] @ probe.weight)
        torch.testing.assert_close(identity, logits, rtol=1e-9, atol=1e-10)
        assert probe.accuracy(texts, chosen, sae.W_dec) == ((logits > 0) == y).double().mean().item()


def world(n=210, seed=0):
    """Three concepts with a latent and a direction each: latent i is on in texts of class i; latent 4 is noise."""
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.eye(6, dtype=torch.float64)
    classes = torch.arange(n) % 3
    f = torch.zeros(n, 6, dtype=torch.float64)
    f[torch.arange(n), classes] = 2 + torch.rand(n, generator=generator).double()
    f[:, 4] = torch.rand(n, generator=generator).double()
    x = f @ w_dec
    probes = [Probe(torch.eye(6, dtype=torch.float64)[i], -1.0) for i in range(3)]
    return probes, [Texts(x, f, classes == i) for i in range(3)], w_dec


def test_a_perfect_surgeon_takes_one_class_and_spares_the_others():
    probes, texts, w_dec = world()
    result = tpp(probes, texts, texts, w_dec, ns=(1, 3))
    positives = sum(t.y.double().mean().item() for t in texts) / 3  # what an ablated class loses: its positives
    assert result.intended == pytest.approx({1: positives, 3: positives}) and result.unintended == {1: 0, 3: 0}
    assert result.total == result.intended


def test_one_concept_under_two_names_scores_zero():
    """Both probes read the same thing, so what one loses the other loses too."""
    probes, texts, w_dec = world()
    twin = Texts(texts[0].x, texts[0].f, texts[0].y)
    result = tpp([probes[0], probes[0]], [texts[0], twin], [texts[0], twin], w_dec, ns=(1, 2))
    assert result.intended == result.unintended == {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3)}
    assert result.total == {1: 0, 2: 0}


def test_latents_that_do_nothing_are_not_taken():
    probes, texts, w_dec = world()
    effect = tpp_effects(probes[0], texts[0], w_dec)
    assert strongest(effect, 5).tolist() == [0] and effect[5] == 0


def test_effects_by_hand():
    """Latent 0 fires for positives along the probe, 1 for positives against it, 2 for negatives along it, 3 for
    negatives against it."""
    f = torch.tensor([[2.0, 1, 0, 0], [0, 0, 3, 5]]).double()
    texts, w_dec = Texts(f, f, torch.tensor([True, False])), torch.eye(4).double()
    probe = Probe(torch.tensor([1.0, -1, 1, -1]).double(), 0.0)
    assert tpp_effects(probe, texts, w_dec).tolist() == [2, -1, 0, 0]
    assert strongest(tpp_effects(probe, texts, w_dec), 3).tolist() == [0, 1]
    assert scr_effects(probe, texts, w_dec).tolist() == [2, 1, 3, 5]


def two_attributes(n=400, seed=0):
    """Attribute 1 on axis 0, attribute 2 on axis 1, a latent each; independent of each other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.arange(n) % 2 == 0, torch.arange(n) // 2 % 2 == 0])
    f = torch.zeros(n, 4, dtype=torch.float64)
    f[:, :2] = labels.t() * 2 + 0.2 * torch.rand(n, 2, generator=generator).double()
    w_dec = torch.eye(4, dtype=torch.float64)
    x = f @ w_dec - torch.tensor([1.0, 1.0, 0, 0]).double()
    oracles = tuple(Probe(torch.eye(4, dtype=torch.float64)[i], 0.0) for i in range(2))
    return oracles, tuple(Texts(x, f, label) for label in labels), w_dec


def test_scr_regains_everything_when_the_spurious_latent_is_removed():
    oracles, texts, w_dec = two_attributes()
    spurious = Probe(
        torch.tensor([1.0, 3.0, 0, 0]).double(), 3.0
    )  # leans on attribute 2; 3 offsets what ablating takes away
    result = scr(spurious, oracles, texts, texts, w_dec, ns=(1,))
    base, after = spurious.accuracy(texts[0]), spurious.accuracy(texts[0], [1], w_dec)
    assert base == pytest.approx(0.5, abs=0.26) and after == 1.0
    assert result.direction_1[1] == pytest.approx((after - base) / (1 - base)) == pytest.approx(1.0)
    assert result.score == (result.direction_1 if base <= spurious.accuracy(texts[1]) else result.direction_2)


def test_scr_without_room_is_zero():
    oracles, texts, w_dec = two_attributes()
    assert scr(oracles[0], oracles, texts, texts, w_dec, ns=(1, 2)).direction_1 == {1: 0, 2: 0}


def test_an_sae_in_half_precision_on_activations_in_double():
    """Texts of latents, decoder and activations of different types score as in single precision."""
    sae = random_sae(dtype=torch.float32).requires_grad_(False)
    x, is_token, _ = sequences(200)
    y = pooled(x, is_token)[:, 0] > 0
    scores = []
    for own in (torch.float32, torch.bfloat16):
        sae, given = sae.to(own), x.to(torch.float32 if own == torch.float32 else torch.float64)
        mean, f = pooled(given, is_token), pooled(sae.encode(given), is_token)
        probe = fit_probe(mean, y)
        texts = Texts(mean, f, y), Texts(mean, f, ~y)
        probes = probe, Probe(-probe.weight, -probe.bias)
        spread = tpp(probes, texts, texts, sae.W_dec, ns=(50,))
        gained = scr(Probe(probe.weight.flip(0), 0.0), probes, texts, texts, sae.W_dec, ns=(50,))
        scores.append([spread.intended[50], spread.total[50], gained.room, probe.accuracy(texts[0], [3], sae.W_dec)])
    assert scores[1] == pytest.approx(scores[0], abs=0.03) and scores[0][2] > 0.1


def test_bad_input():
    probes, texts, w_dec = world()
    with pytest.raises(DataError, match="at least two classes, found 1"):
        tpp(probes[:1], texts[:1], texts[:1], w_dec)
    with pytest.raises(DataError, match="found 0 positives of 210"):
        Texts(texts[0].x, texts[0].f, torch.zeros(210, dtype=torch.bool))
    with pytest.raises(DataError, match="3 activations, 210 latents"):
        Texts(texts[0].x[:3], texts[0].f, texts[0].y)
