"""Streaming through the real clients of the hub from a fake one that fails: no token is lost or repeated, and a shard
in trouble is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ["502", "time-out", "cut", "short", "garbage"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each scenario of `fake_hub.main` ended with: a hash of the tokens, or an error."""
    command = [sys.executable, ROOT / "tests/support/fake_hub.py", tmp_path_factory.mktemp("hub")]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {item["name"]: item for item in found}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_lose_and_repeat_nothing(outcomes, fault):
    whole = outcomes["undisturbed"]
    assert len(whole["outcome"]) == 64
    assert outcomes[fault]["outcome"] == whole["outcome"]
    assert outcomes[fault]["requests"] > whole["requests"]  # the fault was met


def test_a_shard_that_stays_cut_short_ends_the_run_with_its_name(outcomes):
    message = outcomes["truncated"]["outcome"]
    assert (
        "train/01.jsonl.zst, row 0 cannot be read after 5 attempts" in message
        and "kept; the next run goes on" in message
    )


def test_the_next_run_goes_on_after_the_last_part(outcomes):
    assert outcomes["mended"]["outcome"] == outcomes["undisturbed"]["outcome"]
    assert outcomes["truncated"]["parts"] > 3


def test_a_shard_that_is_gone_is_named_at_once(outcomes):
    assert "train/00.jsonl.zst, row 0 is missing or out of reach" in outcomes["gone"]["outcome"]
    assert outcomes["gone"]["requests"] == 1


def test_shards_that_are_missing_or_changed_between_runs_are_named(outcomes):
    assert "shards 1 missing: " in outcomes["missing"]["outcome"] and "01.jsonl.zst" in outcomes["missing"]["outcome"]
    assert "shards 1 changed: " in outcomes["changed"]["outcome"] and "01.jsonl.zst" in outcomes["changed"]["outcome"]


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_a_machine_that_is_offline_on_purpose_is_told_at_once(variable):
    code = (
        "from masksae.data import hub\nhub.time.sleep = None\n"
        "for look in (lambda: hub.shards('owner/name'), lambda: hub.unchanged([dict(url='hf://datasets/owner/name/a', "
        "form='json', size=1, version='')])):\n"
        "    try: look()\n    except hub.SourceError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {variable: "1"}
    )
    told = result.stdout.splitlines()
    assert len(told) == 2 and all("HF_HUB_OFFLINE" in line and "Unset it" in line for line in told), result
    assert "owner/name" in told[0] and result.stderr == ""
