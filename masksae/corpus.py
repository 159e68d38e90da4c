"""Text to token blocks: a `datasets.Dataset` with one column `ids` of fixed length, made once and kept in scratch.

A block is the BOS token (if the profile names one) and the next block_length - 1 tokens of one document; the rest of a document
that does not fill a block is left out, so no block spans two documents and no separator token is needed. A document is held
out or not by a hash of its text: duplicates always fall on the same side, whatever the sources, their order and the amount. Other
documents may quote one another, so a held-out block that shares 24 consecutive tokens with the training blocks is dropped.
A split "contexts" goes on with held-out documents where "held_out" is full.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from masksae.errors import DataError
from masksae.files import atomic_dir, recover

REPEAT = 24
"""Consecutive tokens that two blocks must share for one to repeat the other."""


def digest(text: str, seed: int = 0) -> int:
    """64 bits that depend on a document's text and a seed; they decide its side and its place in the order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8])


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is held out; about `share` of all documents are."""
    return digest(text) < share * 2**64


def in_order(documents: Iterable[str], seed: int) -> list[str]:
    """Distinct documents in a seeded order that depends on their texts only."""
    return sorted(set(documents), key=lambda text: (digest(text, seed + 1), text))


def token_blocks(text: str, tokenizer, *, block_length: int, bos_id: int | None) -> np.ndarray:
    """The whole blocks of a document: int32 [n, block_length]."""
    first = 0 if bos_id is None else 1
    body = block_length - first
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
    whole = ids[: len(ids) // body * body].reshape(-1, body)
    return whole if bos_id is None else np.pad(whole, ((0, 0), (1, 0)), constant_values=bos_id)


def build(
    documents: Iterable[str], tokenizer, folder, *, tokens: dict[str, int], block_length: int, bos_id: int | None,
    held_out_share: float, seed: int, ordered: bool = True, progress: bool = True,
) -> dict:  # fmt: skip
    """The splits as `datasets.Dataset`s of blocks, saved under `folder` and read back: {"train": ..., "held_out": ...}.

    tokens    wanted size of each split ("contexts" may be among them); documents are read until all are full, so a stream need not end. Held-out blocks that
              repeat training text are dropped then (a few per cent where sources quote each other)
    ordered   read all documents first and take them in a seeded order; False takes a stream as it comes

    Raises DataError if there is no text, if no document fills a block, or if the text runs out too early.
    """
    import datasets

    folder = recover(folder)
    if not folder.exists():
        texts = in_order(documents, seed) if ordered else documents
        blocks = _fill(texts, tokenizer, tokens, block_length, bos_id, held_out_share, progress)
        first = 0 if bos_id is None else 1
        for split in tokens.keys() - {"train"}:
            repeated = repeats(blocks[split][:, first:], blocks["train"][:, first:])
            if repeated.all():
                raise DataError(
                    f"Every block of {split} repeats training text. Give text that is less alike, or another text.seed."
                )
            blocks[split] = blocks[split][~repeated]
        with atomic_dir(folder) as tmp:
            features = datasets.Features({"ids": datasets.List(datasets.Value("int32"), length=block_length)})
            for split in tokens:
                datasets.Dataset.from_dict({"ids": blocks[split]}, features=features).save_to_disk(tmp / split)
    return {split: datasets.load_from_disk(folder / split) for split in tokens}


def repeats(blocks: np.ndarray, others: np.ndarray, run: int = REPEAT) -> np.ndarray:
    """bool [n]: which of `blocks` [n, s] share `run` consecutive ids (all, if s is less) with any of `others` [m, s]."""
    run = min(run, blocks.shape[1])
    mine = _fingerprints(blocks, run)
    found = np.zeros(mine.shape, dtype=bool)
    for low in range(0, len(others), 4096):
        found |= np.isin(mine, _fingerprints(others[low : low + 4096], run))
    return found.any(1)


def _fingerprints(blocks: np.ndarray, run: int) -> np.ndarray:
    """A 64-bit hash of every stretch of `run` ids: uint64 [n, s - run + 1]."""
    weights = np.random.Generator(np.random.Philox(run)).integers(2**64, size=run, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(blocks.astype(np.uint64), run, axis=1)
    return (windows * weights).sum(-1, dtype=np.uint64)


def as_tensor(dataset) -> Tensor:
    """Blocks of a data set as int64 [n, block_length]."""
    return torch.from_numpy(dataset.with_format("numpy")[:]["ids"]).long()


def _fill(texts, tokenizer, tokens, block_length, bos_id, held_out_share, progress) -> dict[str, np.ndarray]:
    """Blocks of the splits, in the order of the documents."""
    from tqdm import tqdm

    wanted = {split: -(-tokens[split] // block_length) for split in tokens}
    blocks: dict[str, list[np.ndarray]] = {split: [] for split in tokens}
    found, documents = dict.fromkeys(tokens, 0), 0
    with tqdm(
        total=sum(wanted.values()), desc="token blocks", unit="block", disable=not progress, mininterval=1
    ) as bar:
        for text in texts:
            documents += 1
            split = "held_out" if is_held_out(text, held_out_share) else "train"
            if split == "held_out" and "contexts" in tokens and found[split] == wanted[split]:
                split = "contexts"
            if found[split] < wanted[split]:
                new = token_blocks(text, tokenizer, block_length=block_length, bos_id=bos_id)
                new = new[: wanted[split] - found[split]]
                blocks[split].append(new)
                found[split] += len(new)
                bar.update(len(new))
            elif found == wanted:
                break
    _check_filled(found, wanted, documents, block_length)
    return {split: np.concatenate(blocks[split]) for split in tokens}


def _check_filled(found: dict[str, int], wanted: dict[str, int], documents: int, block_length: int) -> None:
    if documents == 0:
        raise DataError("The text sources hold no document. Check text.sources and the field that is read.")
    if not any(found.values()):
        raise DataError(
            f"None of {documents} documents fills a block of {block_length} tokens. Lower text.block_length or give longer documents."
        )
    short = {split: f"{found[split]} of {wanted[split]}" for split in found if found[split] < wanted[split]}
    if short:
        raise DataError(
            f"The text ran out after {documents} documents, with blocks {short}. Lower text.train_tokens, text.held_out_tokens or contexts.tokens, or add sources."
        )
