"""Progress in a terminal, in a pipe and in a notebook: real processes, a real pseudo-terminal."""

import os
import subprocess
import sys

import pytest

from masksae import progress
from masksae.errors import ConfigError

WORK = """
import time
from masksae import progress
progress.SECONDS = {"bar": 0.01, "lines": 0.2}
for _ in progress.bar(range(50), label="scoring SAEs", unit="SAEs"):
    time.sleep(0.012)
"""


@pytest.fixture(autouse=True)
def default_style(monkeypatch):
    monkeypatch.delenv("MASKSAE_PROGRESS", raising=False)


def piped(**environment) -> str:
    result = subprocess.run([sys.executable, "-c", WORK], capture_output=True, env=os.environ | environment)
    assert result.returncode == 0 and result.stdout == b""
    return result.stderr.decode()


def test_a_pipe_gets_few_whole_lines():
    lines = piped().split("\n")
    assert 2 <= len(lines) - 1 <= 6 and lines[-1] == "" and not any("\r" in line for line in lines)
    assert lines[-2].startswith("scoring SAEs: 100 % (50 of 50 SAEs), ") and lines[-2].endswith(" left")
    assert all(len(line) <= 80 for line in lines) and len(set(lines)) == len(lines)


def test_a_bar_inside_a_bar_leaves_no_control_characters_in_a_pipe():
    inner = (
        "time.sleep(0.012)\n    for _ in progress.bar(range(9), label='activations', unit='batches'): time.sleep(0.03)"
    )
    result = subprocess.run(
        [sys.executable, "-c", WORK.replace("time.sleep(0.012)", inner).replace("range(50)", "range(4)")],
        capture_output=True,
    )
    said = result.stderr.decode()
    assert result.returncode == 0 and "activations:" in said and "scoring SAEs:" in said
    assert said.replace("\n", "").isprintable() and all(line.endswith(" left") for line in said.splitlines())


def test_many_short_bars_in_a_pipe_are_one_line_at_once_and_then_one_now_and_then():
    """As in `evaluate`, where no bar lasts and all together take half a minute."""
    short = (
        "for _ in range(30):\n"
        "    for _ in progress.bar(range(2), label='activations', unit='batches'): time.sleep(0.01)"
    )
    code = WORK[: WORK.index("for _ in")] + short
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()
    assert 3 <= len(lines) <= 6 and lines[0] == "activations:   0 % (0 of 2 batches), 00:00 gone, ? left"


def test_a_closed_stderr_is_silent():
    done = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "$0" 2>&-', WORK], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_bars_inside_bars_do_not_pile_up_in_a_notebook():
    """A real kernel: widgets that are overwritten, and no text with cursor movements."""
    import nbformat
    from nbclient import NotebookClient

    code = WORK.replace(
        "time.sleep(0.012)", "[time.sleep(0.01) for _ in progress.bar(range(3), label='activations', unit='b')]"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code.replace("range(50)", "range(3)"))])
    environment = {key: value for key, value in os.environ.items() if key != "MASKSAE_PROGRESS"}
    NotebookClient(book, kernel_name="python3").execute(env=environment)
    outputs = book.cells[0].outputs
    assert not [output for output in outputs if output.output_type in ("stream", "error")]
    shown = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.data]
    assert len(shown) == len(outputs) >= 1


def test_a_terminal_gets_one_moving_line():
    import fcntl
    import pty
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", WORK], stderr=side, stdout=side)
    os.close(side)
    said = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        said += piece
    os.close(main)
    assert child.wait() == 0 and said.count(b"\n") == 1 and said.count(b"\r") > 5
    assert b"scoring SAEs: 100%" in said and b"50/50" in said


def test_the_environment_decides():
    assert piped(MASKSAE_PROGRESS="none") == ""
    assert "\r" in piped(MASKSAE_PROGRESS="bar")


def test_an_unknown_style_is_refused(monkeypatch):
    monkeypatch.setenv("MASKSAE_PROGRESS", "bars")
    with pytest.raises(ConfigError, match="MASKSAE_PROGRESS is 'bars'. Did you mean 'bar'"):
        progress.bar([], label="x", unit="y")
