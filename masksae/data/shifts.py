"""Shifts of a probing task's test texts: what a profile may write under `probing.shifted`.

"5_hist_fig_ismale_OOD"                   a published pair: trained on 5_hist_fig_ismale, tested on all rows of this table
"vader-film -> vader-tweets"              another table: trained on the first, tested on rows of the second
"92_glue_sst2 -> typos", "... -> upper case"   the task's own test texts, changed in a way that leaves the label alone
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from masksae.errors import ConfigError

TYPO_SHARE = 0.25


def typos(text: str) -> str:
    """Two neighbouring inner letters swapped in a quarter of the words of four letters or more; the same text, the same typos.

    >>> typos("These words are spelt correctly, aren't they?")
    "These words are spelt correctly, aren't thye?"
    """
    draw = random.Random(hashlib.sha256(text.encode()).digest())
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) >= 4 and draw.random() < TYPO_SHARE:
            at = draw.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


CHANGES: dict[str, Callable[[str], str]] = {"typos": typos, "upper case": str.upper}


@dataclass(frozen=True)
class Shift:
    """Where probes are trained and tested."""

    family: str
    """"ood" (published sets, which decide C3), "domain" or "invariance"."""
    task: str
    table: str | None = None
    """Of the test rows; None: the task's own."""
    change: Callable[[str], str] | None = None

    @classmethod
    def parse(cls, text: str) -> "Shift":
        """From the form above. Raises ConfigError."""
        task, arrow, target = (part.strip() for part in text.partition("->"))
        if arrow:
            if target in CHANGES:
                return cls("invariance", task, change=CHANGES[target])
            return cls("domain", task, table=target)
        if "_OOD" not in task:
            raise ConfigError(
                f"probing.shifted: {text!r} names no training task. Write NAME_OOD, 'TASK -> TABLE', or 'TASK -> {' | '.join(CHANGES)}'."
            )
        return cls("ood", task.replace("_OOD", ""), table=task)
