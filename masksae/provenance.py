"""What code made a result: the modules of this package that can come to run, as this process loaded them, and the
versions of the libraries below them.

The modules are found by a walk over imports, so no list of them is kept by hand. Comments, docstrings, annotations and
the words of errors do not count: a better error must not train ten hours again.

The text of every module is taken when the package is imported, and that text is what an id is made of, for it is what
runs. Where a file has changed since (an edit under an open kernel, or during a long run), no id is given: results would
be kept under the name of code that did not make them.

Finding the modules of a study's scores takes about 0.3 s, once.
"""

import ast
import functools
import importlib
import linecache
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from masksae.errors import CodeError
from masksae.files import run_id

PACKAGE = Path(__file__).resolve().parent

NEUTRAL = frozenset({
    "errors", "files", "progress", "parallel", "memory", "jobs", "cache", "provenance", "training.logs",  # ground
    "study.profile", "study.sections", "study.store",  # a profile's values are in an id by themselves
    "export", "saes.formats",  # forms of other libraries
})  # fmt: skip
"""Modules that cannot change a number, at which the walk stops."""

LIBRARIES = {
    "datasets": ("datasets",), "gguf": ("gguf",), "matplotlib": ("matplotlib",), "nnsight": ("nnsight",),
    "numpy": ("numpy",), "pandas": ("pandas",), "scipy": ("scipy",), "seaborn": ("seaborn",),
    "sklearn": ("scikit-learn",), "torch": ("torch",), "transformers": ("transformers", "tokenizers"),
}  # fmt: skip
"""Packages that can change a number or a picture, by the name under which they are imported."""

_texts: dict[Path, str] = {}
_stamps: dict[Path, tuple[int, int]] = {}


def remember(path: Path, anew: bool = False) -> str:
    """The text of a file of source code as it was when it was first asked for, or is now if it is loaded `anew`; of the
    package's own files, when the package was imported."""
    if anew or path not in _texts:
        _stamps[path] = _stamp(path)
        _texts[path] = path.read_text(encoding="utf-8")
    return _texts[path]


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def made_by(*things, neutral: frozenset[str] = NEUTRAL) -> dict[str, dict[str, str]]:
    """What some functions or classes, or modules by name ("study.inputs"), are made of: {"modules": {name: hash},
    "versions": {library: version}}, everything that they import from masksae included, but for `neutral` modules.

    A class or a function that was typed into a notebook stands for the cells that it was typed in, and not for others
    that it calls. Raises CodeError where a file has changed since this process loaded it.
    """
    modules, cells, libraries = {}, "", set()
    names = [thing for thing in things if isinstance(thing, str)]
    for thing in (thing for thing in things if not isinstance(thing, str)):
        file = getattr(sys.modules.get(thing.__module__), "__file__", None)
        if file is None:
            cells += _cells(thing)
        else:
            names.append(str(Path(file).resolve()))
    for name, path in _reached(tuple(names), neutral).items():
        modules[name] = _hash(_unchanged(name, path))
        libraries |= _parsed(remember(path))[1] & LIBRARIES.keys()
    if cells:
        modules["notebook"] = _hash(cells)
    versions = {package: _version(package) for library in libraries for package in LIBRARIES[library]}
    return {"modules": dict(sorted(modules.items())), "versions": dict(sorted(versions.items()))}


def imported(text: str) -> list[str]:
    """Modules of masksae that a source text imports, `from masksae import Run` among them.

    >>> imported("from masksae import Run; from masksae.study import stats")
    ['study.run', 'study.stats']
    """
    import masksae

    homes = {name: home.partition(".")[2] for name, home in masksae._HOME.items()}
    return sorted({homes.get(name, name) for name in _parsed(text)[0] if _places(homes.get(name, name))})


def joined(*found: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Several descriptions of code as one."""
    return {key: {k: v for each in found for k, v in each[key].items()} for key in ("modules", "versions")}


def code_id(*things) -> str:
    """Id of what `made_by` finds."""
    return run_id(made_by(*things))


def _cells(thing) -> str:
    """Source of the notebook cells in which a function, or the methods of a class, were typed; "" where nobody has
    it."""
    functions = [thing, *vars(thing).values()]
    files = dict.fromkeys(f.__code__.co_filename for f in functions if hasattr(f, "__code__"))
    return "".join(line for file in files for line in linecache.getlines(file))


@functools.cache
def _hash(text: str) -> str:
    return run_id(_parsed(text)[2])


@functools.cache
def _version(package: str) -> str:
    """Without what tells builds of one version apart: 2.13.0 of 2.13.0+cpu."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "none"


def _unchanged(name: str, path: Path) -> str:
    """The text of a module as it was loaded. Raises CodeError if the file says something else by now."""
    text = remember(path)
    if not _is_as_loaded(path):
        raise CodeError(
            f"{name} ({path}) has changed since it was loaded, so what runs here is not what the file says. Restart "
            "the kernel, or the command; what is finished is kept."
        )
    return text


def changed() -> list[str]:
    """Modules of the package, but for its `app`, whose files say something else by now than when they were loaded."""
    ours = [place for path in _texts if path.is_relative_to(PACKAGE) for place in _places(str(path))]
    return [name for name, path in ours if not (name.startswith("app.") or _is_as_loaded(path))]


def _is_as_loaded(path: Path) -> bool:
    try:
        same = _stamp(path) == _stamps[path]
        return same or _parsed(path.read_text(encoding="utf-8"))[2] == _parsed(_texts[path])[2]
    except (OSError, SyntaxError, UnicodeDecodeError):
        return False


@functools.cache
def _reached(names: tuple[str, ...], neutral: frozenset[str]) -> dict[str, Path]:
    """Modules by name that some modules, or files, can come to run, themselves included; imports inside functions count
    too. Those of masksae are imported here, so that what is edited from now on is not what runs."""
    found: dict[str, Path] = {}
    queue = [place for name in names for place in _places(name)]
    if len(queue) < len(names):
        raise ModuleNotFoundError(f"masksae has no module among {names} that is not a file.")
    while queue:
        name, path = queue.pop()
        if name not in found and name not in neutral:
            found[name] = path
            queue += [place for imported in _parsed(remember(path))[0] for place in _places(imported)]
            _load(name, path)
    return found


def _places(name: str) -> list[tuple[str, Path]]:
    """(module, file) of a dotted name inside the package, or of a file; none for a package's __init__, whose names load
    lazily."""
    path = Path(name)
    if not path.is_absolute():
        path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
        return [(name, path)] if path.is_file() else []
    inside = path.is_relative_to(PACKAGE)
    return [(".".join(path.relative_to(PACKAGE).with_suffix("").parts) if inside else path.name, path)]


def _load(name: str, path: Path) -> None:
    if path.is_relative_to(PACKAGE):
        try:
            importlib.import_module(f"{PACKAGE.name}.{name}")
        except ModuleNotFoundError as error:  # a library that is not installed: then it is not what runs
            if (error.name or "").startswith(PACKAGE.name):
                raise


@functools.cache
def _parsed(text: str) -> tuple[set[str], set[str], str]:
    """Of a source text: dotted names inside the package that it imports anywhere, other packages that it imports, and
    what it does, in a form that its words, its layout and the version of Python do not change."""
    tree = ast.parse(text)
    names = {name for node in ast.walk(tree) for name in _imported(node)}
    ours = {name.partition(".")[2] for name in names if name.partition(".")[0] == PACKAGE.name}
    return ours, {name.partition(".")[0] for name in names}, _dump(_Silenced().visit(tree))


def _imported(node) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


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


for _path in PACKAGE.rglob("*.py"):
    remember(_path)
