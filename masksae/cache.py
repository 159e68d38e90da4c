"""What is kept in the user's cache, and under which id.

An id covers everything that a result is made of: configuration, the content of files that it names (not their paths),
and the code that makes it. The code is found by a walk over the imports of this package, so no list of modules is kept
by hand. Comments, docstrings, annotations and the words of messages do not count: a better error must not train ten
hours again.

Finding the id of a study's code takes about 0.1 s, the content of a model's folder as long as reading it, once.
"""

import ast
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable
from itertools import chain
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

PACKAGE = Path(__file__).resolve().parent

NEUTRAL = {
    "errors", "files", "progress", "parallel", "memory", "jobs", "cache", "training.logs",  # ground
    "study.profile", "study.sections",  # a profile's values are in an id by themselves
    "export", "saes.formats",  # forms of other libraries
}  # fmt: skip
"""Modules that cannot change a number, at which the walk stops."""

SAMPLED = 4096
"""Rows, entries or blocks of which a fingerprint is taken."""

WORDS = {"label", "unit", "notebook"}
"""Keywords of calls that only a reader sees."""


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


def code_id(*modules: str) -> str:
    """Id of what some modules of masksae do ("study.scores.absorption"), and of all that they import."""
    return _id(reached(*modules))


def _id(found: dict[str, Path]) -> str:
    return run_id({module: _normal(path) for module, path in sorted(found.items())})


def code_of(thing) -> str:
    """Id of what the module of a function or a class does, and of all that it imports from masksae; of one typed into a
    notebook, nothing."""
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return _id(_reached([_named(Path(file or ""))]))


def reached(*modules: str) -> dict[str, Path]:
    """Modules of masksae by name that some modules can come to run, themselves included; imports inside functions count
    too."""
    found = [_resolved(module) for module in modules]
    if not all(found):
        raise ModuleNotFoundError(f"masksae has no module {modules[found.index([])]}")
    return _reached(chain.from_iterable(found))


def _reached(queue: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found, queue = {}, list(queue)
    while queue:
        name, path = queue.pop()
        if name not in found and name not in NEUTRAL and path.is_file():
            found[name] = path
            queue += [each for imported in _imports(path) for each in _resolved(imported)]
    return found


def _named(path: Path) -> tuple[str, Path]:
    """A file with its name in the package, or its own name outside."""
    inside = path.is_relative_to(PACKAGE)
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts) if inside else path.name, path


def _resolved(name: str) -> list[tuple[str, Path]]:
    """(module, file) of a dotted name inside the package; none for a package's __init__, whose names load lazily."""
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    return [(name, path)] if path.is_file() else []


def _imports(path: Path) -> set[str]:
    """Dotted names inside the package that a file imports anywhere, and the modules that they lie in."""
    return _read(path, path.stat().st_mtime_ns)[0]


def _normal(path: Path) -> str:
    """What a file does, in a form that its words, its layout and the version of Python do not change."""
    return _read(path, path.stat().st_mtime_ns)[1]


@functools.lru_cache(maxsize=256)
def _read(path: Path, changed: int) -> tuple[set[str], str]:
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE.name}.")}
    return {name.partition(".")[2] for name in names}, _dump(_Silenced().visit(tree))


class _Silenced(ast.NodeTransformer):
    """Leaves out what only a reader sees."""

    def visit(self, node):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]
        return super().visit(node)

    def visit_Raise(self, node):
        texts = (ast.Constant, ast.JoinedStr)
        for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
            call.args = [arg for arg in call.args if not isinstance(arg, texts)]
        return node

    def visit_Call(self, node):
        node.keywords = [keyword for keyword in node.keywords if keyword.arg not in WORDS]
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            return ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)


def _is_text(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _dump(node) -> str:
    """As `ast.dump`, without fields that are empty: versions of Python differ in those."""
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields)
        told = ",".join(f"{name}={_dump(value)}" for name, value in fields if value is not None and value != [])
        return f"{type(node).__name__}({told})"
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    return repr(node)


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
