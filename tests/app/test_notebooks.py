"""The committed notebooks: stripped, with stable ids, one parameter, no code that belongs into the module, and a
checked number."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIG = ROOT / "notebooks/jupyter_server_config.py"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def notebook(request):
    book = nbformat.read(request.param, as_version=4)
    nbformat.validate(book)
    book.number = request.param.stem[:2]
    return book


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_git_filter_leaves_them_as_they_are(path):
    command = [sys.executable, "-m", "nbstripout", "--keep-id"]
    stripped = subprocess.run(command, stdin=path.open("rb"), capture_output=True, check=True).stdout
    assert stripped == path.read_bytes()


def test_stripped(notebook):
    for cell in code(notebook):
        assert not cell.outputs and cell.execution_count is None
    assert [cell.id for cell in notebook.cells] == [f"{notebook.number}-{i:02d}" for i in range(len(notebook.cells))]
    assert notebook.metadata.kernelspec.name == "python3"


def test_one_parameter_whose_default_ci_can_run(notebook):
    tagged = [cell.source for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == ['profile = "smoke"']


def test_begins_with_why_and_checks_a_number(notebook):
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(f"# {notebook.number} ")
    assert any(cell.source.startswith(("assert", "for row")) or "\nassert" in cell.source for cell in code(notebook))
    assert any("save_figure" in cell.source for cell in code(notebook))


def test_short_cells_without_functions(notebook):
    for cell in code(notebook):
        assert len(cell.source.splitlines()) <= 15
        assert not [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]


@pytest.fixture
def server(tmp_path):
    """A real Jupyter server with this project's settings in a git repository of one notebook; a function that asks its
    contents API."""
    shutil.copy(FILES[0], tmp_path / "a.ipynb")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "a.ipynb"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
    command = [sys.executable, "-m", "jupyter_server", "--allow-root", "--no-browser", "--ServerApp.ip=127.0.0.1"]
    command += [f"--config={CONFIG}", "--IdentityProvider.token=secret", f"--ServerApp.root_dir={tmp_path}"]
    places = {f"JUPYTER_{kind}_DIR": str(tmp_path / ".git" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    log = tmp_path / ".git" / "server.log"
    process = subprocess.Popen(command, env=os.environ | places, stderr=log.open("w"))

    def ask(method: str, path: str, value=None):
        [address] = set(re.findall(r"http://127.0.0.1:\d+", log.read_text()))  # another port where one is taken
        head = {"Authorization": "token secret", "Content-Type": "application/json"}
        data = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(f"{address}/api/{path}", data, head, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    try:
        for _ in range(300):  # it says where it is before it listens there
            with contextlib.suppress(ValueError, OSError):
                ask("GET", "status")
                break
            time.sleep(0.1)
        yield ask
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_jupyterlab_saves_without_outputs(server, tmp_path):
    """Saved as JupyterLab does it, after a run; the file on the disk has the bytes of the commit."""
    model = server("GET", "contents/a.ipynb?content=1")
    for number, cell in enumerate(cell for cell in model["content"]["cells"] if cell["cell_type"] == "code"):
        cell["execution_count"] = number + 1
        cell["metadata"] |= {"trusted": True, "execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"}}
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "ran"}]
    model["content"]["metadata"]["language_info"] = {"name": "python", "version": "3.11.7", "file_extension": ".py"}
    sent = {"type": "notebook", "format": "json", "content": model["content"]}
    assert server("PUT", "contents/a.ipynb", sent)["writable"]
    assert (tmp_path / "a.ipynb").read_bytes() == FILES[0].read_bytes()
    kept = server("GET", "contents/a.ipynb?content=1")["content"]
    assert all(not cell["outputs"] for cell in kept["cells"] if cell["cell_type"] == "code")
    changed = subprocess.run(["git", "-C", tmp_path, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    assert changed.stdout == b""
    server("PUT", "contents/text.txt", {"type": "file", "format": "text", "content": "x"})
    assert (tmp_path / "text.txt").read_text() == "x"
