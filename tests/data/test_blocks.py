"""Blocks have one length, start with BOS, come from one document each, and held-out text is never trained on."""

import json
import random
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masksae.data import blocks
from masksae.data.texts import TextStream
from masksae.errors import DataError


class Letters:
    """One token per character."""

    is_fast, added_tokens_decoder, unk_token_id = False, {}, None

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def make_documents(n=400, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh ", k=rng.randint(5, 80))) for _ in range(n)]


def build(tmp_path, documents, name="blocks", **changes):
    options = dict(
        tokens={"train": 2000, "held_out": 400}, block_length=16, bos_id=1, held_out_share=0.2, seed=0, progress=False
    )
    return blocks.build(documents, Letters(), tmp_path / name, **(options | changes))


def texts(dataset):
    return ["".join(chr(i) for i in row[1:]) for row in blocks.Blocks(dataset)[:].tolist()]


def test_blocks(tmp_path):
    documents = make_documents()
    made = build(tmp_path, documents)
    for split, wanted in (("train", 125), ("held_out", 25)):
        ids = blocks.Blocks(made[split])[:]
        assert ids.shape == (wanted, 16) and ids.dtype == torch.int64 and (ids[:, 0] == 1).all()
        for text in texts(made[split]):
            homes = [d for d in documents if text in d and d.index(text) % 15 == 0]
            assert any(blocks.is_held_out(d, 0.2) == (split == "held_out") for d in homes)


def test_a_document_is_on_one_side_whatever_else_is_there(tmp_path):
    documents = make_documents()
    held_out = {d for d in documents if blocks.is_held_out(d, 0.2)}
    assert 0.1 < len(held_out) / len(documents) < 0.3
    a = build(tmp_path, documents + documents[:50], "a")  # duplicates
    b = build(tmp_path, random.Random(1).sample(documents, len(documents)), "b")  # another order
    assert texts(a["train"]) == texts(b["train"]) and texts(a["held_out"]) == texts(b["held_out"])
    whole = {text for d in held_out for text in (d[i : i + 15] for i in range(0, len(d) - 14, 15))}
    assert not whole & set(texts(a["train"]))


def test_another_seed_is_another_order_of_the_same_split(tmp_path):
    documents = make_documents()
    a, b = (build(tmp_path, documents, f"s{seed}", seed=seed) for seed in (0, 1))
    assert texts(a["train"]) != texts(b["train"])


def test_an_endless_stream_is_read_only_as_far_as_needed(tmp_path):
    taken = []

    def endless():
        for i in count():
            taken.append(i)
            yield f"document number {i:06d} is here"

    made = build(tmp_path, endless(), ordered=False)
    assert len(made["train"]) == 125 and len(taken) < 1000


def test_made_once(tmp_path):
    first = build(tmp_path, make_documents())

    def never():
        raise AssertionError("read again")
        yield

    assert texts(build(tmp_path, never())["train"]) == texts(first["train"])


def test_without_bos_every_position_is_text(tmp_path):
    made = build(tmp_path, make_documents(), bos_id=None)
    assert (blocks.Blocks(made["train"])[:] > 1).all()


@pytest.mark.parametrize(
    "documents, changes, words",
    [
        ([], {}, "hold no document"),
        (["short", "too"], {}, r"ran out after 2 documents with 0 of 125.*fewer than 16 tokens \(text.block_length\)"),
        (make_documents(30), {}, "ran out after"),
        (
            make_documents(),
            {"tokens": {"train": 2000, "held_out": 90000}},
            r"of 5,625 blocks of held_out \(text.held_out_tokens\). Add text, or lower text.held_out_tokens\.",
        ),
        (
            make_documents(1),
            {"tokens": {"train": 16, "held_out": 16}},
            "ran out after 1 documents with 0 of 1 blocks.*A document is held out as a whole or not at all",
        ),
    ],
)
def test_bad_text(tmp_path, documents, changes, words):
    with pytest.raises(DataError, match=words):
        build(tmp_path, documents, **changes)
    assert not (tmp_path / "blocks").exists()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), run=st.integers(1, 6), n=st.integers(1, 6), m=st.integers(1, 6))
def test_repeats_against_brute_force(seed, run, n, m):
    rng = np.random.default_rng(seed)
    mine, others = rng.integers(0, 4, (n, 5)), rng.integers(0, 4, (m, 5))
    run_ = min(run, 5)
    stretches = lambda rows: [{tuple(row[i : i + run_]) for i in range(5 - run_ + 1)} for row in rows.tolist()]
    everything = set().union(*stretches(others))
    expected = [bool(those & everything) for those in stretches(mine)]
    assert blocks.repeats(mine, others[:1], others[1:], run=run).tolist() == expected


def test_held_out_blocks_that_quote_training_text_are_dropped(tmp_path, monkeypatch):
    documents = make_documents()
    plain = build(tmp_path, documents, "plain", block_length=32)
    quoted = texts(plain["train"])[0][2:30]  # at another offset than in its own document
    quoting = [d for d in (f"{quoted}{i:04d}" for i in range(400)) if blocks.is_held_out(d, 0.2)]
    found = lambda name: [
        quoted in text for text in texts(build(tmp_path, documents + quoting, name, block_length=32)["held_out"])
    ]
    assert not any(found("checked"))
    monkeypatch.setattr(blocks, "repeats", lambda blocks, others: np.zeros(len(blocks), dtype=bool))
    assert any(found("unchecked"))


def test_text_that_only_repeats_itself(tmp_path):
    with pytest.raises(DataError, match="Every block of held_out repeats training text"):
        build(tmp_path, ["a" * (40 + i) for i in range(300)], "same")


def test_special_tokens_in_a_text_are_words(tmp_path):
    """A text about masks holds no mask, and one that quotes a BOS token no BOS; both stand only where they are put."""
    from tiny_project import byte_tokenizer

    documents = [f"a <mask> and a <bos> number {i:04d} in a text of its own" for i in range(400)]
    options = dict(tokens={"train": 2000, "held_out": 400}, block_length=16, bos_id=0, held_out_share=0.2, seed=0)
    found = blocks.build(documents, byte_tokenizer(), tmp_path / "blocks", progress=False, **options)
    ids = blocks.Blocks(found["train"])[:]
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] > 1).all()
    assert any("<mask>" in byte_tokenizer().decode(row[1:]) for row in ids)


@pytest.mark.parametrize("at", [17, 40, 70])
def test_an_interrupt_parts_no_block_from_its_place(tmp_path, monkeypatch, at):
    """Wherever it comes, also between the documents of a batch, the next run goes on after the last that was taken."""
    monkeypatch.setattr(blocks, "TOGETHER", 20)
    monkeypatch.setattr(blocks, "PART", 30)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_documents()))
    held_out, read = blocks.is_held_out, []

    def made(name, interrupt=None):
        def counted(text, share):
            if len(read) == interrupt:
                raise KeyboardInterrupt
            read.append(text)
            return held_out(text, share)

        monkeypatch.setattr(blocks, "is_held_out", counted)
        found = build(tmp_path, TextStream([str(tmp_path / "text.jsonl")]), name, ordered=False)
        return {split: texts(rows) for split, rows in found.items()}

    whole, once = made("whole"), [*read]
    read.clear()
    with pytest.raises(KeyboardInterrupt):
        made("broken", interrupt=at)
    assert made("broken") == whole and read == once[: len(read)]  # a batch may end beyond the last block
