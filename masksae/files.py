"""Paths, atomic writes and run ids: the few file habits that every other module shares.

A file or folder appears under its final name only when it is complete (written beside it, flushed, then renamed), so a
kill or a full disk can leave rubbish with a `.tmp-` name but never half a result. Who may read it is what the umask
says, as for any other program's files: two users may share a cache.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from masksae.errors import DataError, OutputError

PROFILES = Path(__file__).resolve().parent / "profiles"
"""The shipped profiles."""


def shipped_profiles() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def repository() -> Path:
    """Folder of the project: the nearest one above the working folder (or it) that holds dvc.yaml; else the working
    folder."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), here)


def cache_dir(*parts: str) -> Path:
    """The user's cache (downloads and scratch): `$MASKSAE_CACHE`, else `$XDG_CACHE_HOME/masksae` or `~/.cache/masksae`.
    Raises OutputError where there is no home."""
    root = os.environ.get("MASKSAE_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "masksae"
    try:
        return Path(root).expanduser().joinpath(*parts)
    except RuntimeError as error:  # an account without a home, as in containers
        raise OutputError(
            "There is no home folder for downloads and scratch. Set MASKSAE_CACHE to a folder."
        ) from error


def run_id(config) -> str:
    """Twelve hex digits that depend on every value of a JSON-able configuration and on nothing else.

    >>> run_id({"b": 1, "a": [2]}) == run_id({"a": [2], "b": 1})
    True
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def ensure_writable(folder) -> Path:
    """Create `folder` and prove that a file can be written there; call it before long work. Raises OutputError."""
    folder = Path(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    return folder


ANYTHING = ("*",)
"""What `atomic_dir` may replace in a place that no one else writes to: the cache, or `build/`."""


@contextlib.contextmanager
def atomic_dir(target, replaces: Collection[str] = ()):
    """Yield an empty temporary folder that becomes `target` when the block ends without an error.

    A folder that is there already is replaced if every file in it is one of `replaces` (patterns such as "*.json", in
    folders inside it too); any other is not ours to delete, and refused with OutputError before the block runs. At no
    moment is there a partly written one. If the process dies between the two renames, the old folder survives as
    `.old-NAME` and `recover` brings it back.
    """
    target = Path(target)
    if target.is_symlink():
        target = target.resolve()
    ensure_writable(target.parent)
    recover(target)
    _refuse_foreign(target, replaces)
    tmp = _beside(target)
    tmp.mkdir()
    try:
        with explained(target):
            yield tmp
            mode = tmp.stat().st_mode & 0o666
            for path in tmp.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # safetensors makes its files for their owner alone
                    _sync(path)
            old = target.with_name(f".old-{target.name}")
            if target.exists():
                os.replace(target, old)
            os.replace(tmp, target)
            _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _refuse_foreign(target: Path, replaces: Collection[str]) -> None:
    """Raise OutputError if there is something at `target` that may not be replaced."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file, and a folder is to be written there. Choose another name.")
    if not target.exists() or tuple(replaces) == ANYTHING:
        return
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir())
    if foreign := [file for file in files if not any(fnmatch(file, pattern) for pattern in replaces)]:
        expected = f"nothing but {', '.join(replaces)}" if replaces else "nothing"
        raise OutputError(
            f"{target} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, "
            "and writing there would delete it. "
            f"Expected: a folder that is new, or holds {expected}. Choose another name, or move what is there."
        )


def _beside(path: Path) -> Path:
    """A name that nobody uses, beside a path."""
    return path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")


def recover(target) -> Path:
    """Undo a replacement of the folder `target` that was interrupted between its two renames; returns it."""
    target = Path(target)
    old = target.with_name(f".old-{target.name}")
    if old.exists():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)
    return target


@contextlib.contextmanager
def atomic_file(path):
    """Yield a temporary path; the file written there becomes `path` when the block ends without an error."""
    path = Path(path)
    ensure_writable(path.parent)
    tmp = _beside(path)
    with explained(path):
        tmp.touch(exist_ok=False)
    mode = tmp.stat().st_mode & 0o666
    try:
        with explained(path):
            yield tmp
            tmp.chmod(mode)  # the writer may have put a file of its own there
            _sync(tmp)
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path, text: str) -> Path:
    """Write `text` to `path` atomically, with LF line ends."""
    with atomic_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def save_tensors(tensors: dict, path) -> None:
    """Write a safetensors file inside `atomic_dir` or `atomic_file`; its I/O errors become the OSErrors that those
    explain. Tensors that share their memory are written each on its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    written: dict = {}
    for name, tensor in tensors.items():
        shared = any(tensor.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in written.values())
        written[name] = tensor.contiguous().clone() if shared else tensor.contiguous()
    try:
        save_file(written, path)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), str(error)) from error
        raise


def read_safetensors(path) -> dict:
    """Tensors of a safetensors file, on the CPU. Raises DataError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"The scratch file {path} is damaged ({error}). Delete it; it is made again.") from error


def write_json(path, value, *, compact: bool = False) -> Path:
    """Write JSON atomically, two-space indent or in one line, keys in the given order; NaN is refused (store None and
    say why)."""
    form = {"separators": (",", ":")} if compact else {"indent": 2}
    return write_text(path, json.dumps(value, **form, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path):
    """Read a JSON file. Raises DataError if it is damaged, or cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Restore it from a copy, or move it away.") from error


def sha256(path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def explained(path: Path):
    """Turn the common OS errors of writing into ones that say what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        reasons = {
            errno.ENOSPC: "the disk is full. Free some space, or point MASKSAE_CACHE (downloads, scratch) elsewhere",
            errno.EDQUOT: "the disk quota is used up. Free some space, or point MASKSAE_CACHE elsewhere",
            errno.EROFS: "the file system is read-only. Choose another folder",
            errno.EACCES: "permission denied. Choose a folder you may write to, or change its permissions",
            errno.EPERM: "permission denied. Choose a folder you may write to, or change its permissions",
            errno.ENOTDIR: "a part of this path is a file, not a folder. Choose another folder",
        }
        if error.errno not in reasons:
            raise
        raise OutputError(f"Cannot write {path}: {reasons[error.errno]}. What was finished before is kept.") from error
