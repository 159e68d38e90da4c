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


def test_short_work_says_nothing_in_a_pipe():
    assert piped() and subprocess.run(
        [sys.executable, "-c", WORK.replace('"lines": 0.2', '"lines": 30')], capture_output=True
    ).stderr in (b"", b"\n")


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
