"""The committed notebooks: stripped, with stable ids, one parameter, no code that belongs into the module, and a checked number."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

FILES = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


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


def test_jupyterlab_saves_without_outputs():
    """The hook of jupyter_server_config.py on a notebook as JupyterLab hands it over."""
    settings = SimpleNamespace(ContentsManager=SimpleNamespace())
    exec((FILES[0].parents[1] / "jupyter_server_config.py").read_text(), {"get_config": lambda: settings})
    clean = nbformat.read(FILES[0], as_version=4)
    ran = nbformat.read(FILES[0], as_version=4)
    for number, cell in enumerate(code(ran)):
        cell.execution_count = number + 1
        cell.outputs = [nbformat.v4.new_output("stream", text="ran")]
    settings.ContentsManager.pre_save_hook(model={"type": "notebook", "content": ran}, path="x", contents_manager=None)
    assert nbformat.writes(ran) == nbformat.writes(clean)
    settings.ContentsManager.pre_save_hook(model={"type": "file", "content": "x"}, path="x", contents_manager=None)
