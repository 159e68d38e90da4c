"""A selection rule is one class: one that is defined here, outside the package, is trained, kept, exported, planned and
scored."""

import importlib
import json
import math
import os
from dataclasses import dataclass

import pytest
import torch
from random_saes import random_batch
from safetensors.torch import load_file
from small_training import D, F, run, same, sparse_world, train_config
from tiny_project import profile

from masksae import MATRYOSHKA, SAE, AuxK, Run, SAEConfig, TopK, load_profile, load_sae, load_saelens, metrics
from masksae.errors import CodeError, ConfigError
from masksae.memory import parameters, training_bytes
from masksae.saes.formats import DIRECT, SAELENS, Peer
from masksae.saes.loss import dense_step
from masksae.saes.rules import SELECTIONS, Selection
from masksae.saes.sparse import sparse_step
from masksae.study.scores import reconstruction
from masksae.study.sections import Grid
from masksae.training.step import Trainer


@dataclass(frozen=True)
class Cutoff(Selection):
    """Keep what exceeds a cut of each latent's own; all cuts are pulled up while more than k latents are active, else
    down."""

    k: float
    start: float = 0.01

    scaled = ("cut",)

    @property
    def goal(self):
        return self.k

    def tensors(self, n):
        return {"cut": torch.full((n,), self.start)}

    def margins(self, sae, pre):
        return pre - sae.cut

    def project_(self, sae):
        sae.cut.clamp_(min=0)

    def dense(self, sae, pre, weight):
        active = pre > sae.cut
        missing = self.k - active.sum(dtype=pre.dtype) / len(pre)
        return pre * active, None, weight * missing * sae.cut.mean()

    def support(self, sae, pre, most):
        index = (pre > sae.cut).view(-1).nonzero().squeeze(1)
        return index if len(index) <= most else None

    def sparse(self, sae, e):
        return e.pre, None

    def backward(self, sae, e, f, grad_f, grad_gate, weight):
        missing = self.k - len(f) / e.shape[0]
        sae.cut.grad = torch.full_like(sae.cut, weight * missing / len(sae.cut))
        return grad_f, weight * missing * sae.cut.mean()


SAELENS.append(Peer(Cutoff, "jumprelu", DIRECT | {"threshold": "cut"}))


def sae_config(**changes):
    return SAEConfig(D, F, **({"selection": Cutoff(3.0)} | changes))


@pytest.mark.parametrize("prefixes", [(), (0.25, 0.75)])
@pytest.mark.parametrize("aux", [None, AuxK(dead_after_tokens=1000)])
def test_the_sparse_step_is_the_dense_one_to_rounding(prefixes, aux):
    sae, x = SAE(sae_config(prefixes=prefixes, aux=aux)).double(), random_batch(d=D)
    sae.cut.data += 0.3 * torch.rand(F, generator=torch.Generator().manual_seed(0)).double()
    xc, pre, found = sae.encoder_input(x), sae.pre_activations(x).detach(), []
    for step in (
        lambda: dense_step(sae, x, xc, pre, 0.5, None, False),
        lambda: sparse_step(sae, x, xc, pre, sae.config.selection.support(sae, pre, math.inf), 0.5, False),
    ):
        outcome = step()
        found.append([outcome.loss, outcome.l0, outcome.residual, *(p.grad.clone() for p in sae.parameters())])
    for dense, sparse in zip(*found):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)
    assert {name for name, p in sae.named_parameters() if p.grad.norm() > 0} >= {"cut", "W_dec", "W_enc", "b_enc"}


def test_it_trains_and_comes_back_from_a_folder(tmp_path):
    config, recipe = sae_config(), train_config(400, lr=3e-3)
    [sae] = run(recipe, [config])
    x = sparse_world()[0]
    assert abs(sae.history[-1]["l0"] - 3) < 1 and metrics.explained_variance(x, sae(x)) > 0.5
    assert same([SAE.load(sae.save(tmp_path / "sae"))], [sae]) and load_sae(tmp_path / "sae").config == config
    [again] = run(recipe, [config], checkpoint_dir=tmp_path / "run")
    assert same([again], [sae])
    with pytest.raises(ConfigError, match="'Cutof'. Did you mean 'Cutoff'.* Import the module"):
        SAEConfig.from_dict(config.to_dict() | {"selection": {"rule": "Cutof", "k": 3.0}})


def test_training_in_other_units_gives_the_same_function(tmp_path):
    """Its own tensor grows with the activations, since the rule says that it is in their units."""
    sae, x = SAE(sae_config()).requires_grad_(False), random_batch(d=D, dtype=torch.float32)
    f = sae.encode(x)
    torch.testing.assert_close(sae.rescale_(8).encode(8 * x), 8 * f)
    sae.W_dec *= 3
    torch.testing.assert_close(sae.normalise_().encode(8 * x), 24 * f)


def test_without_a_sparse_step_the_dense_one_is_taken():
    class DenseCutoff(Cutoff):
        support = Selection.support

    x = random_batch(d=D, dtype=torch.float32)
    for rule in (Cutoff(3.0), DenseCutoff(3.0)):
        trainer = Trainer(SAE(sae_config(selection=rule)), train_config())
        trainer.step(x, 0)
        if rule == Cutoff(3.0):
            expected = trainer.sae.W_dec.detach().clone()
    torch.testing.assert_close(trainer.sae.W_dec.detach(), expected)
    del SELECTIONS["DenseCutoff"]


def test_saelens_and_back(tmp_path):
    sae, x = SAE(sae_config(prefixes=(0.5, 0.5))).requires_grad_(False), random_batch(d=D, dtype=torch.float32)
    sae.cut += 0.2 * torch.rand(F, generator=torch.Generator().manual_seed(0))
    again = load_saelens(sae.to_saelens(tmp_path / "sae"))
    assert again.config == sae.config and same([again], [sae])
    assert torch.equal(load_file(tmp_path / "sae/sae_weights.safetensors")["threshold"], sae.cut)
    record = json.loads((tmp_path / "sae/cfg.json").read_text())
    del record["metadata"]["masksae"]
    (tmp_path / "sae/cfg.json").write_text(json.dumps(record))
    foreign = load_saelens(tmp_path / "sae")  # as SAELens has it: a JumpReLU
    torch.testing.assert_close(foreign(x), sae(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="dictionary_learning has nothing that computes what Cutoff does"):
        sae.to_dictionary_learning(tmp_path / "other")


def test_memory_counts_its_tensor():
    assert parameters(sae_config()) == parameters(sae_config(selection=TopK(3))) + F
    assert parameters(sae_config()) == sum(p.numel() for p in SAE(sae_config()).parameters())
    assert training_bytes([sae_config()], 64) == training_bytes([sae_config()], 64, sparse=False)  # starts dense


def test_a_grid_takes_it_by_the_snake_case_of_its_name():
    grid = Grid(name="mine", selection={"rule": "cutoff", "k": 3, "start": 0.5}, n_latents=64, prefixes=MATRYOSHKA)
    config = grid.config(16, seed=1)
    assert config.selection == Cutoff(3.0, 0.5) and config.aux is None and type(config.selection.k) is float
    assert grid.architecture == "Matryoshka Cutoff"


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"rule": "cutof", "k": 3}, "saes.0.selection.rule: found 'cutof'. Did you mean 'cutoff'"),
        ({"rule": "cutoff"}, "cutoff takes exactly k (and start if wanted), found nothing."),
        ({"rule": "cutoff", "k": 3, "stat": 1}, "found k, stat. Did you mean 'start'?"),
        ({"rule": "cutoff", "k": "three"}, "saes.0.selection: k: Input should be a valid number"),
        ({"rule": "topk"}, "topk takes exactly k, found nothing."),
        ({"rule": "topk", "k": 0}, "TopK.k must be a positive integer, found 0"),
        ({"rule": "batch_topk", "k": 3, "l1": 0.1}, "batch_topk takes exactly k, found k, l1."),
        ({"rule": "jump_relu", "k": 3}, "jump_relu takes exactly target_l0"),
        ({"rule": "relu", "l1": 0.1}, "relu takes exactly l1 and target_l0, found l1."),
        ({"rule": "gated", "l1": 0.1, "target_l0": None}, "gated takes exactly l1 and target_l0, found l1."),
        ({"rule": "gated", "l1": float("inf"), "target_l0": 3}, "l1: Input should be a finite number"),
    ],
)
def test_a_profile_with_a_mistake_in_a_rule_is_told_which(project, selection, words):
    path = profile(project, saes=[{"name": "a", "selection": selection, "n_latents": 32}])
    with pytest.raises(ConfigError) as error:
        load_profile(path)
    assert words in str(error.value)


def test_a_profile_is_run_with_it_and_scored(project):
    grids = [{"name": "mine", "selection": {"rule": "cutoff", "k": 3}, "n_latents": 32}]
    study = Run(profile(project, saes=grids, blocks=[{"pairs": [0]}]))
    rows = study.scored(reconstruction.reconstruction_scores)
    assert {(row["architecture"], row["k"]) for row in rows} == {("Cutoff", 3.0)} and len(rows) == 4
    for row in rows:
        assert row["ev_centred"] > 0
        if row["mode"] == "matched":
            assert row["l0"] == pytest.approx(3, abs=0.01)
    sae, x = next(iter(study.saes.values())), study.held_out
    direction = sae.W_dec[0]
    full, fraction = metrics.absorption.absorbed(x, sae.encode(x), sae.W_dec, direction, [0])
    assert full.shape == fraction.shape == (len(x),) and 0 <= fraction.min() and fraction.max() <= 1


def test_its_name_is_its_own():
    with pytest.raises(ConfigError, match="test_rules has a selection rule Cutoff already"):
        type("Cutoff", (Selection,), {"__module__": "elsewhere"})
    with pytest.raises(ConfigError, match="rules has a selection rule TopK already"):
        type("TOpK", (Selection,), {"__module__": "elsewhere"})
    assert SELECTIONS["Cutoff"] is Cutoff


EDITED = """
from dataclasses import dataclass
from masksae.saes.rules import Selection

@dataclass(frozen=True)
class Edited(Selection):
    k: float
    goal = {goal}
"""


def test_its_code_is_in_the_id_of_what_it_trains(project, monkeypatch):
    """A rule that was edited trains again, though no line of the package has changed."""
    monkeypatch.syspath_prepend(project)
    path = profile(
        project,
        saes=[{"name": "a", "selection": {"rule": "edited", "k": 3}, "n_latents": 32}],
        blocks=[{"pairs": [0]}],
    )
    (project / "edited.py").write_text(EDITED.format(goal=2))
    module = importlib.import_module("edited")
    try:
        ids = lambda run: [run.id_of(member) for member in run.profile.members]
        before = ids(Run(path))
        assert ids(Run(path)) == before
        (project / "edited.py").write_text(EDITED.format(goal=3))
        os.utime(project / "edited.py", ns=(10**18, 10**18))
        with pytest.raises(CodeError, match="edited.py .* has changed since it was loaded"):
            ids(Run(path))
        importlib.reload(module)
        assert not {*ids(Run(path))} & {*before}
    finally:
        del SELECTIONS["Edited"]
