"""What `pip install masksae` gives: an sdist from which the same wheel can be built, and a wheel that works outside a
clone with its own dependencies alone."""

import importlib.metadata as metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages

import masksae

ROOT = Path(__file__).resolve().parents[2]
NEVER = shutil.ignore_patterns("__pycache__", "*.egg-info")
AT_THE_TOP = shutil.ignore_patterns(
    ".git", ".venv*", "build", "results", "figures", ".dvc", ".pytest_cache", ".hypothesis"
)


def kept_out(folder: str, names: list[str]) -> set[str]:
    """What a copy of the tree leaves out; the package has a folder `figures` of its own."""
    return NEVER(folder, names) | (AT_THE_TOP(folder, names) if Path(folder) == ROOT else set())


def build(source: Path, target: Path, kind: str) -> Path:
    """A distribution of a source tree, by pyproject.toml's build backend."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(target)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return target / result.stdout.split()[-1]


def package_files() -> list[Path]:
    """Every file of the package, relative to the root."""
    found = (ROOT / "masksae").rglob("*")
    return [path.relative_to(ROOT) for path in found if path.is_file() and "__pycache__" not in path.parts]


def test_every_folder_and_file_of_the_package_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = package_files()
    assert {".".join(file.parent.parts) for file in files} == {
        *find_namespace_packages(ROOT, **declared["packages"]["find"])
    }
    data = {file for file in files if file.suffix != ".py"}
    told = {
        path.relative_to(ROOT)
        for package, patterns in declared["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert data == told


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, folder / "tree", ignore=kept_out)
    sdist = build(folder / "tree", folder, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [source] = (folder / "unpacked").iterdir()
    whole = {
        "tests",
        "notebooks",
        "docs",
        "benchmarks",
        "tools",
        "Makefile",
        "dvc.yaml",
        "requirements.lock",
        "CHANGELOG.md",
    }
    assert whole <= {path.name for path in source.iterdir()}
    return build(source, folder, "wheel")


@pytest.mark.slow
def test_the_wheel_holds_the_files_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(file) for file in package_files()}
    assert wheel.name == f"masksae-{masksae.__version__}-py3-none-any.whl" and wheel.stat().st_size < 400_000


def needed(requirements) -> set[str]:
    """Names of the distributions that these requirements bring, and theirs, extras left out."""
    found, queue = set(), [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            try:
                queue += [Requirement(text) for text in metadata.requires(name) or ()]
            except metadata.PackageNotFoundError:
                continue  # for another system
            found.add(name)
    return found


BLOCK = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: not to be found
sys.path.insert(0, {site!r})
"""

LIBRARY = """
import torch, masksae
assert masksae.__file__.startswith({site!r})
for name in masksae.__all__:
    getattr(masksae, name)
for name in masksae._HOME.values():
    __import__(name)
from masksae.metrics import absorption, contexts, perturbation, probes, reconstruction, sparse_probing
x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
stream = masksae.ActivationStream.from_array(x, batch_size=100, seed=0)
config = masksae.SAEConfig(16, 64, masksae.BatchTopK(4))
[sae] = masksae.train([config], stream, masksae.TrainConfig(60, warmup=5, threshold_start=20), \
checkpoint_dir="kept", progress=False)
sae.save("own"); sae.to_saelens("saelens"); sae.to_dictionary_learning("dl")
from masksae.export import load_sae
assert all(torch.equal(load_sae(f).W_dec, sae.W_dec) for f in ("own", "saelens", "dl"))
assert 0 < masksae.metrics.explained_variance(x, sae(x)) < 1
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, \
num_hidden_layers=2, num_attention_heads=2))
from masksae.tracing import activations
assert activations(model, torch.zeros(2, 5, dtype=torch.int64), block=0).shape == (2, 5, 16)
from masksae.app import cli
assert cli.main(["plan", "smoke"]) == 0
assert cli.main(["export", "own", "again", "--to", "masksae", "--json"]) == 0
"""


def outside(wheel, tmp_path, code: str):
    """Run code with the unpacked wheel, and nothing importable but what it depends on, far from the clone."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    [requirements] = [path for path in site.glob("*.dist-info/METADATA")]
    listed = metadata.Distribution.at(requirements.parent).requires
    wanted = needed(text for text in listed if "extra ==" not in text)
    owners = metadata.packages_distributions()
    blocked = {m for m, names in owners.items() if not {canonicalize_name(n) for n in names} & wanted} - {"masksae"}
    assert {"matplotlib", "dvc", "jupyter_client", "pytest", "gguf"} <= blocked and not {"torch", "nnsight"} & blocked
    values = {"site": str(site), "blocked": sorted(blocked)}
    (tmp_path / "empty").mkdir()
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(**values) + code.format(**values)],
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path / "home"), "MASKSAE_CACHE": str(tmp_path / "cache")},
    )


@pytest.mark.slow
def test_the_library_needs_only_its_own_dependencies(wheel, tmp_path):
    result = outside(wheel, tmp_path, LIBRARY)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Space:" in result.stdout and '"folder": "again"' in result.stdout


@pytest.mark.slow
def test_what_needs_an_extra_names_it(wheel, tmp_path):
    code = "import sys\nfrom masksae.app import cli\nsys.exit(cli.main(['evaluate', 'nowhere']))"
    result = outside(wheel, tmp_path, code)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "masksae: This needs matplotlib, seaborn, not installed here." in result.stderr
    assert "pip install 'masksae[evaluate]'" in result.stderr and "Traceback" not in result.stderr
