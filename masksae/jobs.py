"""Where the jobs of a run are done: here, one process per device, or as a SLURM job array. One seam, and no result
depends on it.

A job is a function of this package and plain arguments. It leaves its result on disk under an id, so a job that was
finished returns at once and one that was broken off goes on; that is all that pre-emption, requeueing and a second
attempt need. The choice is `$MASKSAE_EXECUTOR`:

    inline                                          one after the other in this process (default)
    processes:devices=cuda:0+cuda:1                 one process per device; without devices, every GPU
    slurm:partition=gpu,gpus_per_node=1,timeout_min=720,parallel=4
                                                    an array through submitit, `parallel` jobs at a time; its other
                                                    options by their names

SLURM is asked with `squeue`, which works where no accounting is kept. Whoever waits may go away (Ctrl-C cancels, a lost
connection does not): jobs go on, and the next run waits for them at their locks.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from masksae.errors import ConfigError, JobError, nearest
from masksae.files import cache_dir, ensure_writable

KINDS = {"inline": (), "processes": ("devices",), "slurm": None}
"""Known executors with their options; those of SLURM are submitit's."""

SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout")
"""Options that submitit has for every cluster; it calls the others slurm_NAME."""

POLL, PATIENCE = 5.0, 60.0
"""Seconds between two looks at the queue, and until a job that left the queue without a result is given up."""


@dataclass(frozen=True)
class Job:
    """A function "module:name" and its arguments, plain values."""

    name: str
    function: str
    arguments: tuple

    def __call__(self) -> None:
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(module), name)(*self.arguments)

    def checkpoint(self, *_):
        """What submitit starts again when time is up: the same job, which goes on from its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def executor() -> tuple[str, dict[str, str]]:
    """Kind and options of `$MASKSAE_EXECUTOR`. Raises ConfigError.

    >>> import os; os.environ["MASKSAE_EXECUTOR"] = "slurm:partition=gpu,parallel=2"; executor()
    ('slurm', {'partition': 'gpu', 'parallel': '2'})
    >>> del os.environ["MASKSAE_EXECUTOR"]; executor()
    ('inline', {})
    """
    text = os.environ.get("MASKSAE_EXECUTOR") or "inline"
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"MASKSAE_EXECUTOR {text!r}: unknown executor {kind!r}.{nearest(kind, KINDS)}")
    options = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or (KINDS[kind] is not None and key not in KINDS[kind]):
            known = "NAME=VALUE, with submitit's names" if KINDS[kind] is None else ", ".join(KINDS[kind]) or "none"
            raise ConfigError(f"MASKSAE_EXECUTOR {text!r}: {part!r} is no option of {kind}. Known: {known}.")
        options[key] = value
    return kind, options


def chosen_device() -> str:
    """Where models run: `$MASKSAE_DEVICE`, else a GPU if there is one, with TF32. Raises ConfigError for a device that
    is not there.

    >>> import os; os.environ["MASKSAE_DEVICE"] = "cpu"; chosen_device()
    'cpu'
    >>> del os.environ["MASKSAE_DEVICE"]
    """
    import torch

    gpus = torch.cuda.device_count()
    name = os.environ.get("MASKSAE_DEVICE") or ("cuda" if gpus else "cpu")
    known = ["cpu", *(f"cuda:{i}" for i in range(gpus))]
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
        elif (device.index or 0) >= gpus:  # counted, not tried: a process that has used CUDA cannot be forked
            raise RuntimeError("no such GPU")
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"MASKSAE_DEVICE is {name!r}, and there is no such device here: {', '.join(known)}. Unset it to take the "
            "best."
        ) from error
    if device.type == "cuda":
        allow_tf32()
    return name


def allow_tf32() -> None:
    """Let GPUs take products of float32 in TF32 (ten bits of mantissa, sums in float32), several times as fast; in the
    whole process, so that a result does not depend on what ran before. CPUs do not know of it."""
    import torch

    torch.set_float32_matmul_precision("high")  # after the newer flags PyTorch's older queries raise
    if hasattr(torch.backends.mkldnn, "matmul"):  # some CPUs have a TF32 of their own since PyTorch 2.9
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def run_jobs(jobs: list[Job]) -> None:
    """Do all jobs. One that fails does not stop the others; then JobError names each that failed, with its log."""
    kind, options = executor()
    if kind == "inline":
        for job in jobs:
            job()
        return
    failed = {"processes": _processes, "slurm": _slurm}[kind](jobs, options)
    if failed:
        told = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise JobError(
            f"{len(failed)} of {len(jobs)} jobs failed; what the others made is kept.\n{told}\nRun again: only these "
            "are done again."
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _processes(jobs: list[Job], options: dict[str, str]) -> dict[str, str]:
    """One process per device, jobs in turn; their output goes to logs. Reasons of those that failed, by name."""
    import torch

    devices = (
        options["devices"].split("+")
        if "devices" in options
        else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    )
    if not devices:
        raise ConfigError(
            "MASKSAE_EXECUTOR processes: there is no GPU here. Name devices (processes:devices=cpu+cpu), or use inline."
        )
    folder, free, running, failed = ensure_writable(cache_dir("jobs")), SimpleQueue(), [], {}
    for device in devices:
        free.put(device)
    cores = max(1, (os.cpu_count() or 1) // len(devices))

    def one(job: Job) -> None:
        device, log = free.get(), folder / f"{job.name}-{os.getpid()}.log"
        settings = {"MASKSAE_DEVICE": device, "MASKSAE_EXECUTOR": "inline"}
        if "OMP_NUM_THREADS" not in os.environ:
            settings["OMP_NUM_THREADS"] = str(cores)
        _say(f"{job.name}: started on {device}, log {log}")
        with open(log, "w", encoding="utf-8") as out:
            command = [sys.executable, "-m", "masksae.jobs", json.dumps([job.name, job.function, job.arguments])]
            process = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT)
            running.append(process)
            status = process.wait()
        free.put(device)
        if status:
            failed[job.name] = f"{_last_line(log)} (exit status {status}, log {log})"
        _say(f"{job.name}: {'failed' if status else 'done'}")

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            list(pool.map(one, jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
    return failed


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _slurm(jobs: list[Job], options: dict[str, str]) -> dict[str, str]:
    """A job array; waits for it, and cancels it on Ctrl-C. Reasons of those that failed, by name."""
    submitted = _submit(jobs, options)
    ids = ", ".join(job.job_id for job in submitted.values())
    _say(f"submitted {len(jobs)} jobs to SLURM ({ids}), logs in {cache_dir('jobs')}")
    failed, left, shown, missing = {}, dict(submitted), None, {}
    try:
        while left:
            states = _queue([job.job_id for job in left.values()])
            if states is None:
                time.sleep(POLL)
                continue
            for name, job in list(left.items()):
                reason = _outcome(job, states, missing)
                if reason is not None:
                    del left[name]
                    if reason:
                        failed[name] = reason
            counts = [len(jobs) - len(left) - len(failed), len(failed), sum(v == "RUNNING" for v in states.values())]
            if counts != shown:
                _say("slurm: {} done, {} failed, {} running, of {}".format(*counts, len(jobs)))
                shown = counts
            if left:
                time.sleep(POLL)
    except KeyboardInterrupt:
        for job in left.values():
            job.cancel(check=False)
        _say(f"cancelled {len(left)} jobs; what they made so far is kept")
        raise
    return failed


def _submit(jobs: list[Job], options: dict[str, str]) -> dict:
    """Name -> submitit's job."""
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("MASKSAE_EXECUTOR slurm needs submitit. Install it: pip install submitit.") from error

    def number(value: str) -> int | str:
        return int(value) if value.isdigit() else value

    parameters = {(k if k in SHARED else f"slurm_{k}"): number(v) for k, v in options.items() if k != "parallel"}
    folder = ensure_writable(cache_dir("jobs"))
    try:
        cluster = submitit.AutoExecutor(folder=folder, cluster="slurm")
        cluster.update_parameters(
            name="masksae", slurm_array_parallelism=int(options.get("parallel", 256)), **parameters
        )
        with cluster.batch():
            submitted = [cluster.submit(job) for job in jobs]
    except (NameError, TypeError, RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(f"MASKSAE_EXECUTOR slurm: {error}. Look at the options and at `sinfo`.") from error
    return {job.name: found for job, found in zip(jobs, submitted)}


def _queue(ids: list[str]) -> dict[str, str] | None:
    """State of those jobs that are still in the queue, by one call for all; None where SLURM does not answer."""
    arrays = ",".join(dict.fromkeys(job.partition("_")[0] for job in ids))
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={arrays}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode and "Invalid job id" not in found.stderr:  # that it says of jobs that ended long ago
        return None
    return dict(line.split() for line in found.stdout.splitlines() if len(line.split()) == 2)


def _outcome(job, states: dict[str, str], missing: dict[str, float]) -> str | None:
    """None while a job goes on, "" once it is done, else why it failed."""
    if job.paths.result_pickle.exists():
        error = job.exception()
        return "" if error is None else f"{_cause(error)} (log {job.paths.stderr})"
    if states.get(job.job_id, "GONE") not in ("GONE", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"):
        missing.pop(job.job_id, None)
        return None
    since = missing.setdefault(job.job_id, time.monotonic())
    if time.monotonic() - since < PATIENCE:  # a shared file system may show the result late
        return None
    return f"ended without a result: killed, cancelled or out of time (log {job.paths.stderr})"


def _cause(error: BaseException) -> str:
    """The last line of the traceback that submitit hands on."""
    lines = [line for line in str(error).partition("You can check full logs")[0].splitlines() if line.strip(" -")]
    return lines[-1][:300] if lines else type(error).__name__


if __name__ == "__main__":
    Job(*json.loads(sys.argv[1]))()
