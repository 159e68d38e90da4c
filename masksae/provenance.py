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
import contextlib
import functools
import importlib
import linecache
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

from masksae.errors import CodeError
from masksae.files import run_id

PACKAGE = Path(__file__).resolve().parent
NAME = __name__.partition(".")[0]
"""Of the package where it is imported: behind a link its folder may be called otherwise."""

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
    package's own files, when the package was imported: after a reload, other modules still hold what was there before.
    """
    if path not in _texts or (anew and not path.is_relative_to(PACKAGE)):
        _stamps[path] = _stamp(path)
        before, _texts[path] = _texts.get(path), path.read_text(encoding="utf-8")
        if before is not None:
            _reached.cache_clear()  # it may import others now
    return _texts[path]


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def made_by(*things, neutral: frozenset[str] = NEUTRAL) -> dict[str, dict[str, str]]:
    """What some functions or classes, or modules by name ("study.inputs"), are made of: {"modules": {name: hash},
    "versions": {library: version}}, everything that they import from masksae included, but for `neutral` modules.

    One from outside the package stands for its file, and not for others outside that it imports; one that was typed
    into a notebook, for its cells and for what it looks up by name. Of both count the values that they carry
    (`_Outside`). Raises CodeError where a file has changed since this process loaded it.
    """
    found, modules = _Outside(), []
    for thing in (thing for thing in things if not isinstance(thing, str)):
        found.visit(thing, asked=True)
    for path, name in _reached((*(thing for thing in things if isinstance(thing, str)), *found.files), neutral).items():
        modules.append((name, _hash(_unchanged(name, path))))
        found.libraries |= _parsed(remember(path))[1]
    modules += [("notebook", _hash(cell)) for cell in found.cells]
    modules += [("values", run_id(found.values))] if found.values else []
    libraries = found.libraries & LIBRARIES.keys()
    versions = {package: _version(package) for library in libraries for package in LIBRARIES[library]}
    return {"modules": _by_name(modules), "versions": dict(sorted(versions.items()))}


def imported(text: str) -> list[str]:
    """Modules of masksae that a source text imports, `from masksae import Run` among them.

    >>> imported("from masksae import Run; from masksae.study import stats")
    ['study.run', 'study.stats']
    """
    return sorted({module for name in _parsed(text)[0] for module, _ in _places(name)})


def joined(*found: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Several descriptions of code as one."""
    return {key: _by_name([pair for each in found for pair in each[key].items()]) for key in ("modules", "versions")}


def _by_name(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Values by name. Of those that share one, such as two files outside the package or two notebooks' cells, none is
    left out."""
    values: dict[str, list[str]] = {}
    for name, value in sorted({*pairs}):
        values.setdefault(name, []).append(value)
    return {name: some[0] if len(some) == 1 else run_id(some) for name, some in values.items()}


def code_id(*things) -> str:
    """Id of what `made_by` finds."""
    return run_id(made_by(*things))


class _Outside:
    """What functions, classes and objects consist of that go by no name of a module: `files`, those of the package
    among them; source of notebook `cells`; `values`, and top names of `libraries`.

    Values that count cannot be changed in place, as numbers, texts and tuples: a partial's arguments, defaults, what a
    closure holds, an object's attributes, and globals that typed code looks up. A list that a function fills is none.
    """

    def __init__(self):
        self.files, self.cells = dict[str, None](), dict[str, None]()
        self.values, self.libraries, self._seen = list[str](), set[str](), []

    def visit(self, thing, asked: bool = False) -> None:
        """Add a thing and all that it rests on. `asked`: it counts wherever its file is, else none of a library."""
        code = thing if isinstance(thing, (FunctionType, ModuleType, type)) else type(thing)
        file = _file(code)
        if isinstance(thing, _HOLDERS):
            held = ("func", "fget", "__func__", "__wrapped__")
            self.visit(next(getattr(thing, name) for name in held if hasattr(thing, name)), asked)
            for part in _parts(thing, typed=False):
                self.visit(part)
        elif file and file.is_relative_to(PACKAGE) and (asked or code is thing):
            self.files |= {str(file): None} if file.stem != "__init__" else {}
        elif file and not asked and any(map(file.is_relative_to, (PACKAGE, *_INSTALLED))):
            self.libraries |= {_module(code).partition(".")[0]}
            if code is not thing and type(thing).__hash__ and " at 0x" not in (told := repr(thing)):
                self.values.append(told)
        elif not any(thing is each for each in self._seen):
            self._seen.append(thing)
            if file and file.suffix == ".py":
                self.files[str(file)] = None
            elif not file and isinstance(thing, FunctionType):
                lines = linecache.getlines(thing.__code__.co_filename)
                self.cells |= {"".join(lines): None} if lines else {}
                self.values += [] if lines else _bytecode(thing.__code__)
            for part in _parts(thing, typed=file is None):
                self.visit(part)


_HOLDERS = (
    functools.partial, functools.cached_property, functools._lru_cache_wrapper, MethodType, property, classmethod,
    staticmethod,
)  # fmt: skip
"""Kinds of objects that stand for a function that they hold."""

_INSTALLED = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}


def _module(code) -> str:
    return code.__name__ if isinstance(code, ModuleType) else code.__module__ or ""


def _file(code) -> Path | None:
    """The file that holds a function or a class, or is a module; None for what was typed in."""
    if _module(code) in sys.builtin_module_names:
        return Path(sysconfig.get_path("stdlib")).resolve() / "builtins"
    file = getattr(sys.modules.get(_module(code)), "__file__", None)
    return Path(file).resolve() if file else None


def _parts(thing, typed: bool) -> Iterator:
    """What a thing from outside the package rests on besides its text."""
    if isinstance(thing, functools.partial):
        yield from (*thing.args, *sorted(thing.keywords), *(value for _, value in sorted(thing.keywords.items())))
    elif isinstance(thing, MethodType):
        yield thing.__self__
    elif isinstance(thing, type):
        yield from thing.__bases__
        yield from (each for each in vars(thing).values() if typed and _is_written(each))
    elif isinstance(thing, FunctionType):
        yield from (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        for cell in thing.__closure__ or ():
            with contextlib.suppress(ValueError):  # it holds nothing yet
                yield cell.cell_contents
        yield from _looked_up(thing) if typed else ()
    elif not isinstance(thing, (ModuleType, *_HOLDERS)):
        yield type(thing)
        for name, value in getattr(thing, "__dict__", {}).items():
            yield from (name, value)


def _is_written(each) -> bool:
    """Whether somebody wrote a method, and `dataclass` did not."""
    return isinstance(each, _HOLDERS) or (isinstance(each, FunctionType) and each.__code__.co_filename != "<string>")


def _looked_up(function: FunctionType) -> Iterator:
    """Globals that a function names, and what it names of the package's own folders of modules."""
    names = [*dict.fromkeys(_names(function.__code__))]
    for value in (function.__globals__[name] for name in names if name in function.__globals__):
        yield value
        if isinstance(value, ModuleType) and hasattr(value, "__path__") and _module(value).partition(".")[0] == NAME:
            yield from (getattr(value, name) for name in names if name in dir(value))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in (each for each in code.co_consts if isinstance(each, CodeType)):
        yield from _names(inner)


def _bytecode(code: CodeType) -> list[str]:
    """What a function does of which nobody has the source."""
    told = [code.co_code.hex()]
    for each in code.co_consts:
        told += _bytecode(each) if isinstance(each, CodeType) else [repr(each)]
    return told


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
def _reached(names: tuple[str, ...], neutral: frozenset[str]) -> dict[Path, str]:
    """File and name of each module that some modules, or files, can come to run, themselves included; imports inside
    functions count too. Those of masksae are imported here, so that what is edited from now on is not what runs."""
    found: dict[Path, str] = {}
    queue = [place for name in names for place in _places(name)]
    if len(queue) < len(names):
        raise ModuleNotFoundError(f"masksae has no module among {names} that is not a file.")
    while queue:
        name, path = queue.pop()
        if path not in found and name not in neutral:
            found[path] = name
            queue += [place for imported in _parsed(remember(path))[0] for place in _places(imported)]
            _load(name, path)
    return found


def _places(name: str) -> list[tuple[str, Path]]:
    """(module, file) of a dotted name inside the package, or of a file; of what a folder of modules names, the module
    where it is made; none for the folder's __init__, which only names."""
    path = Path(name)
    if not path.is_absolute():
        path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
        return [(name, path)] if path.is_file() else _places_behind(*name.rpartition(".")[::2])
    inside = path.is_relative_to(PACKAGE)
    return [(".".join(path.relative_to(PACKAGE).with_suffix("").parts) if inside else path.name, path)]


def _places_behind(folder: str, name: str) -> list[tuple[str, Path]]:
    if not PACKAGE.joinpath(*folder.split("."), "__init__.py").is_file():
        return []
    found = getattr(importlib.import_module(f"{NAME}.{folder}".rstrip(".")), name, None)
    package, _, module = getattr(found, "__module__", "").partition(".")
    return _places(module) if package == NAME else []


def _load(name: str, path: Path) -> None:
    if path.is_relative_to(PACKAGE):
        try:
            importlib.import_module(f"{NAME}.{name}")
        except ModuleNotFoundError as error:  # a library that is not installed: then it is not what runs
            if (error.name or "").startswith(NAME):
                raise


@functools.cache
def _parsed(text: str) -> tuple[set[str], set[str], str]:
    """Of a source text: dotted names inside the package that it imports anywhere, other packages that it imports, and
    what it does, in a form that its words, its layout and the version of Python do not change."""
    tree = ast.parse(text)
    names = {name for node in ast.walk(tree) for name in _imported(node)}
    ours = {name.partition(".")[2] for name in names if name.partition(".")[0] == NAME}
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


for _path in PACKAGE.rglob("[!.]*.py"):  # not what editors and file systems leave: .#a.py, ._a.py
    remember(_path)
