"""How a command ends: its exit status, and one line on stderr for what goes wrong on purpose."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading

from masksae.errors import MasksaeError


class Stopped(KeyboardInterrupt):
    """A signal that asks to end: the same way out as Ctrl-C, with a status of its own."""

    def __init__(self, number: int):
        self.status = 128 + number


def exit_status(work, debug: bool = False) -> int:
    """Do `work()` as a command does it, and give its exit status: what goes wrong on purpose is one line on stderr."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without our dashes and arrows
    try:
        with stopped_by_signals():
            status = work() or 0
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()
            return status
    except MasksaeError as error:
        if debug:
            raise
        print(f"masksae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("masksae: interrupted; what was finished is kept, and the same command goes on.", file=sys.stderr)
        return getattr(stop, "status", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_output()
        return 0
    except OSError as error:
        if not debug and isinstance(error, PermissionError) and error.filename:
            what = f"{error.filename} is closed to this user. Change its permissions, or name another place."
            print(f"masksae: {what}", file=sys.stderr)
            return 2
        if debug or error.errno != errno.ENOSPC:
            raise
        _drop_output()
        print("masksae: the disk is full. Free some space; what was finished is kept.", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Python would try once more on its way out, and complain."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stopped_by_signals():
    """SIGTERM and SIGHUP raise Stopped inside, so that the way out ends children; one that is ignored (nohup) stays
    ignored."""

    def stop(number, _):
        raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
