"""What is kept in the user's cache, and under which id.

An id covers everything that a result is made of: configuration, the content of files that it names (not their paths),
and the code that makes it (`masksae.provenance`). Finding the content of a model's folder takes as long as reading it,
once.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from masksae.errors import SourceError
from masksae.files import (
    atomic_dir,
    cache_dir,
    ensure_writable,
    read_json,
    read_safetensors,
    run_id,
    save_tensors,
    sha256,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED = 4096
"""Rows, entries or blocks of which a fingerprint is taken."""


def kept_tensors(kind: str, key, make: Callable[[], "dict[str, Tensor]"]) -> "dict[str, Tensor]":
    """Tensors that `make()` gives, kept under an id of `key`."""
    folder = cache_dir(kind, run_id(key))
    if not folder.exists():
        ensure_writable(folder.parent)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # a second run waits, and finds it made
            if not folder.exists():
                tensors = make()
                with atomic_dir(folder) as tmp:
                    save_tensors(tensors, tmp / "tensors.safetensors")
    return read_safetensors(folder / "tensors.safetensors")


def kept_rows(kind: str, key, make: Callable[[], list[dict]]) -> list[dict]:
    """Rows that `make()` gives, kept under an id of `key`."""
    file = cache_dir("scores", f"{kind}-{run_id(key)}.json")
    if not file.exists():
        write_json(file, make())
    return read_json(file)


def contents(sources: Iterable[str]) -> list[dict[str, str] | str]:
    """What stands behind the names of models, texts and tasks: of a path, the hash of each file by its name in there;
    of a hub model that leaves the commit open, the commit that this machine has (of a data set, "main"). Names of
    pinned packages and commits say all themselves and are left out."""
    found: list[dict[str, str] | str] = []
    for source in sources:
        name = source.partition("#")[0]
        path = Path(name.removeprefix("hub:")).expanduser()
        if name.startswith("hub:") and not str(path).startswith(("/", ".")):
            found += [] if "@" in name else [_commit(str(path))]
        elif path.exists():
            found.append(_hashes(path.resolve()))
    return found


def _commit(name: str) -> str:
    """Commit of a hub model's main branch as it was last downloaded; "main" before that."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    head = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs" / "main"
    return head.read_text(encoding="utf-8").strip() if head.is_file() else "main"


def _hashes(path: Path) -> dict[str, str]:
    """sha256 of the files of a folder, or of a file: looked up where its size and its times are what they were."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _counts(file, path))
    memory = cache_dir("contents", f"{run_id(str(path))}.json")
    known, now = (read_json(memory) if memory.exists() else {}), dict[str, list]()
    for file in files:
        stat = file.stat()
        name, stamp = str(file.relative_to(path)), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        same = known.get(name, [None])[:-1] == stamp
        now[name] = [*stamp, known[name][-1] if same else _hash(file)]
    if now != known:
        write_json(memory, now)
    return {name: values[-1] for name, values in now.items()}


def _hash(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror}). Look at its permissions.") from error


def _counts(file: Path, root: Path) -> bool:
    """Whether a file of a folder is content: hidden ones are not."""
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def spaced(values: "Tensor") -> "Tensor":
    """Along the first dimension all entries of up to about 2 x SAMPLED, and as many evenly spaced ones of more."""
    return values[:: max(1, len(values) // SAMPLED)]


def fingerprint(tensors: "Iterable[Tensor]") -> str:
    """Hash of the types, shapes and bytes of some tensors."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
