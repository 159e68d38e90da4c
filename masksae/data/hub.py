"""Rows of a hub data set, streamed: only what is read is downloaded, and a break loses and repeats no row; and some
files of a folder of a hub repository.

A data set is a list of shards at one commit, and a position in it is two integers: shard and row. After a time-out, an
error of the server or bytes that cannot be decoded, the shard is opened again and read up to the position, after a
pause that grows; a shard that fails again and again without a new row ends the run with its name, and the next run goes
on there. `datasets` does the reading, so that every format it knows works, zstandard JSON lines of many gigabytes and
Parquet alike; a folder in the form of a hub repository may stand in for the hub.
"""

import glob
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from masksae.errors import ConfigError, SourceError

PREFIX = "hub:"

PAUSES = (1, 2, 4, 8, 15, 30, 60, 60)
"""Seconds before each new attempt; a new row begins the list again."""

TABLE = 1000
"""Rows that are decoded at a time."""


BUGS = (AttributeError, NameError, TypeError)
"""Errors that another attempt does not mend."""


def folder(address: str, names: Collection[str]) -> Path:
    """The folder of "owner/name[/path][@revision]", a repository of models, in the hub's cache, with those of `names`
    that it has; nothing else is downloaded but a config.json of the folder above. Raises ConfigError, SourceError."""
    from huggingface_hub import snapshot_download

    place, _, revision = address.partition("@")
    owner, _, rest = place.strip("/").partition("/")
    name, _, path = rest.partition("/")
    if not owner or not name:
        raise ConfigError(f"{PREFIX}{address} names no repository. Expected {PREFIX}owner/name[/path][@revision].")
    wanted = [*(Path(path, file) for file in names), Path(path).parent / "config.json"]
    patterns = [glob.escape(file.as_posix()) for file in wanted]
    try:
        root = snapshot_download(f"{owner}/{name}", revision=revision or None, allow_patterns=patterns)
    except BUGS:
        raise
    except Exception as error:  # the many kinds of the network and the hub's client
        raise SourceError(
            f"{PREFIX}{address} cannot be fetched ({type(error).__name__}: {str(error).strip().splitlines()[0]}). "
            "Check the name, the revision, the network and HF_TOKEN, or use a local copy."
        ) from error
    found = Path(root, path)
    weights = [file for file in names if not file.endswith(".json")]
    if not any((found / file).is_file() for file in weights):
        raise SourceError(
            f"{PREFIX}{address} has none of {', '.join(weights)}. Name the folder of one SAE, such as "
            f"{PREFIX}{owner}/{name}/path."
        )
    return found


@dataclass(frozen=True)
class Shard:
    """One file of a data set, at one commit."""

    url: str
    form: str
    """The reader of `datasets` that takes it: "json", "parquet", ..."""
    size: int | None
    """Bytes."""
    version: str
    """sha256 of the hub's records, else time of change: other content has another version."""

    def to_dict(self) -> dict:
        return asdict(self)


def shards(name: str, split: str = "train", revision: str | None = None) -> list[Shard]:
    """The files of a hub data set in their order, all of one commit. Raises SourceError."""
    import datasets

    def look() -> list[Shard]:
        builder = datasets.load_dataset_builder(name, revision=revision)
        files = (builder.config.data_files or {}).get(split)
        if not files:
            known = ", ".join(map(str, builder.config.data_files or {})) or "none that can be streamed"
            raise SourceError(f"{name} has no files of a split {split!r}; found {known}. Name one with #split=NAME.")
        return [_shard(str(url), _form(builder)) for url in files]

    return _patiently(look, f"{name} (its list of shards)", local=name.startswith(("/", ".")))


def unchanged(before: list[dict]) -> list[Shard]:
    """The shards of which a stream was begun, at the commit of then. Raises SourceError naming those that are missing
    or changed."""
    found = [Shard(**record) for record in before]
    missing, changed = [], []
    for shard in found:
        try:
            now = _patiently(lambda shard=shard: _shard(shard.url, shard.form), shard.url, "://" not in shard.url)
        except SourceError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            missing.append(shard.url)
        else:
            changed += [shard.url] if now != shard else []
    if missing or changed:
        told = [
            f"{len(urls)} {kind}: {', '.join(urls[:5])}"
            for kind, urls in (("missing", missing), ("changed", changed))
            if urls
        ]
        raise SourceError(
            f"The text is not what it was when its reading began; shards {'; '.join(told)}. "
            "Bring them back, or delete what was read (the folder *.parts in the cache) and begin again."
        )
    return found


def _shard(url: str, form: str) -> Shard:
    """A shard as it is now."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    info = system.info(path)
    version = (info.get("lfs") or {}).get("sha256") or info.get("blob_id") or info.get("mtime") or ""
    return Shard(url, form, info.get("size"), str(version))


def _form(builder) -> str:
    """Name of a builder's reader, such as "parquet"; a data set that needs code of its own has none and is refused."""
    known = [kind.__module__.split(".")[2] for kind in type(builder).__mro__ if "packaged_modules" in kind.__module__]
    if not known:
        raise SourceError(
            f"{builder.dataset_name} needs code of its own to be read, which is never run. Use another copy."
        )
    return known[0]


def rows(found: list[Shard], start: tuple[int, int] = (0, 0)) -> Iterator[tuple[dict, tuple[int, int]]]:
    """(row, position after it) from a position on: the same rows in the same order, whatever broke on the way. Raises
    SourceError."""
    for number in range(start[0], len(found)):
        done, failures, shard = (start[1] if number == start[0] else 0), 0, found[number]
        while True:
            try:
                for row in _shard_rows(shard, done):
                    done, failures = done + 1, 0
                    yield row, (number, done)
                break
            except (SourceError, GeneratorExit, *BUGS):
                raise
            except Exception as error:  # the many kinds of the network, the hub's client and the decoders
                failures += 1
                _wait(error, failures, f"shard {shard.url}, row {done}", local="://" not in shard.url)


def _shard_rows(shard: Shard, start: int) -> Iterator[dict]:
    """Rows of a shard from one on."""
    import datasets

    data = datasets.load_dataset(shard.form, data_files={"train": [shard.url]}, split="train", streaming=True)
    at = 0
    for table in data.with_format("arrow").iter(TABLE):
        if at + len(table) > start:
            yield from table.slice(max(0, start - at)).to_pylist()
        at += len(table)
    if at < start:
        raise SourceError(f"Shard {shard.url} ends after {at} rows, {start} were read before: it is cut short.")


def _patiently(look, what: str, local: bool):
    failures = 0
    while True:
        try:
            return look()
        except (SourceError, *BUGS):
            raise
        except Exception as error:
            failures += 1
            _wait(error, failures, what, local)


def _wait(error: Exception, failures: int, what: str, local: bool) -> None:
    """Pause before another attempt; raise SourceError if there is none to be made."""
    import datasets

    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if not local and datasets.config.HF_HUB_OFFLINE:
        raise SourceError(
            f"{what} is on the hub, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set ({reason}). Unset it, or use a "
            "local copy."
        ) from error
    if isinstance(error, FileNotFoundError) or status in (401, 403, 404, 410):
        raise SourceError(
            f"{what} is missing or out of reach ({reason}). Check the name and the network, or use a local copy."
        ) from error
    if local or failures > len(PAUSES):
        tried = "" if local else f" after {failures} attempts"
        raise SourceError(
            f"{what} cannot be read{tried} ({reason}). What was read before is kept; the next run "
            "goes on there. Check the network and the file, or use a local copy."
        ) from error
    print(f"{what}: {reason}; attempt {failures + 1} in {PAUSES[failures - 1]} s", file=sys.stderr, flush=True)
    time.sleep(PAUSES[failures - 1])
