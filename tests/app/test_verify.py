"""Reference checks: SAEs in the released form are found, scored and judged; what cannot be checked says so."""

import pytest
import torch
from tiny_project import profile

from masksae import Run
from masksae.app import cli, verify
from masksae.errors import SourceError


@pytest.fixture
def run(project, monkeypatch):
    """A trained tiny run that stands for a model with a published suite, its own unmasked SAEs released."""
    run = Run(profile(project, absorption={"min_word_letters": 1, "min_letters": 1}))
    for k, sae in ((3, run.saes["unmasked-plain-s0"]), (4, run.saes["unmasked-matryoshka-s0"])):
        sae.to_dictionary_learning(project / f"suite/Matryoshka/resid_post_layer_1/trainer_{k}")
    suite = verify.Suite(
        "someone/suite", "Matryoshka", {3: (0.9, 3.0, None), 4: (0.9, 4.0, None)}, {"a_OOD": 0.9, "b_OOD": 0.7}
    )
    monkeypatch.setitem(verify.SUITES, run.profile.model.source, suite)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(project / "suite"))
    return run


def test_the_released_saes_are_found_by_their_k(run):
    suite = verify.SUITES[run.profile.model.source]
    folders = verify._download(suite, 1)
    assert sorted(folders) == [3, 4] and all((folder / "ae.pt").exists() for folder in folders.values())
    assert verify._download(suite, 2) == {}


def test_released_saes_are_scored_on_the_reference_text(run, project, monkeypatch):
    from types import SimpleNamespace

    from masksae.metrics import absorption, probes
    from masksae.study.scores import absorption as scores

    monkeypatch.setattr(verify, "TEXT", str(project / "text.jsonl"))
    monkeypatch.setattr(verify, "TOKENS", 640)
    monkeypatch.setattr(
        verify, "ce_score", lambda original, zero, sae: sae / original
    )  # a random model knows nothing to lose
    monkeypatch.setattr(scores, "word_activations", lambda run: (["a", "b"], torch.zeros(2, 16)))
    monkeypatch.setattr(probes, "letter_probe", lambda *_, **__: None)
    monkeypatch.setattr(absorption, "first_letter", lambda *_, **__: SimpleNamespace(mean_full=0.25))
    found = verify.score_released(run, verify.SUITES[run.profile.model.source])
    assert sorted(found) == [3, 4] and all(row["full absorption"] == 0.25 for row in found.values())
    for k, row in found.items():
        assert row["L0"] == pytest.approx(k, rel=0.5) and 0.9 < row["CE score"] < 1.2


def test_verdicts_and_reasons(run, monkeypatch):
    monkeypatch.setattr(verify, "score_released", lambda *_: {3: {"CE score": 0.902, "L0": 3.2}})
    run.save_result("ood", [{"tasks": [{"task": "a_OOD", "raw_auc": 0.91}]}])
    rows = [
        {"p": 0.0, "k": 3, "architecture": "Matryoshka BatchTopK", "mode": "as_trained", "ce_score": v}
        for v in (0.89, 0.92)
    ]
    run.save_result(
        "reconstruction", rows + [rows[0] | {"mode": "matched", "ce_score": 0.1}, rows[0] | {"p": 0.3, "ce_score": 0.1}]
    )
    checks = {check.name: check for check in verify.verify(run)}
    verdicts = {name: check.verdict for name, check in checks.items()}
    assert verdicts == {
        "released SAE, k 3: CE score": "agrees", "released SAE, k 3: L0": "differs",
        "released SAE, k 4: CE score": "not checked", "released SAE, k 4: L0": "not checked",
        "own SAE, k 3: ce_score": "agrees", "own SAE, k 4: ce_score": "not checked",
        "raw AUC, a_OOD": "agrees", "raw AUC, b_OOD": "not checked", "raw AUC, mean of 2": "not checked",
    }  # fmt: skip
    assert checks["own SAE, k 3: ce_score"].found == pytest.approx(0.905)
    told = verify.text(list(checks.values()), "tiny")
    assert "3 agree, 1 differ, 5 could not be checked." in told and "Not checked: the repository lacks it" in told


def test_without_network_or_results_everything_is_named(run, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(SourceError, match="someone/suite is out of reach"):
        verify._download(verify.SUITES[run.profile.model.source], 1)
    assert cli.main(["verify", run.source]) == 0
    told = capsys.readouterr().out
    assert "0 agree, 0 differ, 9 could not be checked." in told and "out of reach (no route)" in told
    assert "ood.json is missing" in told


def test_a_difference_is_an_exit_status(run, monkeypatch):
    monkeypatch.setattr(verify, "score_released", lambda *_: {3: {"CE score": 0.5}})
    assert cli.main(["verify", run.source]) == 1


def test_models_without_published_numbers(project, capsys):
    assert cli.main(["verify", str(profile(project))]) == 0
    assert "Nothing was published about the model of tiny" in capsys.readouterr().out
