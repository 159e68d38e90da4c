"""Executors without a cluster: options, one process per device, failures that lose nothing. SLURM itself:
`test_slurm.py`."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_project import profile

from masksae import Run, jobs
from masksae.errors import ConfigError, JobError

SUPPORT = str(Path(__file__).resolve().parents[1] / "support")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A cache of its own, and jobs that find the tests' modules."""
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")]))
    return tmp_path


@pytest.mark.parametrize(
    "text, words",
    [
        ("slrum", "unknown executor 'slrum'. Did you mean 'slurm'"),
        ("inline:parallel=2", "'parallel=2' is no option of inline. Known: none"),
        ("processes:device=cpu", "'device=cpu' is no option of processes. Known: devices"),
        ("slurm:partition", "'partition' is no option of slurm. Known: NAME=VALUE"),
    ],
)
def test_bad_executors(monkeypatch, text, words):
    monkeypatch.setenv("MASKSAE_EXECUTOR", text)
    with pytest.raises(ConfigError) as caught:
        jobs.executor()
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x", "mps:0", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setenv("MASKSAE_DEVICE", name)
    with pytest.raises(ConfigError, match=f"MASKSAE_DEVICE is '{name}', and there is no such device here: cpu"):
        jobs.chosen_device()


def test_cuda_where_there_is_no_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("MASKSAE_DEVICE", "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no such device here: cpu. Unset it"):
        jobs.chosen_device()
    monkeypatch.delenv("MASKSAE_DEVICE")
    assert jobs.chosen_device() == "cpu"


def test_processes_need_devices(monkeypatch, here):
    monkeypatch.setenv("MASKSAE_EXECUTOR", "processes")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no GPU here. Name devices"):
        jobs.run_jobs([jobs.Job("a", "slurm_jobs:failing", ("x",))])


def test_one_process_per_device_and_a_failure_that_loses_nothing(here, monkeypatch):
    monkeypatch.setenv("MASKSAE_EXECUTOR", "processes:devices=cpu:0+cpu:1")
    members = [jobs.Job(name, "slurm_jobs:device", (str(here), name)) for name in ("a", "b")]
    members.insert(1, jobs.Job("bad", "slurm_jobs:failing", ("no such text",)))
    with pytest.raises(
        JobError, match=r"1 of 3 jobs failed(?s:.)*bad: .*DataError: no such text \(exit status 1, log "
    ):
        jobs.run_jobs(members)
    assert {(here / "a").read_text(), (here / "b").read_text()} <= {"cpu:0", "cpu:1"}


@pytest.mark.slow
def test_groups_of_two_devices_are_those_of_one(new_project, monkeypatch):
    """Both arms at once, each in a process of its own; and nothing is started for what is finished."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MASKSAE_EXECUTOR", "processes:devices=cpu+cpu")
    apart = Run(profile(new_project)).saes
    monkeypatch.setattr(jobs, "run_jobs", lambda _: pytest.fail("started again"))
    assert {*Run(new_project / "tiny.yaml").saes} == {*apart}
    monkeypatch.setenv("MASKSAE_CACHE", str(new_project / "other"))
    monkeypatch.setenv("MASKSAE_EXECUTOR", "inline")
    together = Run(new_project / "tiny.yaml").saes
    assert all((apart[name].W_dec == together[name].W_dec).all() for name in together)


def test_what_the_queue_says_of_a_job(tmp_path, monkeypatch):
    """In the queue it goes on; gone without a result it is given time, as a shared disk needs; then it has failed."""
    paths = SimpleNamespace(result_pickle=tmp_path / "result", stderr="job.err")
    job = SimpleNamespace(job_id="7_0", paths=paths, exception=lambda: None)
    now, missing = [100.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert jobs._outcome(job, {"7_0": "PENDING"}, missing) is None
    assert jobs._outcome(job, {}, missing) is None and missing == {"7_0": 100.0}
    assert jobs._outcome(job, {"7_0": "RUNNING"}, missing) is None and missing == {}  # requeued
    assert jobs._outcome(job, {}, missing) is None
    now[0] += jobs.PATIENCE + 1
    assert "ended without a result" in jobs._outcome(job, {}, missing)
    paths.result_pickle.touch()
    assert jobs._outcome(job, {}, missing) == ""


def test_a_queue_that_does_not_answer_ends_no_job(tmp_path, monkeypatch):
    """`squeue` fails while the controller restarts, and where all jobs ended long ago: only the second says so."""
    for stderr, states in (("Invalid job id specified", {}), ("Unable to contact slurm controller", None)):
        squeue = tmp_path / "squeue"
        squeue.write_text(f"#!/bin/sh\necho 'slurm_load_jobs error: {stderr}' >&2\nexit 1\n")
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert jobs._queue(["7_0", "7_1"]) == states


def test_submitit_is_asked_for_by_name(monkeypatch, here):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setenv("MASKSAE_EXECUTOR", "slurm:partition=gpu")
    with pytest.raises(ConfigError, match="needs submitit. Install it"):
        jobs.run_jobs([jobs.Job("a", "slurm_jobs:failing", ("x",))])


TF32 = """
import torch
from masksae import jobs
x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
before = x @ x
jobs.allow_tf32()
assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
assert getattr(torch.backends.cuda.matmul, "fp32_precision", "tf32") == "tf32"
assert torch.equal(x @ x, before)
assert getattr(torch.backends.mkldnn, "matmul", None) is None or torch.backends.mkldnn.matmul.fp32_precision == "ieee"
"""


def test_tf32_is_allowed_on_gpus_and_changes_nothing_on_a_cpu():
    """PyTorch's older queries answer too: after the newer flag alone they raise, and its compiler asks them."""
    subprocess.run([sys.executable, "-c", TF32], check=True)
