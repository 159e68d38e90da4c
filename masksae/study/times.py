"""What a run took on this machine: seconds and memory of each stage, in build/NAME/times.json.

No score is read from the file, and it differs from run to run. What the pages show of a run is a copy beside its
results, which tools/pages.py takes.
"""

import functools
import os
import platform
import resource
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from masksae.files import read_json, write_json

FILE = "times.json"


@contextmanager
def timed(folder: Path, stage: str):
    """Note in times.json of a folder how long what stands inside took, and the most memory that this process or one
    that it waited for had; nothing of a stage that fails."""
    begun = time.monotonic()
    yield
    note(folder, stage, time.monotonic() - begun)


def note(folder: Path, stage: str, seconds: float) -> None:
    """Write one stage's seconds and memory (GB), in the place of what it took before."""
    known = times(folder)
    known["machine"] = machine()
    known["stages"][stage] = {"seconds": round(seconds, 1), "memory_gb": round(peak_memory() / 1e9, 2)}
    write_json(folder / FILE, known)


def times(folder: Path) -> dict:
    """The file: `machine`, and in `stages` seconds and memory_gb of each. Without a file, neither."""
    file = folder / FILE
    return read_json(file) if file.exists() else {"machine": {}, "stages": {}}


def peak_memory() -> float:
    """Bytes: the largest resident size that this process or a child that ended has had."""
    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return used * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def machine() -> dict:
    """Cores, their vector instructions, the speed of a float32 product (GFLOP/s, all cores), and versions."""
    a = torch.ones(1024, 1024)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    speed = 2 * 1024**3 / min(seconds) / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gflops": round(speed),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(found: dict) -> list[list[str]]:
    """Rows for a reader: stage, time, memory; the sum at the end."""
    stages = found["stages"]
    total = {"seconds": sum(s["seconds"] for s in stages.values())}
    total["memory_gb"] = max((s["memory_gb"] for s in stages.values()), default=0.0)
    rows = [[name, span(s["seconds"]), f"{s['memory_gb']:.1f} GB"] for name, s in (stages | {"in all": total}).items()]
    return [["", "time", "memory"], *rows]


def span(seconds: float) -> str:
    """
    >>> span(3725.4)
    '1:02:05'
    """
    return str(timedelta(seconds=round(seconds)))
