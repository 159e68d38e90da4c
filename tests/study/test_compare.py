"""Two runs of a profile beside each other: what has come again, what has not, and where the committed one is found."""

import json
import subprocess

import pytest

from masksae.app import cli
from masksae.errors import DataError, SourceError
from masksae.files import write_json
from masksae.study import compare
from masksae.study.report.card import again


def claims(letters=-0.1, probing=0.2, verdict="supported", gap=None):
    def record(endpoint, difference, **more):
        low, high = (None, None) if difference is None else (difference - 0.05, difference + 0.05)
        return {"endpoint": endpoint, "difference": difference, "low": low, "high": high, "verdict": verdict} | more

    contexts = {"contexts": record("contexts", letters / 2)}
    return {
        "C1": record("letters", letters, endpoints=contexts),
        "C2": record("probing", probing),
        "C3": record("gap", gap),
        "C5": {"verdict": "not measured"},
        "R": {"verdict": "not measured"},
    } | {"C4": {"verdict": "inconclusive", "cells": {"topk10": {"letters": record("letters", letters)}}}}


def test_each_endpoint_that_both_measured_is_compared():
    rows = compare.compared(claims(), claims(letters=-0.13, probing=0.26, gap=0.1))
    assert [(row["claim"], row["endpoint"], row["same"]) for row in rows] == [
        ("C1", "letters", True), ("C1", "contexts", True), ("C2", "probing", False), ("C4", "letters, topk10", True),
    ]  # fmt: skip
    assert (rows[2]["there"], rows[2]["low"], rows[2]["here"]) == (0.2, pytest.approx(0.15), 0.26)


def test_another_verdict_is_not_the_same_however_near_the_effect():
    rows = compare.compared(claims(), claims(verdict="inconclusive"))
    assert not any(row["same"] for row in rows)
    assert compare.table(rows)[1][-2:] == ["supported → inconclusive", "no"]


def test_an_effect_of_one_pair_which_has_no_interval_is_the_same_if_it_is_equal(project, capsys):
    point = claims()
    point["C2"] |= {"low": None, "high": None}
    rows = compare.compared(point, claims(probing=0.21))
    assert [row["same"] for row in rows] == [True, True, False, True]
    assert all(row["same"] for row in compare.compared(point, point))
    write_json(project / "other/results/laptop/claims.json", point)
    write_json(project / "results/laptop/claims.json", point)
    assert cli.main(["compare", "laptop", "--with", "other/results/laptop", "--save", "one pair"]) == 0
    assert "unknown" in capsys.readouterr().out and "| one pair" in again(project / "results/laptop")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository whose last commit has the claims of laptop, and another run's folder."""
    (tmp_path / "dvc.yaml").touch()
    write_json(tmp_path / "results/laptop/claims.json", claims())
    monkeypatch.chdir(tmp_path)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], check=True)
    write_json(tmp_path / "other/results/laptop/claims.json", claims(letters=-0.2))
    machine = {"cores": 2, "vectors": "AVX2", "gflops": 100}
    write_json(tmp_path / "other/build/laptop/times.json", {"machine": machine, "stages": {}})
    return tmp_path


def test_the_command_compares_with_the_last_commit(project, capsys):
    assert cli.main(["compare", "laptop", "--json"]) == 0
    write_json(project / "results/laptop/claims.json", claims(verdict="contradicted"))
    assert cli.main(["compare", "laptop"]) == 1
    out = capsys.readouterr().out
    assert [row["same"] for row in json.loads(out[: out.index("]") + 1])] == [True] * 4
    assert "supported → contradicted" in out


def test_the_command_compares_with_another_run_and_keeps_what_it_found(project, capsys):
    assert cli.main(["compare", "laptop", "--with", "other/results/laptop", "--save", "an old laptop"]) == 1
    assert "an old laptop" in (page := again(project / "results/laptop"))
    assert "| an old laptop (2 cores, AVX2, 100 GFLOP/s) | 4 | 4 | 2 | 0.1000 (letters) |" in page
    assert cli.main(["compare", "laptop", "--with", "results/laptop", "--save", "an old laptop"]) == 0
    assert "| 4 | 4 | 4 | 0.0000" in again(project / "results/laptop")  # in the place of the first


def test_what_is_not_there_is_named(project):
    write_json(project / "foreign/claims.json", [])
    for folder in ("nowhere", "foreign"):
        with pytest.raises(DataError, match=f"{folder} holds no claims.json.*results/PROFILE"):
            compare.claims_of(project / folder)
    with pytest.raises(DataError, match="no effect in common.*--with"):
        compare.compared(claims(), {"C4": {"verdict": "not measured", "cells": {}}})
    with pytest.raises(SourceError, match="The last commit has no results/gemma/claims.json.*--with"):
        compare.committed(project, "gemma")
