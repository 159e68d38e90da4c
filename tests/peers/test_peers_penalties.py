"""Penalties and prefix weights in dictionary_learning 0.1.0's trainers, whose loss, autograd, projection, clipping and
Adam are theirs; double precision. They know neither OrtSAE nor C2R: those are added to their loss by the definition."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("dictionary_learning")
pytest.importorskip("sae_lens")

from naive_penalties import naive
from peers import dictionary_learning_names, dictionary_learning_trainer, named
from random_saes import random_batch, random_sae

from masksae import C2R, MATRYOSHKA, BatchTopK, OrtSAE, ReLU, TopK, TrainConfig
from masksae.training.step import Trainer

RECIPE = TrainConfig(steps=1000, lr=1e-3, warmup=0, decay=0.0, threshold_start=8, threshold_ema=0.9, sparsity_warmup=10)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def twenty_updates(sae, theirs, sparse: bool) -> float:
    """Largest distance between the two, as a share of what a tensor has travelled."""
    names = dictionary_learning_names(sae)
    before, ours = named(sae, names), Trainer(sae, RECIPE)
    ours.sparse = sparse
    for step in range(1, 21):
        theirs.update(step, random_batch(seed=step))
        ours.step(random_batch(seed=step), step)
    mine, other = named(sae, names), theirs.ae.state_dict()
    return max(((mine[n] - other[n]).norm() / (mine[n] - before[n]).norm()).item() for n in mine)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("penalty", [OrtSAE(5.0, every=3), C2R(2.0, every=2)], ids=["OrtSAE", "C2R"])
@pytest.mark.parametrize("rule, prefixes", [(TopK(4), ()), (BatchTopK(4), MATRYOSHKA), (ReLU(0.02), ())], ids=str)
def test_twenty_updates_with_a_penalty(rule, prefixes, penalty, sparse):
    """To 1e-5 of the distance travelled, as without (their projection divides rows by their norm + 1e-6); leaving the
    penalty out makes a hundred times that."""
    sae, again = random_sae(rule, prefixes), random_sae(rule, prefixes)
    theirs, without = dictionary_learning_trainer(sae, RECIPE), dictionary_learning_trainer(sae, RECIPE)
    [(theirs_name, name)] = [item for item in dictionary_learning_names(sae).items() if item[1].startswith("W_dec")]
    plain, encoding = theirs.loss, {"use_threshold": False} if isinstance(rule, BatchTopK) else {}

    def loss(x, step, **options):
        w_dec = theirs.ae.get_parameter(theirs_name)
        w_dec = w_dec.t() if name.endswith(".T") else w_dec
        f = theirs.ae.encode(x, **encoding)
        f = f if rule.unit_rows else f * w_dec.norm(dim=1)
        added = penalty.weight * penalty.every * naive(type(penalty).__name__, w_dec, f)
        return plain(x, step=step, **options) + (added if step % penalty.every == 0 else 0)

    theirs.loss = loss
    sae.config = again.config = replace(sae.config, penalties=(penalty,))
    assert twenty_updates(sae, theirs, sparse) < 1e-5
    assert twenty_updates(again, without, sparse) > 1e-3


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_one_weight_per_prefix(sparse):
    """dictionary_learning takes the mean over groups of the weighted losses: its weights are G times ours."""
    prefixes, weights = (0.25, 0.25, 0.5), (0.5625, 0.75, 1.0)
    sae, again = (random_sae(BatchTopK(4), prefixes, tuple(w / 3 for w in weights)) for _ in range(2))
    theirs, without = dictionary_learning_trainer(sae, RECIPE), dictionary_learning_trainer(sae, RECIPE)
    theirs.group_weights = list(weights)
    assert twenty_updates(sae, theirs, sparse) < 1e-5
    assert twenty_updates(again, without, sparse) > 1e-3
