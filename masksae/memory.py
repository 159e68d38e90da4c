"""How much memory training needs, by formula, and whether it is there: asked before the start, not found out in the
night."""

import os
from collections import Counter
from pathlib import Path

import torch

from masksae.errors import ConfigError
from masksae.saes.config import SAEConfig

ADAM_AND_WEIGHTS = 3
"""Numbers kept per parameter: the weight and Adam's two moments. Gradients exist for one SAE at a time."""

MOST_STACKED = 8
"""SAEs that take a dense step together, at most: launches are few from there on, and memory grows with each."""

CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version: the files that hold a cgroup's limit and use, and the entry of `memory.stat` for file caches that can be
dropped."""


def parameters(config: SAEConfig) -> int:
    """Numbers in an SAE's weights.

    >>> from masksae import BatchTopK
    >>> parameters(SAEConfig(768, 4096, BatchTopK(20)))
    6296320
    """
    d, n = config.d_model, config.n_latents
    with torch.device("meta"):
        extra = config.selection.tensors(n).values()
    return 2 * d * n + n + d + sum(tensor.numel() for tensor in extra)


def training_bytes(configs: list[SAEConfig], batch_size: int, *, sparse: bool = True, branch: bool = False) -> int:
    """Peak memory of training these SAEs together, in bytes, without the activations themselves and the language model.

    sparse  the step of `saes/sparse.py` with few active entries, else the dense one, in which SAEs of one architecture
            are stacked; rules that are not `always_sparse` start dense
    branch  a second copy of all state, for snapshots with a branch
    """
    state = ADAM_AND_WEIGHTS * sum(parameters(c) for c in configs) * (2 if branch else 1)
    alike = Counter(config.alike for config in configs)
    together = {c: 1 if sparse or not c.selection.stacked else min(n, MOST_STACKED) for c, n in alike.items()}
    return 4 * (state + max(n * _step(c, batch_size, sparse) for c, n in together.items()))


def _step(config: SAEConfig, batch: int, sparse: bool) -> int:
    """Numbers that live during one SAE's step: gradients, pre-activations, errors of each prefix, active entries."""
    d, n, groups = config.d_model, config.n_latents, len(config.group_sizes)
    rule = config.selection
    work = parameters(config) + batch * n + batch * d * (groups + 4) + d * n
    if config.penalties:
        work += 4 * d * n  # rows and their neighbours, and the gradients of both
    if sparse and rule.always_sparse:
        return int(work + batch * n / 2 + 16 * rule.goal * batch)
    return work + rule.dense_copies * batch * n


def available_bytes(device) -> int | None:
    """Memory that is free on a device, what this process holds there in reserve included; None where that cannot be
    told."""
    device = torch.device(device)
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's cached blocks
        return torch.cuda.mem_get_info(device)[0] + reserve
    return host_bytes() if device.type == "cpu" else None


def host_bytes(root: Path = Path("/")) -> int | None:
    """Ordinary memory that is free to this process: on the machine, and within the limits of its cgroups (a
    container's, a SLURM job's)."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return min((known for known in (free, *_room_in_cgroups(root)) if known is not None), default=None)


def _room_in_cgroups(root: Path) -> list[int]:
    """Limit less use of each memory cgroup that this process is in, and of those around it. File caches do not count:
    they give way."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    room = []
    for _, controllers, path in entries:
        version = 2 if controllers == "" else 1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        mount = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
        inner = mount / path.strip("/")
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))):
            room += _room(folder, *CGROUP_FILES[version])
    return room


def _room(folder: Path, limit: str, used: str, cache: str) -> list[int]:
    """[bytes that are free in a cgroup], [] where it has no limit, or is not visible from inside a container."""
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())  # "max" is no number
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [max(0, most - now + int(stat.get(cache, 0)))]
    except (OSError, ValueError):
        return []


def check_memory(
    configs: list[SAEConfig], batch_size: int, device, *, sparse: bool = True, branch: bool = False
) -> None:
    """Raise ConfigError if training cannot fit on the device."""
    needed, free = training_bytes(configs, batch_size, sparse=sparse, branch=branch), available_bytes(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"Training {len(configs)} SAEs needs about {needed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are "
            "free. Train fewer at once (one group per run), lower n_latents or batch_size, "
            "or use a device with more memory."
        )
