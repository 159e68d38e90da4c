"""Which results are those of this profile and this code, told by id and without any work."""

import json

import pytest
from tiny_project import profile

from masksae import Run, provenance
from masksae.app import cli
from masksae.errors import DataError
from masksae.study import check, work
from masksae.study.scores.reconstruction import reconstruction_scores


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
