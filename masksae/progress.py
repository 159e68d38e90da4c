"""One progress bar for all long work: moving in a terminal and in a notebook, now and then a line in a log or a pipe.

`MASKSAE_PROGRESS` overrides what is found: "bar", "lines" (one at once, then one every ten seconds, whichever bar is at
work) or "none".
"""

import contextlib
import importlib.util
import math
import os
import sys
import time

from masksae.errors import ConfigError, nearest

STYLES = ("bar", "lines", "none")
SECONDS = {"bar": 0.5, "lines": 10.0}
"""Between two updates."""


class _Lines:
    """Where tqdm writes when nothing can be overwritten: whole lines, seldom, of all bars together, and the end of a
    bar that was seen."""

    said = -math.inf
    """When any bar spoke last."""

    def __init__(self):
        self.last = ""

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip("\r\n ")  # an inner bar moves the cursor up
        now = time.monotonic()
        if text and text != self.last and (now - _Lines.said >= SECONDS["lines"] or (self.last and ": 100 %" in text)):
            self.last, _Lines.said = text, now
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def say(text: str) -> None:
    """A line on stderr about what begins now, unless MASKSAE_PROGRESS is "none"."""
    if style() != "none":
        print(text, file=sys.stderr, flush=True)


def style() -> str:
    """How progress is shown here. Raises ConfigError for an unknown MASKSAE_PROGRESS."""
    chosen = os.environ.get("MASKSAE_PROGRESS")
    if chosen:
        if chosen not in STYLES:
            raise ConfigError(f"MASKSAE_PROGRESS is {chosen!r}.{nearest(chosen, STYLES)}")
        return chosen
    if sys.stderr is None:  # it was closed
        return "none"
    return "bar" if sys.stderr.isatty() or _in_notebook() else "lines"


def bar(items=None, *, total: int | None = None, label: str | None, unit: str, initial: int = 0):
    """A tqdm bar over `items`, or one to be updated by hand; no bar without a label.

    >>> list(bar([1, 2], label=None, unit="batch"))
    [1, 2]
    """
    look = style()
    tqdm = _tqdm(look)
    options = {
        "total": total,
        "desc": label,
        "unit": unit,
        "initial": initial,
        "disable": label is None or look == "none",
    }
    if look == "lines":
        shown = "{desc}: {percentage:3.0f} % ({n_fmt} of {total_fmt} {unit}), {elapsed} gone, {remaining} left"
        return tqdm(items, **options, file=_Lines(), bar_format=shown, mininterval=min(0.5, SECONDS[look]))
    # one inside another goes when it is done
    return tqdm(items, **options, mininterval=SECONDS["bar"], dynamic_ncols=True, leave=None)


def _tqdm(look: str):
    """The kind of bar: a notebook cannot move a cursor, so that text bars inside each other would pile up there."""
    if look == "bar" and _in_notebook() and importlib.util.find_spec("ipywidgets"):
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm
    return tqdm


@contextlib.contextmanager
def only_ours():
    """Without the bars that `datasets` draws of its own accord, in pipes and logs too."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _in_notebook() -> bool:
    """Whether this is a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    return bool(shell and hasattr(shell.get_ipython(), "kernel"))
