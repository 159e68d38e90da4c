"""The lock, conda's file, pyproject and the code agree on the packages; the test command is the one the README
gives."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import masksae

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = {
    canonicalize_name(name): pin
    for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
}
OPTIONAL = PROJECT["optional-dependencies"]
EXTRAS = [Requirement(text) for name, group in OPTIONAL.items() for text in group if name != "live"]
LIVE = [Requirement(text) for text in OPTIONAL["live"]]  # for those who want them; tested in the peers' environment
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]


def test_every_line_of_the_lock_is_a_pin():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(LOCK) > 100


@pytest.mark.parametrize("requirement", REQUIRED + EXTRAS, ids=str)
def test_the_lock_meets_pyproject(requirement):
    assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier


def test_conda_takes_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    assert conda == ["python=3.11", "pip", "make"] and PROJECT["requires-python"] == ">=3.11"


def test_this_environment_is_the_locked_one():
    other = {name: version(name) for name in LOCK if version(name).split("+")[0] != LOCK[name]}
    assert not other


def test_what_the_code_imports_is_declared():
    names = {
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
        "IPython": "jupyter",
        "nbformat": "jupyter",
        "pyarrow": "datasets",
        "fsspec": "datasets",
    }
    imported = set()
    for path in [*ROOT.glob("masksae/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {module.split(".")[0] for module in modules}
    imported -= {"masksae", "peers", *sys.stdlib_module_names}
    peers = {
        canonicalize_name(line.partition("==")[0])
        for line in (ROOT / "requirements-peers.lock").read_text().splitlines()
    }
    compared = {"dictionary_learning", "sae_bench", "sae_lens", "transformer_lens"}  # in benchmarks
    assert compared < imported and {canonicalize_name(name) for name in compared} < peers
    imported -= compared
    declared = {canonicalize_name(r.name) for r in REQUIRED + EXTRAS + LIVE}
    assert {canonicalize_name(names.get(name, name)) for name in imported} <= declared


def test_public_names_have_examples_that_run():
    """Doctests (`--doctest-modules`); parts of a config are shown with the config, and what needs a download in the
    README."""
    elsewhere = {"MATRYOSHKA", "AuxK", "BatchTopK", "Gated", "JumpReLU", "ReLU", "TopK", "Profile", "Run", "load_model"}
    for name in set(masksae._HOME) - elsewhere:
        assert ">>>" in getattr(masksae, name).__doc__, name


def test_version_and_commands():
    assert masksae.__version__ == PROJECT["version"]
    assert "make test" in (ROOT / ".ci/run").read_text() and "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".github/workflows/test.yml").read_text()


def test_the_citation_and_the_changelog_name_this_version():
    newest = re.search(r"^## (\S+), (20\d\d-\d\d-\d\d|unreleased)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert "2604.06495" in citation["references"][0]["url"]


def test_what_starts_without_a_terminal_is_whole():
    """The container, the workspace and Binder take the lock; badges and the cells that install name one address."""
    workspace = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    dockerfile = (ROOT / ".devcontainer" / workspace["build"]["dockerfile"]).resolve().read_text()
    assert f" AS {workspace['build']['target']}\n" in dockerfile and "RUN make setup" in dockerfile
    assert f"useradd --create-home {workspace['remoteUser']} " in dockerfile
    [python] = set(re.findall(r"^FROM python:([\d.]+)", dockerfile, flags=re.MULTILINE))
    assert (ROOT / ".binder/runtime.txt").read_text().strip() == f"python-{python}"
    assert (ROOT / ".binder/requirements.txt").read_text().split("\n")[:2] == ["-r ../requirements.lock", "-e ."]
    badges = re.findall(r"(?:/github|/gh)/([\w-]+)/masksae/", (ROOT / "README.md").read_text())
    cells = [(ROOT / f"notebooks/{name}.ipynb").read_text() for name in ("00_mechanism", "10_explore")]
    assert len(badges) == 4 and {re.search(r"github\.com/([\w-]+)/masksae", cell)[1] for cell in cells} == {*badges}
