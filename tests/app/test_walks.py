"""The walks of CONTRIBUTING.md are short, and end where it happens: emptied, its tests fail, others do not."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WALKS = dict(re.findall(r"(?ms)^\* \*\*([^*]+\?)\*\* (.*?tests/\S+\.py`\.)", PAGE))
ELSEWHERE = {
    "core": "tests/core/test_masking.py",
    "data": "tests/data/test_families.py",
    "study": "tests/study/test_stats.py",
    "app": "tests/app/test_site.py::test_without_a_run_it_says_what_to_do",
}
"""Something quick of each room."""


def parts(walk: str) -> tuple[list[str], str, str]:
    """The files that a walk names, the function or class at its end, and the file of its tests."""
    quoted = re.findall("`([^`]+)`", walk)
    [name] = [each for each in quoted if each.isidentifier() and each != "Makefile"]
    return [each for each in quoted[:-1] if each != name], name, quoted[-1]


def end(files: list[str]) -> str:
    return [path for path in files if path.endswith(".py")][-1]


def test_every_path_exists():
    quoted = [
        path for line in PAGE.splitlines() for path in re.findall(r"`([\w./-]+/[\w./-]*|Makefile|[\w-]+\.yaml)`", line)
    ]
    assert len(quoted) > 15
    missing = [path for path in quoted if not (ROOT / path).exists()]
    tree = re.search(r"(?s)    masksae/ .*?\n\n", PAGE)[0]
    for line in tree.splitlines():
        if found := re.match(r"    (  )?([\w/]+/(?:, [\w/]+/)*) ", line):
            names = [("masksae/" if found[1] else "") + name for name in found[2].split(", ")]
            missing += [name for name in names if not (ROOT / name).is_dir()]
    rooms = {f"{path.name}/" for path in (ROOT / "masksae").iterdir() if (path / "__init__.py").exists()}
    assert not missing and all(f"      {room}" in tree for room in rooms)


def test_there_are_five_walks_of_at_most_three_files():
    assert len(WALKS) == 5
    for walk in WALKS.values():
        files, name, tests = parts(walk)
        assert 1 <= len(files) <= 3 and all((ROOT / path).exists() for path in [*files, tests])
        assert re.search(rf"^(def|class) {name}\b", (ROOT / end(files)).read_text(), re.MULTILINE), name


def emptied(code: str, name: str) -> str:
    """Code in which a function, or every method of a class, does nothing but raise."""
    tree = ast.parse(code)
    [found] = [node for node in tree.body if getattr(node, "name", None) == name]
    for node in [found] if isinstance(found, ast.FunctionDef) else found.body:
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse("raise RuntimeError('emptied')").body
    return ast.unparse(tree)


@pytest.mark.slow
@pytest.mark.parametrize("question", WALKS)
def test_a_walk_ends_where_it_happens(question, tmp_path):
    files, name, tests = parts(WALKS[question])
    shutil.copytree(ROOT / "masksae", tmp_path / "masksae", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / end(files)
    file.write_text(emptied(file.read_text(), name))
    others = [path for room, path in ELSEWHERE.items() if room != Path(tests).parts[1]]
    options = ["-q", "-m", "not slow", "--tb=no", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    done = subprocess.run(  # -P: the working folder, with the package as it is, is not looked into
        [sys.executable, "-P", "-m", "pytest", *options, tests, *others],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    broken = re.findall(r"^(?:FAILED|ERROR) (\S+?)(?:::|\s|$)", done.stdout, re.MULTILINE)
    assert {*broken} == {tests}, done.stdout[-3000:] + done.stderr
    assert " passed" in done.stdout
