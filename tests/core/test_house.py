"""Who may import whom: app -> study -> (metrics, training, data, core). No arrow back, and no circle.

An import is counted wherever it stands, and so is a string that is nothing but the name of a module, which `importlib`
or a job may be given. The table of lazy names in masksae/__init__.py is the one exception.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import masksae

PACKAGE = Path(masksae.__file__).parent
WINGS = ("saes", "training", "metrics", "data", "study", "app")
LIBRARY = {"core", "saes", "training", "metrics", "data"}
FORBIDDEN = {room: {"study", "app"} for room in LIBRARY} | {"study": {"app"}}
FORBIDDEN["metrics"] |= {"training", "data"}  # arrays in, scores out
FORBIDDEN["saes"] |= {"training", "data"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def wing(module: str) -> str:
    if module == "masksae.__main__":
        return "app"  # `python -m masksae`
    second = f"{module}.".split(".")[1]
    return second if second in WINGS else "core"


def imported(node) -> list[str]:
    """Modules of masksae that a piece of code imports or names, by their own names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in MODULES]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        home = (
            [masksae._HOME.get(alias.name) for alias in node.names] if node.module == "masksae" else [None] * len(names)
        )
        return [found for name, lazy in zip(names, home) if (found := lazy or _module(name)) in MODULES]
    if isinstance(node, ast.Constant) and re.fullmatch(r"masksae(\.\w+)+(:\w+)?", str(node.value)):
        return [found for found in [_module(node.value.partition(":")[0])] if found != "masksae"]
    return []


def _module(name: str) -> str:
    """The module that a dotted name lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def at_import(tree):
    """Nodes that run when a module is imported: not those inside functions, nor those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "masksae"])
def test_arrows_go_one_way(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    forbidden = FORBIDDEN.get(wing(module), set())
    arrows = {(node.lineno, each) for node in ast.walk(tree) for each in imported(node) if wing(each) in forbidden}
    assert not arrows, f"{module} is of {wing(module)} and knows {sorted(arrows)}"


def test_there_is_no_circle():
    """What a module imports at its top can be imported before it."""
    graph = {}
    for name, path in MODULES.items():
        nodes = at_import(ast.parse(path.read_text(encoding="utf-8")))
        graph[name] = {each for node in nodes if not isinstance(node, ast.Constant) for each in imported(node)} - {name}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_planted_arrows_are_seen():
    code = """
from masksae import Run
def f():
    import masksae.app.cli
    from masksae.study import figures
    from masksae.study.run import Run as R, train_group
    jobs.Job("a", "masksae.study.run:train_group")
    importlib.import_module("masksae.app.plan")
    print("run python -m masksae.app.repro")
"""
    found = sorted(each for node in ast.walk(ast.parse(code)) for each in imported(node))
    assert found == ["masksae.app.cli", "masksae.app.plan", "masksae.study.figures", *["masksae.study.run"] * 4]
    assert [wing(name) for name in ("masksae.masking", "masksae.saes.sae", "masksae.app.cli")] == [
        "core",
        "saes",
        "app",
    ]
