"""The guide to a model of one's own: stripped, run on a tiny local model, and its committed page is of this very
notebook."""

import random
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from tiny_project import byte_tokenizer, tiny_model

from masksae.app.notebooks import execute, save_markdown

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs/own_model.ipynb"
WORDS = "the cat sat on a mat while seven dogs ran past it and nobody saw them in the garden".split()


def test_stripped_with_short_cells():
    command = [sys.executable, "-m", "nbstripout", "--keep-id"]
    assert subprocess.run(command, stdin=GUIDE.open("rb"), capture_output=True, check=True).stdout == GUIDE.read_bytes()
    for cell in nbformat.read(GUIDE, as_version=4).cells:
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 20


def test_it_runs_on_another_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    draw = random.Random(0)
    lines = (f'{{"text": "{" ".join(draw.choices(WORDS, k=60))}"}}\n' for _ in range(6000))
    (tmp_path / "text.jsonl").write_text("".join(lines))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    parameters = {
        "source": "model", "block": 1, "bos_token": "<bos>", "text": ["text.jsonl"], "train_tokens": 6400,
        "n_latents": 64, "batch_size": 128, "epochs": 2,
    }  # fmt: skip
    execute(GUIDE, tmp_path / "run/own_model.ipynb", parameters, cwd=tmp_path)
    page = save_markdown(tmp_path / "run/own_model.ipynb", tmp_path / "own-model.md").read_text()
    pictures = re.findall(r"!\[png\]\((own-model/\S+\.png)\)", page)
    assert len(pictures) == 2 and all((tmp_path / picture).stat().st_size > 9000 for picture in pictures)
    assert (tmp_path / "report/report.html").exists() and (tmp_path / "kept-sae/sae_weights.safetensors").exists()


def test_the_page_is_of_this_notebook():
    page = (ROOT / "docs/own-model.md").read_text()
    for cell in nbformat.read(GUIDE, as_version=4).cells:
        assert cell.source in page, cell.id
    assert all((ROOT / "docs" / name).exists() for name in re.findall(r"!\[png\]\((\S+)\)", page))
    assert str(Path.home()) not in page and "Traceback" not in page
