"""Jobs on a real SLURM of one node (`make test-slurm`): caps, pre-emption, failures, cancelling, and runs that skip
what is finished."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm import Slurm, missing
from tiny_project import profile

from masksae import Run, jobs
from masksae.errors import ConfigError, JobError

SUPPORT = str(Path(__file__).resolve().parents[1] / "support")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("MASKSAE_TEST_SLURM"), reason="starts daemons; run `make test-slurm`"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    assert not missing(), f"not installed: {', '.join(missing())}. On Debian: apt-get install slurm-wlm munge."
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def scratch(cluster, tmp_path, monkeypatch):
    """A folder, the executor with short waits, and jobs that find the tests' own modules."""
    monkeypatch.setattr(jobs, "POLL", 0.5)
    monkeypatch.setattr(jobs, "PATIENCE", 3.0)
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MASKSAE_EXECUTOR", "slurm:partition=low,timeout_min=5,parallel=2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def job(name, function, *arguments):
    return jobs.Job(name, f"slurm_jobs:{function}", tuple(map(str, arguments[:1])) + arguments[1:])


def test_an_array_keeps_its_cap(scratch, monkeypatch):
    monkeypatch.setenv("MASKSAE_EXECUTOR", "slurm:partition=low,timeout_min=5,parallel=1")
    jobs.run_jobs([job(f"j{i}", "span", scratch, f"t{i}") for i in range(3)])
    spans = sorted(tuple(map(float, (scratch / f"t{i}").read_text().split())) for i in range(3))
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:]))


def test_a_failed_member_does_not_lose_the_others(scratch):
    members = [
        job("good", "span", scratch, "good"),
        job("bad", "failing", "no such text"),
        job("fine", "span", scratch, "fine"),
    ]
    with pytest.raises(JobError, match=r"1 of 3 jobs failed.*(?s:.)*bad: .*DataError: no such text .*log ") as caught:
        jobs.run_jobs(members)
    assert "good" not in str(caught.value) and (scratch / "good").exists() and (scratch / "fine").exists()


def test_preemption_in_the_middle_of_training_changes_no_byte(scratch, monkeypatch):
    monkeypatch.setenv("MASKSAE_EXECUTOR", "slurm:partition=low,timeout_min=5,cpus_per_task=2")
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from masksae import jobs; jobs.POLL = 0.5; jobs.run_jobs([jobs.Job('a', 'slurm_jobs:training', "
            f"({str(scratch / 'cut')!r}, 0.2))])",
        ]
    )
    checkpoint = scratch / "cut/group/checkpoint/state.json"
    _until(checkpoint.exists)
    rival = subprocess.run(
        ["sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 2"],
        capture_output=True,
        text=True,
    )
    assert rival.returncode == 0, rival.stderr
    assert waiting.wait(timeout=180) == 0
    assert (scratch / "cut/starts").read_text() == "xx"
    import slurm_jobs

    slurm_jobs.training(str(scratch / "whole"))
    for i in range(2):
        name = f"sae-{i}/weights.safetensors"
        files = [next((scratch / which / f"sae-{i}").glob("*.safetensors")) for which in ("cut", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_ctrl_c_cancels_what_waits_and_what_runs(scratch):
    code = (
        "from masksae import jobs; jobs.POLL = 0.5; jobs.run_jobs("
        f"[jobs.Job(f'j{{i}}', 'slurm_jobs:span', ({str(scratch)!r}, f't{{i}}', 60.0)) for i in range(4)])"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    _until(lambda: "RUNNING" in _states())
    waiting.send_signal(signal.SIGINT)
    _, told = waiting.communicate(timeout=60)
    assert "cancelled 4 jobs" in told
    _until(lambda: not _states())


def test_a_cancelled_job_is_told_from_a_lost_one(scratch):
    code = (
        "from masksae import jobs; jobs.POLL, jobs.PATIENCE = 0.5, 2; jobs.run_jobs("
        f"[jobs.Job('a', 'slurm_jobs:span', ({str(scratch)!r}, 't', 60.0))])"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    _until(lambda: "RUNNING" in _states())
    subprocess.run(["scancel", "--user", "root"], check=True)
    _, told = waiting.communicate(timeout=60)
    assert "a: ended without a result: killed, cancelled or out of time" in told


def test_groups_are_trained_on_the_cluster_and_skipped_when_finished(scratch, new_project, monkeypatch):
    run = Run(profile(new_project))
    on_cluster = run.saes
    monkeypatch.setattr(jobs, "run_jobs", lambda _: pytest.fail("submitted again"))
    assert {*Run(new_project / "tiny.yaml").saes} == {*on_cluster}
    monkeypatch.setenv("MASKSAE_CACHE", str(new_project / "other"))
    monkeypatch.setenv("MASKSAE_EXECUTOR", "inline")
    here = Run(new_project / "tiny.yaml").saes
    assert all((on_cluster[name].W_dec == here[name].W_dec).all() for name in here)


def test_options_that_the_cluster_refuses_are_named(scratch, monkeypatch):
    monkeypatch.setenv("MASKSAE_EXECUTOR", "slurm:partition=nowhere,timeout_min=5")
    with pytest.raises(ConfigError, match="invalid partition|Invalid partition"):
        jobs.run_jobs([job("a", "span", scratch, "t")])
    monkeypatch.setenv("MASKSAE_EXECUTOR", "slurm:partiton=low")
    with pytest.raises(ConfigError, match="partiton"):
        jobs.run_jobs([job("a", "span", scratch, "t")])


def _states() -> str:
    return subprocess.run(["squeue", "--noheader", "--array", "--format=%T"], capture_output=True, text=True).stdout


def _until(true, seconds: float = 90) -> None:
    for _ in range(int(seconds / 0.2)):
        if true():
            return
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s; queue: {_states()}")
