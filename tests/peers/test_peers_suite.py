"""Reconstruction, absorption and result files against SAEBench 0.6.0's own functions and schemas, on the same arrays
and SAEs.

The peers live in an environment of their own: `make test-peers`. Elsewhere these tests are skipped.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

sae_bench = pytest.importorskip("sae_bench")

from peers import spelling_model
from random_saes import ALL_RULES, random_sae

from masksae import ReLU, Run
from masksae.export import saebench_adapter
from masksae.files import read_json
from masksae.metrics import absorption, probes
from masksae.metrics.reconstruction import reconstruction
from masksae.study.report import saebench

D, F = 24, 96
ROOT = Path(__file__).resolve().parents[2]
RULES = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: type(r).__name__)


def adapted(rule):
    sae = random_sae(rule, dtype=torch.float32).requires_grad_(False)
    if type(rule) is ReLU:  # the one whose decoder rows are not of norm 1; SAEBench takes such SAEs normalised only
        sae.normalise_()
    return sae, saebench_adapter(sae, model_name="pythia-160m-deduped", layer=8)


def their_core(adapter, x):
    """Their statistics of activations x [b, s, d], all in one batch: a model and a store that hand over what is
    there."""
    from sae_bench.evals.core.main import get_sparsity_and_variance_metrics

    model = SimpleNamespace(run_with_cache=lambda *_, **__: (None, {adapter.cfg.hook_name: x}))
    store = SimpleNamespace(get_batch_tokens=lambda n: torch.ones(x.shape[:2], dtype=torch.int64))
    found = get_sparsity_and_variance_metrics(
        adapter, model, store, n_batches=1,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, eval_batch_size_prompts=len(x), model_kwargs={},
    )  # fmt: skip
    return found[0] | {"density": found[1]["feature_density"]}


@RULES
def test_core_metrics_are_those_of_saebench(rule):
    sae, adapter = adapted(rule)
    x = torch.randn(16, 32, D, generator=torch.Generator().manual_seed(0)) * 2 + 1
    theirs, ours = their_core(adapter, x), reconstruction(sae, x.flatten(0, 1))
    pairs = {
        "explained_variance": ours.ev_saebench, "explained_variance_legacy": ours.ev_per_token, "cossim": ours.cosine,
        "l2_ratio": ours.l2_ratio, "relative_reconstruction_bias": ours.relative_bias, "l0": ours.l0, "l1": ours.l1,
        "mse": ours.mse * D / (16 * 32),
    }  # fmt: skip
    assert {key: theirs[key] for key in pairs} == pytest.approx(pairs, rel=1e-4)
    density = torch.tensor(theirs["density"])
    assert int((density == 0).sum()) == ours.dead_latents and int((density > 0.1).sum()) == ours.dense_latents


@RULES
def test_largest_cosines_are_those_of_saebench(rule):
    from sae_bench.evals.core.main import calculate_max_cosine_sim

    from masksae.metrics.reconstruction import largest_cosines

    sae, _ = adapted(rule)
    torch.testing.assert_close(largest_cosines(sae.W_dec), calculate_max_cosine_sim(sae.W_dec.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(largest_cosines(sae.W_enc.T), calculate_max_cosine_sim(sae.W_enc), rtol=1e-5, atol=1e-6)


def test_where_saebenchs_explained_variance_differs():
    """On purpose: activations far from zero have a mean to subtract, which its `explained_variance` does not find. The
    reconstruction by the mean alone explains nothing of the variance, and nearly everything in its reading."""
    sae, adapter = adapted(ALL_RULES[2])
    x = torch.randn(16, 32, D, generator=torch.Generator().manual_seed(0)) / 10 + 1
    sae.b_dec.copy_(x.mean((0, 1)))
    sae.threshold.fill_(1e9)
    theirs, ours = their_core(adapter, x), reconstruction(sae, x.flatten(0, 1))
    assert abs(ours.ev_centred) < 1e-6 and theirs["explained_variance"] > 0.9
    assert theirs["explained_variance"] == pytest.approx(ours.ev_saebench, rel=1e-4)


def words_of(n=60):
    return [f"{chr(97 + i % 3)}word{i}" for i in range(n)]


@RULES
@pytest.mark.parametrize("main", [[0], [3, 17]], ids=["one", "split"])
def test_absorption_of_every_word_is_that_of_saebench(rule, main):
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    sae, adapter = adapted(rule)
    generator = torch.Generator().manual_seed(1)
    words = words_of()
    direction = torch.randn(D, generator=generator)
    x = torch.randn(len(words), D, generator=generator) + direction / 2
    by_word = dict(zip(words, x))
    theirs = FeatureAbsorptionCalculator(
        model=spelling_model(by_word), icl_word_list=words, max_icl_examples=2, word_token_pos=0, batch_size=20
    )
    found = theirs.calculate_absorption(adapter, words, direction, main, layer=8, show_progress=False).word_results
    f = sae.encode(x)
    full, fraction = absorption.absorbed(x, f, sae.W_dec, direction, main)
    assert [r.is_full_absorption for r in found] == full.tolist()
    torch.testing.assert_close(
        torch.tensor([float(r.absorption_fraction) for r in found]), fraction, rtol=1e-4, atol=1e-5
    )


def test_main_latents_are_those_of_saebench():
    """The same ranking given, their logistic regressions, F1 and rule of splitting choose the same latents."""
    from sae_bench.evals.absorption.k_sparse_probing import add_feature_splits_to_metrics_df
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    generator = torch.Generator().manual_seed(0)
    positive = torch.rand(600, generator=generator) < 0.3
    f = torch.relu(torch.randn(600, 12, generator=generator))
    f[:, 2] += 2 * (positive & (torch.rand(600, generator=generator) < 0.5))
    f[:, 5] += 2 * (positive & (f[:, 2] < 1))
    is_test, ranked = torch.arange(600) >= 400, [2, 5, 1, 0, 3, 4, 6, 7, 8, 9]
    row = {}
    for k in range(1, 11):
        columns = ranked[:k]
        model = LogisticRegression(max_iter=500, class_weight="balanced").fit(
            f[~is_test][:, columns], positive[~is_test]
        )
        row[f"f1_sparse_sae_{k}"] = f1_score(positive[is_test], model.decision_function(f[is_test][:, columns]) > 0)
        row[f"sparse_sae_k_{k}_feats"] = np.array(columns)
    table = pd.DataFrame(
        [{"letter": letter} | row for letter in "abcdefghijklmnopqrstuvwxyz"]
    )  # it asks for all of them
    add_feature_splits_to_metrics_df(table, max_k_value=10, f1_jump_threshold=0.03)
    main = absorption.main_latents(f, positive, ~is_test, is_test, ranked)
    assert len(main.latents) > 1 and list(main.latents) == list(table["split_feats"].iloc[0])
    assert main.f1 == pytest.approx(row[f"f1_sparse_sae_{len(main.latents)}"])


def test_the_letter_probe_agrees_with_saebenchs():
    """Other random order of batches, so not the same bits: the same directions and the same F1."""
    from sae_bench.evals.absorption.probing import train_multi_probe

    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, D, generator=generator)
    words = words_of(6000)
    letters = probes.first_letters(words)
    x = torch.randn(6000, D, generator=generator) + 0.4 * directions[letters]
    ours = probes.letter_probe(x, words)
    y = torch.nn.functional.one_hot(letters, 26)[~ours.is_test]
    with torch.enable_grad():
        theirs = train_multi_probe(
            x[~ours.is_test], y, num_probes=26, batch_size=64, num_epochs=50, lr=0.01, end_lr=1e-5, weight_decay=1e-4,
            show_progress=False, verbose=False, device=torch.device("cpu"),
        )  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(theirs.weights.detach()[:3], ours.weight[:3])
    assert cosine.min() > 0.99
    scores = probes.f1(theirs(x[ours.is_test]).detach() > 0, torch.nn.functional.one_hot(letters, 26)[ours.is_test] > 0)
    torch.testing.assert_close(scores[:3], torch.tensor(ours.f1[:3], dtype=scores.dtype), atol=0.03, rtol=0)


SCHEMAS = {
    "core": "core",
    "absorption_first_letter": "absorption",
    "sparse_probing": "sparse_probing",
    "tpp": "scr_and_tpp",
    "scr": "scr_and_tpp",
}


@pytest.fixture(scope="module")
def laptop():
    """The committed results of the default profile."""
    run = Run("laptop")
    return run, {
        source: read_json(ROOT / f"results/laptop/{source}.json") for source, _ in saebench.EVALUATIONS.values()
    }


@pytest.mark.parametrize("kind", SCHEMAS)
def test_results_validate_against_the_schemas_of_saebench(kind, laptop):
    import jsonschema

    run, rows = laptop
    evals = Path(sae_bench.__file__).parent / "evals"
    schema = json.loads((evals / SCHEMAS[kind] / f"eval_output_schema_{kind}.json").read_text())
    for row in rows[saebench.EVALUATIONS[kind][0]]:
        jsonschema.validate(saebench.result(run, kind, row), schema)
    broken = saebench.result(run, kind, rows[saebench.EVALUATIONS[kind][0]][0])
    broken["eval_result_metrics"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


@pytest.mark.parametrize("kind", [*SCHEMAS, "sparse_probing_sae_probes"])
def test_saebench_reads_our_results(kind, laptop):
    """Its own classes take every key: none is unknown, none is lost."""
    import importlib

    from pydantic import TypeAdapter

    home = importlib.import_module(f"sae_bench.evals.{SCHEMAS.get(kind, kind)}.eval_output")
    kinds = [
        v
        for v in vars(home).values()
        if getattr(v, "__name__", "").endswith("EvalOutput") and v.__name__ != "BaseEvalOutput"
    ]
    output = next(c for c in kinds if len(kinds) == 1 or c.__name__.lower().startswith(kind))
    run, rows = laptop
    ours = saebench.result(run, kind, rows[saebench.EVALUATIONS[kind][0]][0])
    read = json.loads(TypeAdapter(output).validate_python(ours).to_json())
    for category, metrics in ours["eval_result_metrics"].items():
        for key, value in metrics.items():
            assert read["eval_result_metrics"][category][key] == pytest.approx(value), key
    assert set(ours["eval_config"]) <= set(read["eval_config"]) and len(read["eval_result_details"]) == len(
        ours["eval_result_details"]
    )
