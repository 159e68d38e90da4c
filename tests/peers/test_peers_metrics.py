"""Probing and ablation against the functions of sae-probes 0.4.2 and SAEBench 0.6.0, on the same arrays and SAEs.

The peers live in an environment of their own: `make test-peers`. Elsewhere these tests are skipped.
"""

import pytest
import torch

pytest.importorskip("sae_bench")
pytest.importorskip("sae_probes")

from random_saes import ALL_RULES, random_sae

from masksae.export import saebench_adapter
from masksae.metrics.perturbation import Probe, Texts, scr_effects, strongest, tpp_effects
from masksae.metrics.sparse_probing import probe, rank_latents

D, F = 24, 96


def pooled(values, is_token):
    """Mean over the tokens of each text: values [n, s, m], is_token bool [n, s] -> [n, m]."""
    return torch.where(is_token[..., None], values, 0).sum(1) / is_token.sum(1)[:, None]


def data(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(n, generator=generator) < 0.5
    f = torch.relu(torch.randn(n, 30, generator=generator)) * torch.logspace(-1, 1, 30)
    f[:, 4] += 0.8 * y
    return f, y


@pytest.mark.parametrize("normalised", [True, False])
def test_ranking_is_that_of_sae_probes(normalised):
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization

    f, y = data()
    theirs = get_sorted_indices(f, y.int().numpy(), mean_act_normalization if normalised else None)
    assert rank_latents(f, y, normalised=normalised).tolist() == theirs.tolist()


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_sae_probes(penalty):
    """Same split, same grid, same solver: the same C and the same numbers."""
    from sae_probes.utils_training import find_best_reg

    f, y = data(600)
    x = f[:, :8]
    theirs = find_best_reg(
        x[:300].double().numpy(), y[:300].int().numpy(), x[300:].double().numpy(), y[300:].int().numpy(),
        penalty=penalty, seed=42,
    ).metrics  # fmt: skip
    ours = probe(x[:300], y[:300], x[300:], y[300:], penalty=penalty, seed=42)
    assert ours.auc == pytest.approx(theirs.test_auc, abs=1e-9)
    assert ours.accuracy == pytest.approx(theirs.test_acc) and ours.f1 == pytest.approx(theirs.test_f1)


def sequences(padded: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, D, generator=generator)
    is_token = torch.ones(80, 6, dtype=torch.bool)
    if padded:
        is_token = torch.arange(6) < torch.randint(2, 7, (80, 1), generator=generator)
        x[~is_token] = 0
    return x, is_token, torch.arange(80) < 40


def their_probe(weight):
    from sae_bench.evals.sparse_probing.probe_training import Probe as Theirs

    probe = Theirs(D, torch.float32)
    probe.net.weight.data.copy_(weight)
    return probe


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("scr", [False, True], ids=["tpp", "scr"])
def test_effects_and_ablation_are_those_of_saebench(rule, scr):
    from sae_bench.evals.scr_and_tpp import main as theirs
    from sae_bench.sae_bench_utils.dataset_info import PAIRED_CLASS_KEYS

    sae = random_sae(rule, dtype=torch.float32).requires_grad_(False)
    adapter = saebench_adapter(sae, model_name="pythia-160m-deduped", layer=8)
    x, is_token, y = sequences(padded=False)
    weight = torch.randn(D, generator=torch.Generator().manual_seed(1))
    texts = Texts(pooled(x, is_token), pooled(sae.encode(x), is_token), y)
    names = next(iter(PAIRED_CLASS_KEYS.items())) if scr else ("a", "b")
    classes = {names[0]: x[y], names[1]: x[~y]}
    expected = theirs.get_effects_per_class_precomputed_acts(adapter, their_probe(weight), names[0], classes, scr, 16)
    effect = (scr_effects if scr else tpp_effects)(Probe(weight, 0.0), texts, sae.W_dec)
    torch.testing.assert_close(effect, expected, rtol=1e-4, atol=1e-5)
    mask = theirs.select_top_n_features(expected, 10, names[0])
    assert set(strongest(effect, 10).tolist()) == set(mask.nonzero().flatten().tolist())
    ablated = theirs.ablated_precomputed_activations(x, adapter, mask, 16)
    chosen = mask.nonzero().flatten()
    torch.testing.assert_close(texts.x - texts.f[:, chosen] @ sae.W_dec[chosen], ablated, rtol=1e-4, atol=1e-4)


def test_where_texts_are_padded_saebench_leaks_the_latents_of_zero():
    """The difference on purpose: its ablated pass encodes padded positions, which adds -f(0) d for each to the
    average."""
    from sae_bench.evals.scr_and_tpp import main as theirs

    sae = random_sae(ALL_RULES[2], dtype=torch.float32).requires_grad_(False)
    adapter = saebench_adapter(sae, model_name="pythia-160m-deduped", layer=8)
    x, is_token, _ = sequences(padded=True)
    f = sae.encode(x)
    mask = torch.ones(F, dtype=torch.bool)
    ours = pooled(x, is_token) - pooled(f, is_token) @ sae.W_dec
    ablated = theirs.ablated_precomputed_activations(x, adapter, mask, 16)
    zero = sae.encode(torch.zeros(1, D)) @ sae.W_dec
    leak = -zero * ((~is_token).sum(1) / is_token.sum(1))[:, None]
    assert leak.norm(dim=1).max() > 0.1
    torch.testing.assert_close(ours + leak, ablated, rtol=1e-4, atol=1e-4)
