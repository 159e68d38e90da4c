"""Notebooks executed through papermill, without a trace of when and where: the same run gives the same bytes."""

import contextlib
import os
import sys
from pathlib import Path

from masksae.errors import ConfigError, nearest
from masksae.files import atomic_file, ensure_writable, write_text


def execute(source: Path, target: Path, parameters: dict, *, cwd: Path) -> Path:
    """Execute the notebook `source` into `target`. Progress goes to the terminal and not into the file; a notebook that
    fails is kept as TARGET.failed.ipynb. The kernel is this Python, whatever other one is registered under its name.
    Raises ConfigError for a notebook that is not there, and papermill's errors."""
    if not source.is_file():
        known = [path.stem for path in sorted(source.parent.glob("*.ipynb"))]
        raise ConfigError(f"There is no notebook {source}.{nearest(source.stem, known)}")
    import nbformat
    import papermill
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        def _kernel_spec_manager_default(self):
            return KernelSpecManager(kernel_dirs=[])  # leaves the native one

    failed = target.with_suffix(".failed.ipynb")
    ensure_writable(target.parent)
    shown = os.environ.get("MASKSAE_PROGRESS", "lines")
    with environment(PYTHONHASHSEED="0", MASKSAE_PROGRESS=shown, PYDEVD_DISABLE_FILE_VALIDATION="1"):
        papermill.execute_notebook(
            source, failed, parameters=parameters, cwd=cwd, kernel_name="python3", progress_bar=False,
            kernel_manager_class=Kernel, stdout_file=sys.stdout,
            # Jupyter interrupts a kernel before it ends it: an ERROR
            stderr_file=sys.stderr, extra_arguments=["--log-level=CRITICAL"],
        )  # fmt: skip
    write_text(target, nbformat.writes(without_times(nbformat.read(failed, as_version=4))))
    failed.unlink()
    return target


def save_markdown(notebook: Path, page: Path) -> Path:
    """Write an executed notebook as a markdown page, its pictures into a folder of the page's name beside it."""
    from nbconvert import MarkdownExporter

    body, found = MarkdownExporter().from_filename(str(notebook), resources={"output_files_dir": page.stem})
    for name, data in found["outputs"].items():
        with atomic_file(page.parent / name) as tmp:
            tmp.write_bytes(data)
    return write_text(page, body.replace("\r\n", "\n").strip() + "\n")


@contextlib.contextmanager
def environment(**values: str):
    """Environment variables for the processes started inside."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def without_times(notebook):
    """An executed notebook without what differs from run to run: times, paths, ids of papermill, progress bars."""
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    return notebook


def _is_progress(output) -> bool:
    """Whether an output is a progress bar or a message on stderr."""
    is_stderr = output.output_type == "stream" and output.name == "stderr"
    return is_stderr or "application/vnd.jupyter.widget-view+json" in output.get("data", {})
