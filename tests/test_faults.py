"""The disk full and Ctrl-C at the writes of a small run, and two runs at once: what was finished is kept, and the end is the same bytes.

With MASKSAE_FUZZ set at every single write, which takes minutes; docs/faults.md tells of that."""

import errno
import multiprocessing
import os
import random

import pytest
import yaml
from conftest import byte_tokenizer, tiny_model

from masksae import Run, files, scores
from masksae.errors import OutputError

WORDS = "the cat sat on a mat while seven dogs ran past it and nobody saw them".split()


def whole_run(_=None) -> dict:
    """Text, training with snapshots and checkpoints, scores: everything that the run leaves, by what it is."""
    run = Run("mine.yaml")
    run.saes
    rows = scores.reconstruction_scores(run)
    run.save_result("reconstruction", rows)
    weights = {path.parent.name: path.read_bytes() for path in run.build.rglob("sae.safetensors")}
    return {"rows": rows, "result": run.result("reconstruction"), **weights}


def make_project(root) -> None:
    root.mkdir()
    draw = random.Random(0)
    (root / "text.jsonl").write_text(
        "".join(f'{{"text": "{" ".join(draw.choices(WORDS, k=60))}"}}\n' for _ in range(100))
    )
    tiny_model("llama").save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    profile = {
        "name": "mine",
        "model": {"source": "model", "block": 1, "mask_token": "<mask>", "bos_token": "<bos>"},
        "text": {"sources": ["text.jsonl"], "block_length": 32, "train_tokens": 3200, "held_out_tokens": 320},
        "training": {"batch_size": 64, "snapshots": [20], "epochs": 2, "pool_tokens": 1600},
        "saes": [{"name": "b4", "selection": {"rule": "batch_topk", "k": 4}, "n_latents": 64, "seeds": [0]}],
        "evaluation": {"ce_tokens": 320},
        "contexts": {"tokens": 320},
    }
    (root / "mine.yaml").write_text(yaml.safe_dump(profile))


@pytest.fixture
def new_project(tmp_path, monkeypatch):
    """Make a project in a folder of its own, with its own cache, and go there."""
    monkeypatch.setenv("MASKSAE_PROGRESS", "none")

    def make(name: str):
        make_project(tmp_path / name)
        monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / name / "cache"))
        monkeypatch.chdir(tmp_path / name)

    return make


def broken_at(number: int, error, monkeypatch) -> list:
    """Raise `error` at the write of this number; gives the list of the writes so far."""
    seen, sync = [], files._sync

    def fault(path):
        seen.append(path)
        if len(seen) == number:
            raise error
        sync(path)

    monkeypatch.setattr(files, "_sync", fault)
    return seen


@pytest.mark.parametrize("fault", ["disk full", "interrupt"])
def test_a_fault_at_every_write(fault, new_project, monkeypatch, tmp_path):
    new_project("whole")
    with monkeypatch.context() as patch:
        seen = broken_at(-1, None, patch)
        whole = whole_run()
        writes = len(seen)
    assert writes > 20 and len(whole) == 4
    step = 1 if os.environ.get("MASKSAE_FUZZ") else 16 if fault == "disk full" else 30
    for number in range(1, writes + 1, step):
        new_project(f"broken-{number}")
        error = OSError(errno.ENOSPC, "No space left on device") if fault == "disk full" else KeyboardInterrupt()
        with monkeypatch.context() as patch:
            broken_at(number, error, patch)
            with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
                whole_run()
        if fault == "disk full":
            assert "the disk is full" in str(caught.value) and "What was finished before is kept" in str(caught.value)
        assert whole_run() == whole, f"after a fault at write {number}"
        left = [path for path in (tmp_path / f"broken-{number}").rglob(".tmp-*")]
        assert left == []


def test_two_runs_of_one_profile_at_once(new_project):
    """They share cache and project: the second waits for the first where it must, and finds its work done."""
    new_project("whole")
    whole = whole_run()
    new_project("shared")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(whole_run, [0, 1])
    assert first == second == whole


def test_a_home_that_cannot_be_written(new_project, monkeypatch, tmp_path, as_nobody):
    new_project("mine")
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o555)
    for folder in (tmp_path, tmp_path / "mine", tmp_path / "mine/model"):
        folder.chmod(0o777)

    def run():
        os.environ["HOME"] = str(home)
        os.environ.pop("MASKSAE_CACHE", None)
        os.environ.pop("XDG_CACHE_HOME", None)
        whole_run()

    kind, message = as_nobody(run)
    assert kind == "OutputError" and str(home) in message and "permission denied" in message
