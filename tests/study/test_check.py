"""Which results are those of this profile and this code, told by id and without any work."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_project import profile

from masksae import Run, provenance
from masksae.app import cli
from masksae.errors import DataError
from masksae.files import read_json
from masksae.study import check, work
from masksae.study.scores.reconstruction import reconstruction_scores
from masksae.study.store import Made, Notes


def states(run) -> dict[tuple[str, str], str]:
    return {(row["part"], row["score"]): row["state"] for row in check.check(run)}


@pytest.mark.parametrize("keep_pairs", [False, True])
def test_what_is_there_is_current_until_profile_or_code_change(new_project, monkeypatch, keep_pairs):
    run = Run(profile(new_project, keep_pairs=keep_pairs))
    with pytest.raises(DataError, match="There are no results of tiny"):
        check.check(run)
    run.scored(work.training_scores), run.scored(reconstruction_scores)
    run.save_result("claims", {})
    monkeypatch.setattr("masksae.study.store.Subject._scored", lambda *_: pytest.fail("something was computed"))
    found = states(run)
    assert found["main-s0", "train"] == found["main-s1", "reconstruction"] == "as it is now"
    assert found["main-s0", "absorption"] == "missing"
    batch = {"training": run.profile.training.model_dump() | {"batch_size": 128}}
    other = states(Run(profile(new_project, keep_pairs=keep_pairs, **batch)))
    assert other["main-s0", "train"] == other["main-s0", "reconstruction"] == "another profile"
    monkeypatch.setattr(provenance, "_hash", lambda _: "edited")
    found = states(Run(profile(new_project, keep_pairs=keep_pairs)))
    assert found["main-s0", "train"] == "other code" and found["main-s0", "absorption"] == "missing"


def test_the_command_says_how_many_and_exits_with_1_if_some_are_not(new_project, capsys):
    path = profile(new_project)
    run = Run(path)
    run.scored(work.training_scores)
    run.save_result("claims", {})
    assert cli.main(["check", str(path)]) == 1
    text = capsys.readouterr().out
    assert "as it is now" in text and "missing" in text and "train" in text
    assert cli.main(["check", str(path), "--json"]) == 1
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} == {"as it is now", "missing"}


def test_each_score_of_each_sae_is_told_once(project):
    run = Run(profile(project))
    run.save_result("claims", {})
    told = [(row["score"], row["sae"]) for row in check.check(run)]
    assert len(told) == len({*told}) and ("absorption", "unmasked-plain-s0-permuted") in told


def made(code: str) -> Made:
    return Made(["recipe"], {"modules": {"a": code}, "versions": {}})


def test_two_that_note_at_the_same_time_lose_nothing(new_project):
    file = new_project / "results/tiny/pairs/main-s0.json"

    def add(n: int) -> None:
        Notes(file, keeps_rows=True).add(f"score {n}", {"sae": made(str(n))}, {"sae": [{"n": n}]})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    known = read_json(file)
    assert len(known["scores"]) == len(known["made_by"]) == 16 and [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("older", [{"train": {"main-s0": {"recipe": "1", "code": "2"}}}, []])
def test_notes_of_another_form_begin_anew_and_rows_of_one_are_left_alone(new_project, older):
    path = new_project / "results/tiny/made_of.json"
    run = Run(profile(new_project))
    run.save_result("claims", {}), run.save_result("made_of", older)
    rows = check.check(run)
    assert {row["state"] for row in rows} == {"missing"} and "Nothing" in check.since(rows)[0]
    Notes(path, keeps_rows=False).add("train", {"sae": made("a")}, {})
    assert read_json(path)["scores"].keys() == {"train"}
    run.save_result("made_of", older)
    with pytest.raises(DataError, match="made_of.json holds .*expected scores and made_by.*Move it away"):
        Notes(path, keeps_rows=True).add("train", {"sae": made("a")}, {"sae": []})
    assert read_json(path) == older


def test_commits_that_made_what_has_changed_alike_share_a_line():
    rows = [{"state": "other code", "commit": commit, "changed": changed} for commit, changed in
            (("a1", ["masking"]), ("b2", []), ("c3", ["masking"]), (None, []))]  # fmt: skip
    assert check.since(rows) == [
        "Since commit a1, c3: masking.",
        "Since commit b2, (not noted): not noted which modules.",
    ]
