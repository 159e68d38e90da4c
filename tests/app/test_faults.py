"""The disk full and Ctrl-C at the writes of a small run, and two runs at once: what was finished is kept, and the end
is the same bytes.

With MASKSAE_FUZZ set at every single write, and Ctrl-C at more moments and in every stage of the pipeline, which takes
most of an hour; docs/faults.md tells of that."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from fault_table import survived
from tiny_project import byte_tokenizer, tiny_model

from masksae import Run, files
from masksae.errors import OutputError
from masksae.files import cache_dir
from masksae.study.scores import reconstruction

ROOT = Path(__file__).resolve().parents[2]
FUZZ = bool(os.environ.get("MASKSAE_FUZZ"))

WORDS = "the cat sat on a mat while seven dogs ran past it and nobody saw them".split()


def whole_run(_=None) -> dict:
    """Text, training with snapshots and checkpoints, scores: everything that the run leaves, by what it is."""
    run = Run("mine.yaml")
    run.saes
    rows = run.scored(reconstruction.reconstruction_scores)
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
        "saes": [{"name": "b4", "selection": {"rule": "batch_topk", "k": 4}, "n_latents": 64}],
        "blocks": [{"pairs": [0]}],
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
    step = 1 if FUZZ else 40 if fault == "disk full" else 60
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
    words = "the disk full" if fault == "disk full" else "KeyboardInterrupt"
    what = f"{words} at each write of a small run (text, training, snapshots, checkpoints, scores)"
    survived("write", what, len(range(1, writes + 1, step)), "said in a line; the next run ended in the same bytes")


@pytest.mark.slow
def test_two_runs_of_one_profile_at_once(new_project):
    """They share cache and project: the second waits for the first where it must, and finds its work done."""
    new_project("whole")
    whole = whole_run()
    new_project("shared")
    threads = (torch.get_num_threads(),)  # bits hang on their number
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, threads) as pool:
        first, second = pool.map(whole_run, [0, 1])
    assert first == second == whole
    survived("two at once", "two runs of one profile on one cache and project", 1, "both ended in the same bytes")


def test_a_home_that_cannot_be_written(new_project, monkeypatch, tmp_path, as_nobody):
    new_project("mine")
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o555)
    for folder in (tmp_path, tmp_path / "mine", tmp_path / "mine/model"):
        folder.chmod(0o777)
    for file in (tmp_path / "mine/model").iterdir():
        file.chmod(0o644)

    def run():
        os.environ["HOME"] = str(home)
        os.environ.pop("MASKSAE_CACHE", None)
        os.environ.pop("XDG_CACHE_HOME", None)
        whole_run()

    kind, message = as_nobody(run)
    assert kind == "OutputError" and str(home) in message and "permission denied" in message
    survived("place", "a home that cannot be written", 1, "refused, naming the folder, before anything was downloaded")


def weights() -> dict:
    return {path.parent.name: path.read_bytes() for path in Path("build/mine").rglob("sae.safetensors")}


@pytest.mark.slow
def test_ctrl_c_of_the_command(new_project):
    """The real signal, to a real process, at moments spread over its life."""
    command = [sys.executable, "-m", "masksae", "train", "mine.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    new_project("whole")
    begin = time.monotonic()
    subprocess.run(command, env=environment | {"MASKSAE_CACHE": "cache"}, check=True, capture_output=True)
    took, whole, stopped = time.monotonic() - begin, weights(), 0
    moments = [i / 20 for i in range(2, 20)] if FUZZ else [0.85]
    for moment in moments:
        new_project(f"stopped-{moment}")
        process = subprocess.Popen(
            command,
            env=environment | {"MASKSAE_CACHE": "cache"},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(moment * took)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        # Python itself ends by the signal, which a shell calls 130, if it came in the middle of an `exec`, as when a
        # dataclass is made
        assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in said, said
        if said.rstrip().endswith("masksae: interrupted; what was finished is kept, and the same command goes on."):
            stopped += 1
        else:  # it had done its work, and was on the way out
            assert weights() == whole, said
        subprocess.run(command, env=environment | {"MASKSAE_CACHE": "cache"}, check=True, capture_output=True)
        assert weights() == whole
    assert stopped or not FUZZ
    outcome = (
        f"{stopped} said so in a line and ended with status 130, the others had done their work; "
        "the next run ended in the same bytes"
    )
    survived("interrupt", "SIGINT to `masksae train`, at moments over its whole life", len(moments), outcome)


@pytest.mark.slow
@pytest.mark.skipif(not FUZZ, reason="many minutes; set MASKSAE_FUZZ")
def test_ctrl_c_in_every_stage_of_the_pipeline(tmp_path, monkeypatch):
    """Ctrl-C, as a terminal sends it, a few seconds into every stage of `make repro PROFILE=smoke`; then to the end, to
    the same results."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    for kind in ("packages", "models"):
        shutil.copytree(cache_dir(kind), tmp_path / "cache" / kind)
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(clone))
    command = [sys.executable, "-m", "masksae", "repro", "smoke"]
    stages, seen = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))], []
    while len(seen) < len(stages):
        process = subprocess.Popen(
            command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        for line in process.stdout:
            found = [stage for stage in stages if f"masksae run {stage}" in line]
            if found and found[0] not in seen:
                seen += found
                time.sleep(5)
                os.killpg(process.pid, signal.SIGINT)
                break
        process.stdout.read()
        assert process.wait() != 0 or len(seen) == len(stages), "nothing was left to interrupt"
        assert not list(clone.glob("results/smoke/.tmp-*"))
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for file in (ROOT / "results/smoke").glob("*.json"):
        assert (clone / "results/smoke" / file.name).read_bytes() == file.read_bytes(), file.name
    outcome = "the next run went on, to the same result files"
    survived("interrupt", "Ctrl-C in each stage of `make repro PROFILE=smoke`", len(seen), outcome)
