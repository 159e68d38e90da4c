"""The documents' own profile, as a reader would run it: every notebook, in their order, on a model that takes
seconds."""

import re
from pathlib import Path

import pytest
import yaml
from tiny_project import make_reader_project

from masksae import Run
from masksae.app.notebooks import execute
from masksae.files import read_json
from masksae.study import own_sae

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = dict(re.findall(r": (\w+) -->\n```python\n(.*?)```", (ROOT / "docs/own.md").read_text(), re.DOTALL))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A project with a model, text and tasks, and a cache: profiles share what is made of these alone."""
    folder = tmp_path_factory.mktemp("own")
    make_reader_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKSAE_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MASKSAE_PROGRESS", "none")
        patch.chdir(folder)
        yield folder


def written(folder: Path, pairs: int) -> Path:
    """The profile of docs/own.md with another model, text and sizes, and tasks that lie beside it."""
    [text] = re.findall(r"```yaml\n(name: mine.*?)```", (ROOT / "docs/own.md").read_text(), re.DOTALL)
    profile = yaml.safe_load(text) | {"name": f"mine{pairs}"}
    profile["model"] |= {"source": "model", "mask_token": "<mask>", "bos_token": "<bos>"}
    profile["text"] |= {"sources": ["text.jsonl"], "train_tokens": 24_000}
    profile["training"] = {"batch_size": 256}
    for grid in profile["saes"]:
        grid |= {"selection": grid["selection"] | {"k": 8}, "n_latents": 128}
    profile["blocks"] = [{"pairs": list(range(pairs))}]
    tables = [f"{name}.csv" for name in ("task", "second", "third")]
    profile["probing"] = {"tasks": tables[:1], "shifted": ["task_OOD.csv"], "train": 120, "test": 80}
    profile["perturbation"] = {"groups": {"letters": tables}, "train": 60, "test": 40}
    path = folder / f"mine{pairs}.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [1, 2])
def test_every_notebook_runs(folder, pairs):
    path = written(folder, pairs)
    for notebook in NOTEBOOKS:
        execute(notebook, folder / "build" / path.stem / notebook.name, {"profile": path.name}, cwd=folder)
    claims = read_json(folder / "results" / path.stem / "claims.json")
    assert list(claims) == ["C1", "C2", "C3", "C4", "C5", "R"] and claims["C5"]["pairs"] == pairs
    assert all(row["verdict"] != "not measured" for key, row in claims.items() if key != "C4")


@pytest.mark.slow
def test_an_sae_of_ones_own_is_scored_as_the_page_says(folder):
    """On the activations and tasks of the same profile."""
    path = written(folder, 1)
    Run(path).saes["kept-batchtopk20-s0"].to_saelens(folder / "MY_SAE")
    names = {}
    exec(EXAMPLES["own"].replace("laptop", path.name), names)
    assert {metric: len(rows) for metric, rows in names["rows"].items()} == {"reconstruction": 2, "absorption": 2}
    assert not own_sae.failed(names["rows"])
