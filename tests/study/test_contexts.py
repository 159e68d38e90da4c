"""Rows of the two sets of cross-token parents: one decides, the other is shown, and neither is mixed with the other."""

from types import SimpleNamespace

import pytest
import torch

from masksae import SAE, SAEConfig, TopK
from masksae.metrics.contexts import ALL, EXPLORATORY, PARENTS, context_absorption, context_probes
from masksae.study.scores import absorption


@pytest.fixture
def scored(monkeypatch):
    """columns of ALL that hold somewhere -> the row of an SAE with random weights, the SAE, and what it was scored
    on."""
    generator = torch.Generator().manual_seed(0)
    x, sae = torch.randn(900, 12, generator=generator), SAE(SAEConfig(12, 24, TopK(4))).requires_grad_(False)
    task = SimpleNamespace(min_parents=1, seed=0)
    run = SimpleNamespace(profile=SimpleNamespace(contexts=task), shared=lambda name, make: make())
    run.rows = lambda kind, section, make: make(run)

    def rows(columns):
        labels = torch.zeros(len(x), len(ALL), dtype=torch.bool)
        labels[:, columns] = x[:, : len(columns)] > 0.5
        probes = context_probes(x, labels, torch.arange(len(x)) // 30, positives=300)
        monkeypatch.setattr(absorption, "context_probes", lambda run: (x, probes, torch.ones(len(x), dtype=torch.bool)))
        monkeypatch.setattr(absorption, "score_saes", lambda run, label, score: score(sae, None))
        return absorption.context_scores(run), sae, x, probes

    return rows


def test_the_mean_that_decides_is_of_the_new_set_alone(scored):
    row, sae, x, probes = scored([ALL.index(name) for name in (ALL[0], ALL[3], "the", "of")])
    assert [parent["letter"] for parent in row["parents"]] == [ALL[0], ALL[3]]
    assert [parent["letter"] for parent in row["exploratory_parents"]] == ["the", "of"]
    assert row["context_full"] == context_absorption(sae, x, probes, min_parents=1).mean_full
    assert row["exploratory_full"] == context_absorption(sae, x, probes, among=EXPLORATORY, min_parents=1).mean_full
    assert row["context_full"] != row["exploratory_full"]
    assert set(row["excluded"]) == set(PARENTS) - {ALL[0], ALL[3]}


def test_a_text_without_exploratory_parents_is_scored_all_the_same(scored):
    row, *_ = scored([0, 3])
    assert row["exploratory_full"] is None and row["exploratory_parents"] == [] and len(row["parents"]) == 2
