"""Masking inside somebody else's pipeline: data sets, batches, and the inputs of a model. The real trainers are in test_peers_plugins.py."""

import datasets
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from masksae import ActivationStream, activation_batches, mask_dataset, mask_inputs, mask_tokens
from masksae.errors import ConfigError, DataError

KEYS = {"p": 0.4, "token_id": 1, "seed": 7, "spare": (0,)}
IDS = torch.randint(2, 100, (20, 9), generator=torch.Generator().manual_seed(0))
IDS[:, 0] = 0
EXPECTED, WHERE = mask_tokens(IDS, **KEYS)


def blocks(**more):
    return datasets.Dataset.from_dict({"input_ids": IDS.tolist(), **more})


def columns(rows):
    return torch.tensor([r["input_ids"] for r in rows]), torch.tensor([r["is_masked"] for r in rows])


@pytest.mark.parametrize("stream", [False, True])
def test_a_data_set_is_masked_row_by_row(stream):
    data = blocks(source=["a"] * len(IDS))
    masked = mask_dataset(data.to_iterable_dataset(3) if stream else data, **KEYS)
    ids, where = columns(list(masked))
    assert torch.equal(ids, EXPECTED) and torch.equal(where, WHERE)
    assert next(iter(masked))["source"] == "a" and data[0]["input_ids"] == IDS[0].tolist()
    again = masked.skip(5) if stream else masked.select(range(5, 20))
    assert torch.equal(columns(list(again))[0], EXPECTED[5:])


def test_a_stream_that_goes_on_has_the_same_masks():
    masked = mask_dataset(blocks().to_iterable_dataset(2), **KEYS)
    rows = iter(masked)
    head = [next(rows) for _ in range(7)]
    other = mask_dataset(blocks().to_iterable_dataset(2), **KEYS)
    other.load_state_dict(masked.state_dict())
    assert torch.equal(columns(head + list(other))[0], EXPECTED)


def test_a_format_set_afterwards_does_not_take_the_masks_off():
    masked = mask_dataset(blocks(), **KEYS)
    masked.set_format(type="torch", columns=["input_ids"])  # as SAELens does
    assert torch.equal(masked[:]["input_ids"], EXPECTED)


def test_the_cache_knows_the_masks():
    first, second, other = (mask_dataset(blocks(), **KEYS | {"seed": seed}) for seed in (7, 7, 8))
    assert first._fingerprint == second._fingerprint != other._fingerprint
    assert columns(first)[0].tolist() != columns(other)[0].tolist()


def test_rows_of_any_length():
    data = datasets.Dataset.from_dict({"tokens": [IDS[i, : 2 + i % 5].tolist() for i in range(20)]})
    rows = mask_dataset(data, **KEYS, column="tokens")
    for i, row in enumerate(rows):
        assert row["tokens"] == mask_tokens(IDS[i : i + 1, : 2 + i % 5], **KEYS, first_sequence=i)[0][0].tolist()


def test_what_is_no_token_block_is_refused():
    with pytest.raises(ConfigError, match="no column 'input_ids'.*Known: text. Text must be cut"):
        mask_dataset(datasets.Dataset.from_dict({"text": ["a"]}), **KEYS)
    with pytest.raises(ConfigError, match="masked already"):
        mask_dataset(mask_dataset(blocks(), **KEYS), **KEYS)
    with pytest.raises(ConfigError, match="p is the probability"):
        mask_dataset(blocks(), **KEYS | {"p": 30})
    with pytest.raises(DataError, match="lists of token ids, found 'words"):
        mask_dataset(datasets.Dataset.from_dict({"input_ids": ["words"]}), **KEYS)[0]


def test_batches_are_those_of_the_stream():
    x = torch.arange(64.0)[:, None]
    is_masked = x[:, 0] % 4 == 0
    make = lambda: ActivationStream.from_array(x, batch_size=16, seed=0, is_masked=is_masked)
    theirs, ours = activation_batches(make()), iter(make())
    assert all(torch.equal(next(theirs), next(ours)[0]) for _ in range(9))
    kept = torch.cat([next(batch) for batch in [activation_batches(make(), drop_masked=True)] for _ in range(9)])
    assert len(kept) == 9 * 16 and not (kept[:, 0] % 4 == 0).any() and len(kept.unique()) == 48


def test_a_model_sees_corrupted_ids_until_it_is_over(model, ids):
    clean = model(ids).logits
    with mask_inputs(model, **KEYS) as masks:
        found = model(input_ids=ids, labels=ids)
        corrupted, where = masks.corrupt(ids), masks.is_masked
        assert 0.2 < where.float().mean() < 0.6 and torch.equal(corrupted, ids.masked_fill(where, 1))
        assert torch.equal(model(ids).logits, found.logits)
    assert torch.equal(found.logits, model(corrupted).logits) and torch.equal(model(ids).logits, clean)
    expected = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)  # labels stay clean


@given(st.lists(st.lists(st.integers(2, 90), min_size=1, max_size=12), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_mask_depends_on_the_sequence_alone(rows, left):
    """Not on batch, order or padding, on whichever side."""
    masks = mask_inputs(tiny_model("llama", layers=1), **KEYS)
    width = max(map(len, rows)) + 3
    for number, row in enumerate(rows):
        alone = masks.corrupt(torch.tensor([[0, *row]]))[0, 1:].tolist()
        padded = [[0] * (width - len(r)) + r if left else [0, *r] + [0] * (width - len(r) - 1) for r in rows]
        together = masks.corrupt(torch.tensor(padded))[number].tolist()
        assert (together[width - len(row) :] if left else together[1 : len(row) + 1]) == alone
        assert all(new in (old, 1) for old, new in zip(row, alone))


def test_what_a_hook_cannot_mask_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="first argument of MultiheadAttention.forward is query, expected input_ids"):
        mask_inputs(torch.nn.MultiheadAttention(2, 1), **KEYS)
    with pytest.raises(ConfigError, match="p is the probability"):
        mask_inputs(model, **KEYS | {"p": -1})
    with mask_inputs(model, **KEYS):
        with pytest.raises(DataError, match="without input ids"):
            model(inputs_embeds=torch.zeros(1, 2, 16))
        with pytest.raises(DataError, match=r"called with \(1, 2, 16\), expected token ids"):
            model(torch.zeros(1, 2, 16))
