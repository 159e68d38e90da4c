"""Text to token blocks: a `datasets.Dataset` with one column `ids` of fixed length, made once and kept in scratch.

A block is the BOS token (if the profile names one) and the next block_length - 1 tokens of one document; the rest of a
document that does not fill a block is left out, so no block spans two documents and no separator token is needed. A
document is held out or not by a hash of its text: duplicates always fall on the same side, whatever the sources, their
order and the amount. Other documents may quote one another, so a held-out block that shares 24 consecutive tokens with
the training blocks is dropped. A split "contexts" goes on with held-out documents where "held_out" is full.

Half a billion tokens are 2 GB here. They are kept in parts as they come, each with the place in the text where it ends,
so that a stream that breaks goes on; memory never holds more than a part.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from masksae import progress as bars
from masksae.data.tokens import tokenise
from masksae.errors import DataError
from masksae.files import (
    atomic_dir,
    atomic_file,
    ensure_writable,
    read_json,
    read_safetensors,
    recover,
    save_tensors,
    write_json,
)

REPEAT = 24
"""Consecutive tokens that two blocks must share for one to repeat the other."""

TOGETHER = 64
"""Documents that are tokenised at a time."""

KEYS = {"train": "text.train_tokens", "held_out": "text.held_out_tokens", "contexts": "contexts.tokens"}
"""Where a profile says how large each split is."""

PART = 2**15
"""Blocks of a part: what a break in a stream can cost at most."""


def digest(text: str, seed: int = 0) -> int:
    """64 bits that depend on a document's text and a seed; they decide its side and its place in the order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8])


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is held out; about `share` of all documents are."""
    return digest(text) < share * 2**64


def in_order(documents: Iterable[str], seed: int) -> list[str]:
    """Distinct documents in a seeded order that depends on their texts only."""
    return sorted(set(documents), key=lambda text: (digest(text, seed + 1), text))


def token_blocks(ids: list[int], *, block_length: int, bos_id: int | None) -> np.ndarray:
    """The whole blocks of a document's token ids: int32 [n, block_length]."""
    first = 0 if bos_id is None else 1
    body = block_length - first
    whole = np.array(ids, dtype=np.int32)[: len(ids) // body * body].reshape(-1, body)
    return whole if bos_id is None else np.pad(whole, ((0, 0), (1, 0)), constant_values=bos_id)


def build(
    documents, tokenizer, folder, *, tokens: dict[str, int], block_length: int, bos_id: int | None,
    held_out_share: float, seed: int, ordered: bool = True, progress: bool = True,
) -> dict:  # fmt: skip
    """The splits as `datasets.Dataset`s of blocks, saved under `folder` and read back: {"train": ..., "held_out": ...}.

    documents  texts, or a `texts.TextStream`: then what was tokenised is kept in parts on the way, and another call
               goes on after the last of them
    tokens     wanted size of each split ("contexts" may be among them); documents are read until all are full, so a
               stream need not end. Held-out blocks that repeat training text are dropped then (a few per cent where
               sources quote each other)
    ordered    read all documents first and take them in a seeded order; False takes them as they come

    Raises DataError if there is no text, if no document fills a block, or if the text runs out too early; SourceError.
    """
    import datasets
    from filelock import FileLock

    folder = recover(folder)
    ensure_writable(folder.parent)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            parts = Parts(folder.with_name(f"{folder.name}.parts"), tokens, block_length)
            if hasattr(documents, "read") and not ordered:
                texts = parts.resume(documents)
            else:
                texts = ((text, None) for text in (in_order(documents, seed) if ordered else documents))
            _fill(parts, texts, tokenizer, bos_id, held_out_share, progress)
            _save(parts.blocks(), folder, 0 if bos_id is None else 1)
            parts.remove()
    return {split: datasets.load_from_disk(folder / split) for split in tokens}


def _save(blocks: dict[str, list[np.ndarray]], folder, first: int) -> None:
    """Write the splits, each a list of pieces, without what repeats training text."""
    import datasets
    import pyarrow as pa

    for split in blocks.keys() - {"train"}:
        whole = np.concatenate(blocks[split])
        repeated = repeats(whole[:, first:], *(piece[:, first:] for piece in blocks["train"]))
        if repeated.all():
            raise DataError(
                f"Every block of {split} repeats training text. Give text that is less alike, or another text.seed."
            )
        blocks[split] = [whole[~repeated]]

    def column(ids: np.ndarray):
        return pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), ids.shape[1])

    with atomic_dir(folder) as tmp, bars.only_ours():
        for split, pieces in blocks.items():
            table = pa.table({"ids": pa.chunked_array([column(ids) for ids in pieces])})
            datasets.Dataset(table, fingerprint=f"{folder.name}-{split}").save_to_disk(tmp / split)


def repeats(blocks: np.ndarray, *others: np.ndarray, run: int = REPEAT) -> np.ndarray:
    """bool [n]: which of `blocks` [n, s] share `run` consecutive ids (all, if s is less) with any of the `others`, each
    [m, s]."""
    run = min(run, blocks.shape[1])
    mine = _fingerprints(blocks, run)
    found = np.zeros(mine.shape, dtype=bool)
    for piece in others:
        for low in range(0, len(piece), 4096):
            found |= np.isin(mine, _fingerprints(piece[low : low + 4096], run))
    return found.any(1)


def _fingerprints(blocks: np.ndarray, run: int) -> np.ndarray:
    """A 64-bit hash of every stretch of `run` ids: uint64 [n, s - run + 1]."""
    weights = np.random.Generator(np.random.Philox(run)).integers(2**64, size=run, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(blocks.astype(np.uint64), run, axis=1)
    return (windows * weights).sum(-1, dtype=np.uint64)


class Blocks:
    """Token blocks on disk: `blocks[a:b]` reads int64 [b - a, block_length]."""

    def __init__(self, dataset):
        self._dataset = dataset.with_format("numpy")
        self.shape = (len(dataset), len(dataset[0]["ids"]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Tensor:
        return torch.from_numpy(np.array(self._dataset[part]["ids"])).long()


class Parts:
    """Blocks found so far: the last ones in memory, those before on disk with the place in the text up to which they
    go."""

    def __init__(self, folder: Path, tokens: dict[str, int], block_length: int):
        self.folder, self.block_length = folder, block_length
        self.wanted = {split: -(-size // block_length) for split, size in tokens.items()}
        self.found = dict.fromkeys(tokens, 0)
        self.documents = 0
        self._has_places = False
        self._new: list[tuple[str, np.ndarray, tuple]] = []

    def resume(self, stream) -> Iterator[tuple[str, tuple]]:
        """The stream's documents with their places, after the last part. Raises SourceError if its shards are no longer
        the same."""
        record, place, self._has_places = self.folder / "shards.json", [0, 0, 0], True
        if record.exists():
            stream.go_back_to(read_json(record))
        else:
            write_json(record, stream.record())
        for part in map(read_safetensors, self._files()):
            *place, self.documents = part.pop("end").tolist()
            for split, ids in part.items():
                self.found[split] += len(ids)
        return stream.read(tuple(place))

    def add(self, split: str, ids: np.ndarray, place: tuple | None) -> int:
        """Take the blocks of a document, as long as the split has room; how many. `place` is where the text stands
        after it."""
        ids = ids[: self.wanted[split] - self.found[split]]
        self.documents += 1
        self.found[split] += len(ids)
        self._new.append((split, ids, (*(place or ()), self.documents)))  # one step, which no interrupt can part
        return len(ids)

    def keep(self, least: int | None = None) -> None:
        """Write what is in memory as a part, if it is `least` blocks (PART) or more and the text has places."""
        new = self._new
        if not self._has_places or sum(len(ids) for _, ids, _ in new) < (least or PART):
            return
        tensors = {split: torch.from_numpy(ids) for split, ids in self._gathered().items()}
        self._new = []  # before it is written, since an interrupt must not have it written twice
        with atomic_file(self.folder / f"part-{len(self._files()):06d}.safetensors") as tmp:
            save_tensors(tensors | {"end": torch.tensor(new[-1][2])}, tmp)

    def blocks(self) -> dict[str, list[np.ndarray]]:
        """All blocks of each split, in pieces int32 [n, block_length]; those on disk are mapped, not read."""
        parts = [read_safetensors(file) for file in self._files()] if self._has_places else []
        new = self._gathered()
        return {split: [*(part[split].numpy() for part in parts), new[split]] for split in self.wanted}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _gathered(self) -> dict[str, np.ndarray]:
        empty = np.empty((0, self.block_length), dtype=np.int32)
        new = {split: [ids for each, ids, _ in self._new if each == split] for split in self.wanted}
        return {split: np.concatenate([empty, *pieces]) for split, pieces in new.items()}

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.safetensors"))


def _fill(parts: Parts, texts, tokenizer, bos_id: int | None, share: float, progress: bool) -> None:
    """Fill the splits with the blocks of the documents, in their order; many documents are tokenised at a time, on all
    cores."""
    wanted, found = parts.wanted, parts.found
    total, done = sum(wanted.values()), sum(found.values())
    with bars.bar(total=total, initial=done, label="token blocks" if progress else None, unit="blocks") as bar:
        try:
            while found != wanted and (batch := list(islice(texts, TOGETHER))):
                ids = tokenise(tokenizer, [text for text, _ in batch])
                for (text, place), each in zip(batch, ids):
                    split = "held_out" if is_held_out(text, share) else "train"
                    if split == "held_out" and "contexts" in wanted and found[split] == wanted[split]:
                        split = "contexts"
                    new = token_blocks(each, block_length=parts.block_length, bos_id=bos_id)
                    bar.update(parts.add(split, new, place))
                parts.keep()
        except BaseException:
            parts.keep(least=1)
            raise
    _check_filled(found, wanted, parts.documents, parts.block_length)


def _check_filled(found: dict[str, int], wanted: dict[str, int], documents: int, block_length: int) -> None:
    if documents == 0:
        raise DataError("The text sources hold no document. Check text.sources and the field that is read.")
    short = [split for split in found if found[split] < wanted[split]]
    if short:
        each = [f"{found[split]:,} of {wanted[split]:,} blocks of {split} ({KEYS[split]})" for split in short]
        raise DataError(
            f"The text ran out after {documents:,} documents with {', '.join(each)}. Add text, or lower "
            f"{' and '.join(KEYS[split] for split in short)}. A document is held out as a whole or not at all "
            f"(text.held_out_share), and gives no block if it has fewer than {block_length} tokens (text.block_length)."
        )
