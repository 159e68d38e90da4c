"""Labelled texts on a tiny model: the right token, the same rows for all SAEs, means that add up, unusable sets left
out by name."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_project import profile

from masksae import Run
from masksae.data.tasks import Shift, typos
from masksae.errors import ConfigError, DataError
from masksae.study import own_sae
from masksae.study.scores import probing
from masksae.tracing import activations


def table(path, n=200, seed=0, flipped=False):
    """Texts whose last character tells the class."""
    rng = random.Random(seed)
    lines = ["prompt,target"]
    for i in range(n):
        words = " ".join(rng.choices("the one two three sat on mat ran past".split(), k=rng.randint(1, 6)))
        end = "s" if i % 2 else "t"
        lines.append(f"{words} {seed}{i}{end},{(i + flipped) % 2}")
    path.write_text("\n".join(lines))


@pytest.fixture
def run(project):
    table(project / "task.csv")
    table(project / "task_OOD.csv", seed=1)
    return Run(profile(project))


def test_the_activation_is_that_of_the_last_token(run):
    texts = ["the cat sat", "a", "seven dogs ran past it and nobody saw them"]
    x = probing.last_token_activations(run, texts)
    for text, found in zip(texts, x):
        ids = [run.bos_id, *run.language_model.tokenizer(text, add_special_tokens=False)["input_ids"][-8:]]
        alone = activations(run.language_model.model, torch.tensor([ids]), block=1)[0, -1]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="no token"):
        probing.last_token_activations(run, ["fine", ""])


def test_rows_of_both_kinds(run):
    saes = run.saes
    for kind, rows in (("probing", run.scored(probing.probing_scores)), ("ood", run.scored(probing.ood_scores))):
        assert [(row["sae"], row["mode"]) for row in rows] == [
            (name, mode) for name in saes for mode in ("as_trained", "matched")
        ]
        raw = {row[f"{kind}_raw_auc"] for row in rows}
        assert len(raw) == 1 and raw.pop() > 0.9  # the last character tells the class
        for row in rows:
            for k in ("2", "5", *(("2_plain", "5_plain") if kind == "ood" else ())):
                assert row[f"{kind}_auc_{k}"] == row["tasks"][0]["auc"][k]
                assert row[f"{kind}_gap_{k}"] == pytest.approx(row[f"{kind}_raw_auc"] - row[f"{kind}_auc_{k}"])
            assert row["excluded"] == {}


def test_an_sae_in_half_precision(run, tmp_path):
    sae = next(iter(run.saes.values()))
    row = next(row for row in run.scored(probing.probing_scores) if row["mode"] == "as_trained")
    visitor = own_sae.OwnSAE(run.source, sae.bfloat16().to_saelens(tmp_path / "half"), out=tmp_path / "out")
    for kind, rows in own_sae.evaluate(visitor, ["probing", "ood"]).items():
        assert rows[0][f"{kind}_auc_5"] == pytest.approx(row["probing_auc_5"], abs=0.1)


def test_a_shifted_set_that_raw_activations_cannot_tell_is_left_out(run, project):
    table(project / "task_OOD.csv", seed=2, flipped=True)
    run.saes
    with pytest.raises(DataError, match="No task of ood is told from raw activations"):
        run.scored(probing.ood_scores)


def test_training_rows_are_shared_by_a_task_and_its_shift(run, project):
    plain = probing.task_activations(run, str(project / "task.csv"))
    shifted = probing.task_activations(run, str(project / "task.csv"), Shift.parse(str(project / "task_OOD.csv")))
    assert torch.equal(plain["y_train"], shifted["y_train"]) and len(shifted["x_test"]) == 200
    torch.testing.assert_close(
        plain["x_train"], shifted["x_train"], rtol=1e-5, atol=1e-6
    )  # other batches, other rounding
    assert len(plain["x_train"]) == 40 and plain["y_train"].sum() == 20 and plain["y_test"].float().mean() == 0.5


def test_a_task_with_three_classes_is_refused():
    with pytest.raises(DataError, match=r"found 3: \[0, 1, 2\]"):
        probing.labels([0, 1, 2])


def test_each_family_of_shifts_has_its_own_means(run, project):
    table(project / "other.csv", seed=3)
    task = str(project / "task.csv")
    shifted = [
        str(project / "task_OOD.csv"),
        f"{task} -> {project / 'other.csv'}",
        f"{task} -> upper case",
        f"{task} -> typos",
    ]
    run = Run(profile(project, probing={"shifted": shifted}))
    run.saes
    row = run.scored(probing.ood_scores)[0]
    by_family = {}
    for t in row["tasks"]:
        by_family.setdefault(t["family"], []).append(t["auc"]["5"])
    kept = [*(t["task"] for t in row["tasks"]), *row["excluded"]]
    assert sorted(kept) == sorted(shifted) and {"ood", "domain"} <= set(by_family)
    for family, found in by_family.items():
        assert row[f"{family}_auc_5"] == pytest.approx(sum(found) / len(found))


def test_a_domain_is_tested_on_as_many_rows_as_the_task(run, project):
    table(project / "other.csv", seed=3)
    found = probing.task_activations(run, str(project / "task.csv"), Shift("domain", "", str(project / "other.csv")))
    assert len(found["x_test"]) == 40


@given(st.text())
def test_typos_keep_letters_and_are_the_same_each_time(text):
    assert sorted(typos(text)) == sorted(text) and typos(text) == typos(text)


def test_forms_of_shifts():
    assert Shift.parse("5_a_OOD") == Shift("ood", "5_a", table="5_a_OOD")
    assert Shift.parse("a -> b") == Shift("domain", "a", table="b")
    assert Shift.parse("a -> upper case").change("x") == "X"
    with pytest.raises(ConfigError, match="names no training task"):
        Shift.parse("5_a")


def test_all_tasks_but_those_with_too_few_rows(run, project, monkeypatch):
    table(project / "small.csv", n=20)
    names = [str(project / "task.csv"), str(project / "small.csv")]
    monkeypatch.setattr(probing, "binary_tasks", lambda: names)
    run = Run(profile(project, probing={"tasks": ["all"]}))
    run.saes
    row = run.scored(probing.probing_scores)[0]
    assert [t["task"] for t in row["tasks"]] == names[:1]
    assert "10 distinct prompts, 20 are wanted" in row["excluded"][names[1]]
    run = Run(profile(project, probing={"tasks": names}))
    run.saes
    with pytest.raises(DataError, match="small.csv: The rarer class has 10"):
        run.scored(probing.probing_scores)
