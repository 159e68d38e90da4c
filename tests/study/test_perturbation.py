"""Texts averaged over tokens on a tiny model: no padding in any mean, classes apart, balanced quadrants, unusable ones
named."""

import os
import random
import subprocess
import sys

import pytest
import torch
from tiny_project import profile

from masksae import Run
from masksae.errors import DataError
from masksae.files import cache_dir, read_json
from masksae.study import own_sae
from masksae.study.report import saebench
from masksae.study.scores import absorption, perturbation, probing, reconstruction
from masksae.tracing import activations

WITH_SUPPORT = os.environ | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
WORDS = "the one two three sat on mat ran past".split()


def write(path, rows):
    path.write_text("\n".join(["prompt,target", *(f"{prompt},{target}" for prompt, target in rows)]))


def sentences(n, seed, mark=""):
    rng = random.Random(seed)
    return [f"{mark}{seed}{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for i in range(n)]


@pytest.fixture
def run(project):
    """Three classes that differ in a mark, and two attributes of common texts that differ in two marks."""
    classes = {
        name: sentences(80, i, 8 * mark)
        for i, (name, mark) in enumerate({"first": "q", "second": "z", "third": "k"}.items())
    }
    for name in classes:
        write(project / f"{name}.csv", [(t, int(other == name)) for other, texts in classes.items() for t in texts])
    marked = [
        (f"{'qqq' if a else 'zzz'} {'xxx' if b else 'www'} {t}", a, b)
        for a in (0, 1)
        for b in (0, 1)
        for t in sentences(45, 3)
    ]
    write(project / "wanted.csv", [(t, a) for t, a, _ in marked])
    write(project / "other.csv", [(t, b) for t, _, b in marked])
    groups = {"marks": [str(project / f"{name}.csv") for name in classes]}
    pairs = [[str(project / "wanted.csv"), str(project / "other.csv")]]
    return Run(profile(project, perturbation={"groups": groups, "pairs": pairs}))


TEXTS = ["the cat sat", "a", "seven dogs ran past it and nobody saw them ever again", *sentences(150, 7)]


def test_a_mean_is_over_the_texts_own_tokens(run):
    pool = perturbation.TextPool(run, TEXTS, "texts")
    for text, found in zip(TEXTS[:9], pool.means([lambda x: x])[0]):
        ids = [run.bos_id, *run.language_model.tokenizer(text, add_special_tokens=False)["input_ids"][:16]]
        alone = activations(run.language_model.model, torch.tensor([ids]), block=1)[0, 1:].mean(0)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def test_averages_are_those_of_all_tokens_at_once(run, monkeypatch):
    """Out of the model, where nothing is kept, bit for bit as out of scratch; and, to float rounding, what encoding
    one matrix of all tokens in the order of the texts gives."""
    saes = [(sae, threshold) for sae in run.saes.values() for threshold in (None, 0.3)]
    encoders = [lambda x: x, *(perturbation.encoder(*each) for each in saes)]
    pool, found = perturbation.TextPool(run, TEXTS, "texts"), []
    for kept in (perturbation.KEPT, 0):
        monkeypatch.setattr(perturbation, "KEPT", kept)
        found.append(pool.means(encoders))
        assert len([*cache_dir("pools").glob("*/tensors.safetensors")]) == 1
    assert all(torch.equal(first, second) for first, second in zip(*found))
    parts = dict(pool.tokens())
    x, lengths = torch.cat([parts[i] for i in range(len(TEXTS))]), [len(parts[i]) for i in range(len(TEXTS))]
    for encode, means in zip(encoders, found[0]):
        expected = torch.segment_reduce(encode(x), "mean", lengths=torch.tensor(lengths))
        torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-6)


PEAK = """
import sys
from types import SimpleNamespace as Some
import torch
from tiny_project import byte_tokenizer, tiny_model
from masksae import SAE, SAEConfig, TopK
from masksae.study.scores import perturbation
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
perturbation.KEPT = 0
model, options = tiny_model("llama", layers=1, width=256), Some(max_tokens=64)
profile = Some(perturbation=options, model=Some(block=0))
run = Some(profile=profile, start=[0], width=256, language_model=Some(model=model, tokenizer=byte_tokenizer()))
sae = SAE(SAEConfig(256, 64, TopK(2)))
for n in (512, 2560):
    before = status("VmHWM")
    perturbation.TextPool(run, ["x" * 64] * n, "texts").means([perturbation.encoder(sae, None)])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_never_a_whole_pool_in_memory():
    """2,560 texts of 64 tokens are 168 MB, a batch of them is 4 MB; a fifth of them first, then all. What
    is left are holes in the heap."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=WITH_SUPPORT)
    assert int(done.stdout) < 100e6


def test_one_against_rest_is_balanced_and_keeps_the_sides_apart():
    values = torch.arange(3 * 10).view(30, 1)  # class c: 10 c to 10 c + 9; the first 6 of each are for training
    train, y = perturbation.one_against_rest(values, 1, 3, slice(6))
    assert train.flatten().tolist() == [10, 11, 12, 13, 14, 15, 0, 1, 2, 20, 21, 22] and int(y.sum()) == 6 == int(
        (~y).sum()
    )
    test, _ = perturbation.one_against_rest(values, 1, 3, slice(6, None))
    assert test.flatten().tolist() == [16, 17, 18, 19, 6, 7, 26, 27]


def test_an_sae_in_half_precision(run, tmp_path):
    sae = next(iter(run.saes.values()))
    [row, *_] = run.scored(perturbation.concept_scores)
    visitor = own_sae.OwnSAE(run.source, sae.bfloat16().to_saelens(tmp_path / "half"), out=tmp_path / "out")
    [found, _] = own_sae.evaluate(visitor, ["perturbation"])["perturbation"]
    assert found.keys() == row.keys()
    assert found["pooled_accuracy_5"] == pytest.approx(row["pooled_accuracy_5"], abs=0.1)


def test_rows(run):
    saes = run.saes
    rows = run.scored(perturbation.concept_scores)
    assert [(r["sae"], r["mode"]) for r in rows] == [(name, m) for name in saes for m in ("as_trained", "matched")]
    for row in rows:
        (group,), (pair,) = row["groups"], row["pairs"]
        assert row["tpp_2"] == group["total"]["2"] == pytest.approx(group["intended"]["2"] - group["unintended"]["2"])
        assert 0.5 < row["pooled_accuracy_all"] <= 1 and row["pooled_raw_all"] > 0.9
        assert set(pair["room"]) == {"together", "apart"}
        assert (pair["scr"] is None) == (max(pair["room"].values()) < perturbation.ROOM) == ("scr_2" not in row)
    assert any(row["tpp_8"] > 0.01 for row in rows)


def test_every_score_of_every_sae_becomes_a_saebench_file(run, project, monkeypatch):
    names = [project / f"{name}.csv" for name in ("task", "task_OOD")]
    for i, path in enumerate(names):
        write(path, [(f"{t} {'st'[j % 2]}", j % 2) for j, t in enumerate(sentences(160, 20 + i))])
    monkeypatch.setattr("masksae.metrics.absorption.PROBE_GATE", -1.0)  # a random model does not spell
    saes, results = (
        run.saes,
        {"reconstruction": reconstruction.reconstruction_scores, "probing": probing.probing_scores},
    )
    words, x = (
        [chr(97 + i % 26) + chr(97 + i // 26) + "word" for i in range(520)],
        torch.randn(520, 16, generator=torch.Generator().manual_seed(0)),
    )
    monkeypatch.setattr(absorption, "word_activations", lambda run, draw=0: (words, x))
    monkeypatch.setattr(absorption, "counted_words", lambda run: torch.ones(520, dtype=torch.bool))
    results |= {
        "absorption": absorption.absorption_scores,
        "ood": probing.ood_scores,
        "perturbation": perturbation.concept_scores,
    }
    for name, score in results.items():
        run.save_result(name, run.scored(score))
    folder = saebench.write_results(run)
    files = sorted(folder.rglob("*.json"))
    assert len(files) == len(saes) * 2 * len(saebench.EVALUATIONS)
    before = {file: file.read_bytes() for file in files}
    saebench.write_results(run)
    assert {file: file.read_bytes() for file in files} == before
    row = run.result("reconstruction")[0]
    found = read_json(folder / "core" / f"{row['sae']}-{row['mode']}_custom_sae_eval_results.json")
    assert found["eval_result_metrics"]["sparsity"]["l0"] == row["l0"] and found["eval_result_unstructured"] == row


def test_quadrants_are_balanced_and_probes_know_their_side(run):
    pair = perturbation.pair(run, *run.profile.perturbation.pairs[0])
    for a in (False, True):
        for b in (False, True):
            mine = (pair.y == torch.tensor([a, b])).all(1)
            assert int(mine.sum()) == 45 and int((mine & pair.is_test).sum()) == 15
    for attribute, oracle in enumerate(pair.oracles):
        right = (pair.x @ oracle.weight + oracle.bias > 0) == pair.y[:, attribute]
        assert right[pair.is_test].double().mean() > 0.9


def test_what_cannot_be_used_is_named(run, project):
    with pytest.raises(DataError, match="has 80 texts of its own, 90 are wanted"):
        perturbation.class_group(
            Run(profile(project, perturbation=run.profile.perturbation.model_dump() | {"train": 70})), "marks"
        )
    write(project / "other.csv", [(f"{t}!", i % 2) for i, t in enumerate(sentences(40, 9))])
    with pytest.raises(DataError, match="share texts"):
        perturbation.pair(run, *run.profile.perturbation.pairs[0])
    write(project / "both.csv", [("a b", 0), ("a b", 1), ("c", 1), ("d", 0)])
    assert perturbation.distinct_texts(str(project / "both.csv")) == {"c": True, "d": False}
