"""Masking inside somebody else's pipeline: data sets, batches, and the inputs of a model. The real trainers are in
test_peers_plugins.py."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import VOCABULARY, byte_tokenizer, tiny_model

from masksae import ActivationStream, activation_batches, mask_dataset, mask_inputs, mask_tokens
from masksae.data.models import LanguageModel
from masksae.errors import ConfigError, DataError

KEYS = {"p": 0.4, "token_id": 1, "seed": 7, "spare": (0,)}
IDS = torch.randint(2, 100, (20, 9), generator=torch.Generator().manual_seed(0))
IDS[:, 0] = 0
EXPECTED, WHERE = mask_tokens(IDS, **KEYS)


def blocks(**more):
    return datasets.Dataset.from_dict({"input_ids": IDS.tolist(), **more})


def columns(rows):
    return torch.tensor([r["input_ids"] for r in rows]), torch.tensor([r["is_masked"] for r in rows])


def stream(shards=6):
    """Rows of different lengths, one of them twice, with their numbers."""
    rows = [[0, *IDS[i, 1 : 2 + i % 8].tolist()] for i in range(20)] + [[0, *IDS[7, 1:9].tolist()]]
    return datasets.Dataset.from_dict({"input_ids": rows, "row": list(range(21))}).to_iterable_dataset(shards)


def by_row(*rows):
    """What each row has become, whatever the order that they came in."""
    return {int(row["row"]): (row["input_ids"], row["is_masked"]) for part in rows for row in part}


def as_it_is(value):
    return value


def test_a_data_set_is_masked_row_by_row_and_keeps_its_other_columns():
    data = blocks(source=["a"] * len(IDS), attention_mask=[[1] * 9] * len(IDS), labels=IDS.tolist())
    masked = mask_dataset(data, **KEYS)
    ids, where = columns(masked)
    assert torch.equal(ids, EXPECTED) and torch.equal(where, WHERE)
    assert masked.column_names == [*data.column_names, "is_masked"]
    assert all(masked[name][:] == data[name][:] for name in ("source", "attention_mask", "labels"))
    assert data[0]["input_ids"] == IDS[0].tolist()
    assert torch.equal(columns(masked.select(range(5, 20)))[0], EXPECTED[5:])
    assert torch.equal(columns(pickle.loads(pickle.dumps(masked)))[0], EXPECTED)
    assert torch.equal(columns(masked.map(as_it_is, num_proc=2))[0], EXPECTED)


def test_a_stream_has_the_masks_that_its_rows_have_in_a_model():
    masked = list(mask_dataset(stream(), **KEYS))
    masks = mask_inputs(tiny_model("llama", layers=1), **KEYS)
    for row, clean in zip(masked, stream(), strict=True):
        assert row["input_ids"] == masks.corrupt(torch.tensor([clean["input_ids"]]))[0].tolist()
        assert row["is_masked"] == masks.is_masked[0].tolist()
    assert masked[7]["input_ids"] == masked[20]["input_ids"]  # equal rows, equal masks
    other = by_row(mask_dataset(stream(), **KEYS | {"seed": 8}))
    assert other != by_row(masked) and other[7] == other[20]


SHUFFLED = dict(seed=3, buffer_size=5)
READERS = {
    "one shard": lambda mask: [mask(stream(1))],
    "split by node": lambda mask: [split_dataset_by_node(mask(stream()), rank=rank, world_size=2) for rank in (0, 1)],
    "split by node, rows by turns": lambda mask: [mask(split_dataset_by_node(stream(1), rank, 2)) for rank in (0, 1)],
    "shuffled before": lambda mask: [mask(stream().shuffle(**SHUFFLED))],
    "shuffled after": lambda mask: [mask(stream()).shuffle(**SHUFFLED)],
    "in two parts": lambda mask: [mask(stream()).take(9), mask(stream().skip(9))],
    "interleaved": lambda mask: [
        datasets.interleave_datasets(
            [mask(stream().filter(lambda row, rest=rest: row["row"] % 3 == rest)) for rest in range(3)],
            stopping_strategy="all_exhausted",
        )
    ],
    "loaded by forked workers": lambda mask: [
        sum(torch.utils.data.DataLoader(mask(stream()), 4, num_workers=3, collate_fn=list), [])
    ],
}


@pytest.mark.parametrize("reader", READERS)
def test_the_masks_of_a_stream_do_not_depend_on_who_reads_it(reader):
    parts = READERS[reader](lambda clean: mask_dataset(clean, **KEYS))
    assert by_row(*parts) == by_row(mask_dataset(stream(), **KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True], ids=["Dataset", "IterableDataset"])
def test_spawned_workers_load_the_same_masks_in_every_epoch(lazy):
    masked = mask_dataset(stream() if lazy else datasets.Dataset.from_list(list(stream())), **KEYS)
    loader = torch.utils.data.DataLoader(
        masked, 4, num_workers=1 + lazy, collate_fn=list, multiprocessing_context="spawn", persistent_workers=True
    )
    for _ in range(2):
        assert by_row(*loader) == by_row(masked)


def test_a_stream_that_shrinks_between_epochs_keeps_its_masks():
    left = [list(stream())]

    def rows():
        yield from left[0]

    masked = mask_dataset(datasets.IterableDataset.from_generator(rows), **KEYS)
    whole = by_row(masked)
    left[0] = left[0][3:12]
    assert by_row(masked) == {number: whole[number] for number in range(3, 12)}


def test_a_stream_that_goes_on_has_the_same_masks():
    masked = mask_dataset(stream(2), **KEYS)
    rows = iter(masked)
    head = [next(rows) for _ in range(7)]
    other = mask_dataset(stream(2), **KEYS)
    other.load_state_dict(masked.state_dict())
    assert by_row(head, other) == by_row(masked)


def test_a_format_set_afterwards_does_not_take_the_masks_off():
    masked = mask_dataset(blocks(), **KEYS)
    masked.set_format(type="torch", columns=["input_ids"])  # as SAELens does
    assert torch.equal(masked[:]["input_ids"], EXPECTED)


def test_the_cache_knows_the_masks(tmp_path):
    """A data set on disk, whose masked form is read back where nothing has changed, and only there."""
    blocks().save_to_disk(tmp_path)
    settings = [KEYS | changed for changed in ({}, {"seed": 8}, {"p": 0.2}, {"token_id": 5}, {"spare": (0, 7)})]
    for _ in range(2):
        for keys in settings:
            masked = mask_dataset(datasets.load_from_disk(tmp_path), **keys)
            assert torch.equal(columns(masked)[0], mask_tokens(IDS, **keys)[0])
            assert str(tmp_path) in masked.cache_files[0]["filename"]
        assert len(list(tmp_path.glob("cache-*.arrow"))) == len(settings)


def test_a_data_set_that_cannot_be_written_to_is_named(tmp_path, as_nobody):
    blocks().save_to_disk(tmp_path / "shared")
    (tmp_path / "shared").chmod(0o555)
    shared = datasets.load_from_disk(tmp_path / "shared")
    name, words = as_nobody(lambda: mask_dataset(shared, **KEYS))
    assert name == "OutputError" and "shared'" in words and "datasets.disable_caching()" in words

    def without_a_cache():
        datasets.disable_caching()
        assert torch.equal(columns(mask_dataset(shared, **KEYS))[0], EXPECTED)

    assert as_nobody(without_a_cache) is None


def test_numbers_of_numpy_and_torch_are_numbers():
    theirs = {"p": np.float64(0.4), "token_id": np.int32(1), "seed": torch.tensor(7), "spare": np.array([0])}
    assert mask_dataset(blocks(), **theirs)._fingerprint == mask_dataset(blocks(), **KEYS)._fingerprint
    masks = mask_inputs(tiny_model("llama", layers=1), **theirs)
    assert torch.equal(masks.corrupt(IDS), mask_inputs(tiny_model("llama", layers=1), **KEYS).corrupt(IDS))


@pytest.mark.parametrize("kind", ["int32", "uint16", "uint8"])
def test_ids_keep_their_type(kind):
    data = blocks().cast_column("input_ids", datasets.List(datasets.Value(kind)))
    masked = mask_dataset(data, **KEYS)
    assert masked.features["input_ids"] == data.features["input_ids"] and torch.equal(columns(masked)[0], EXPECTED)
    with pytest.raises(ConfigError, match=f"token_id {2**31} does not fit into column 'input_ids' of {kind}"):
        mask_dataset(data, **KEYS | {"token_id": 2**31})
    masks = mask_inputs(tiny_model("llama", layers=1), **KEYS)
    found = masks.corrupt(IDS.to(getattr(torch, kind)))
    assert found.dtype == getattr(torch, kind) and torch.equal(found.long(), masks.corrupt(IDS))


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow", "pandas"])
def test_a_data_set_may_have_a_format(form):
    masked = mask_dataset(blocks().with_format(form), **KEYS)
    assert masked.format["type"] == form and torch.equal(columns(masked.with_format(None))[0], EXPECTED)
    masked = mask_dataset(stream().with_format(form), **KEYS)
    if form in ("torch", "numpy"):
        assert [list(row["input_ids"]) for row in masked] == [
            row["input_ids"] for row in mask_dataset(stream(), **KEYS)
        ]
    else:
        with pytest.raises(ConfigError, match="Mask it first, and then set its format"):
            next(iter(masked))


def test_rows_without_a_token_to_mask_and_none_that_is_left():
    data = datasets.Dataset.from_dict({"input_ids": [[0], [5], [0, 5], []]})
    for rows in (data, data.to_iterable_dataset()):
        assert [row["input_ids"] for row in mask_dataset(rows, **KEYS | {"p": 1})] == [[0], [1], [0, 1], []]
        assert [row["input_ids"] for row in mask_dataset(rows, **KEYS | {"p": 0})] == [[0], [5], [0, 5], []]


def test_rows_of_any_length():
    data = datasets.Dataset.from_dict({"tokens": [IDS[i, : 2 + i % 5].tolist() for i in range(20)]})
    rows = mask_dataset(data, **KEYS, column="tokens")
    for i, row in enumerate(rows):
        assert row["tokens"] == mask_tokens(IDS[i : i + 1, : 2 + i % 5], **KEYS, first_sequence=i)[0][0].tolist()


ROWS = datasets.Dataset.from_dict
NO_BLOCKS = {
    "text": (ROWS({"text": ["a"]}), ConfigError, "no column 'input_ids'.*Known: text. Text must be cut"),
    "masked": (blocks(is_masked=WHERE.tolist()), ConfigError, "masked already"),
    "a stream that is masked": (mask_dataset(stream(), **KEYS), ConfigError, "masked already"),
    "words": (ROWS({"input_ids": ["words"]}), DataError, "lists of token ids .integers., found Value"),
    "floats": (ROWS({"input_ids": [[1.7, 2.2]]}), DataError, "token ids .integers., found List.Value.'float64'"),
    "bools": (ROWS({"input_ids": [[True, False]]}), DataError, "found List.Value.'bool'"),
    "numbers": (ROWS({"input_ids": [1, 2]}), DataError, "found Value.'int"),
    "lists of lists": (ROWS({"input_ids": [[[1, 2], [3]]]}), DataError, "found List.List"),
    "a missing row": (ROWS({"input_ids": [[1, 2], None]}), DataError, "found 'None'"),
    "a missing token": (ROWS({"input_ids": [[1, None]]}), DataError, r"found '\[1, None\]'"),
    "negative": (ROWS({"input_ids": [[1, -100]]}), DataError, "token id -100 is outside"),
    "empty": (ROWS({"input_ids": []}), DataError, "has no rows"),
    "empty after a filter": (blocks().select([]), DataError, "has no rows"),
    "without columns": (ROWS({}), DataError, "has no rows"),
    "a list": (IDS.tolist(), ConfigError, "takes a datasets.Dataset or IterableDataset, found list.*from_dict"),
    "all splits": (datasets.DatasetDict(train=blocks()), ConfigError, "found DatasetDict. Choose a split"),
    "a transform": (blocks().with_transform(as_it_is), ConfigError, "has a transform.*Use map"),
}


@pytest.mark.parametrize("what", NO_BLOCKS)
def test_what_is_no_token_block_is_refused(what):
    data, error, words = NO_BLOCKS[what]
    with pytest.raises(error, match=words):
        mask_dataset(data, **KEYS)


def test_a_stream_of_a_generator_is_looked_at_before_it_is_masked():
    for rows, words in (
        ([], "has no rows"),
        ([{"input_ids": [0.5]}], "integers.*0.5"),
        ([{"input_ids": "ab"}], "integers.*ab"),
    ):
        with pytest.raises(DataError, match=words):
            mask_dataset(datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows)), **KEYS)
    assert list(mask_dataset(stream().take(0), **KEYS)) == []  # known by its columns alone


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"p": 30}, "p is the probability"),
        ({"p": True}, "p is the probability"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"token_id": 1.0}, "token_id must be"),
        ({"token_id": torch.tensor([1, 2])}, "token_id must be"),
        ({"spare": (None,)}, r"list of token ids, found \[None\]. A tokenizer without a BOS"),
        ({"spare": 0}, "spare must be a list of token ids, found 0"),
        ({"spare": "<bos>"}, "spare must be a list of token ids, found"),
    ],
)
def test_keys_that_cannot_work_are_refused_before_anything_is_read(changed, words):
    with pytest.raises(ConfigError, match=words):
        mask_dataset(stream(), **KEYS | changed)
    with pytest.raises(ConfigError, match=words):
        mask_inputs(tiny_model("llama", layers=1), **KEYS | changed)


def test_the_largest_seed_masks():
    assert mask_dataset(blocks(), **KEYS | {"seed": 2**63 - 1})[:]["input_ids"] != EXPECTED.tolist()


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


def test_batches_of_what_is_no_stream_are_refused():
    with pytest.raises(ConfigError, match="takes an ActivationStream, found Tensor. Make one with"):
        activation_batches(torch.zeros(8, 2))


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
    with pytest.raises(ConfigError, match="takes the torch module that runs, found LanguageModel. Give what it wraps"):
        mask_inputs(LanguageModel("tiny", model, None, ""), **KEYS)
    with pytest.raises(ConfigError, match=f"token_id {VOCABULARY} is outside the vocabulary of {VOCABULARY} tokens"):
        mask_inputs(model, **KEYS | {"token_id": VOCABULARY})
    refused = {
        "without input ids": lambda: model(inputs_embeds=torch.zeros(1, 2, 16)),
        r"called with \(1, 2, 16\) of torch.float32, expected token ids": lambda: model(torch.zeros(1, 2, 16)),
        r"called with \(12, 9\) of torch.bool": lambda: model(IDS[:12] > 3),
        f"token id {VOCABULARY} is outside": lambda: model(torch.tensor([[0, VOCABULARY]])),
    }
    for words, forward in refused.items():
        with pytest.raises(DataError, match=words), mask_inputs(model, **KEYS):
            forward()


def test_a_forward_past_the_masks_is_refused_at_once(model, ids):
    inner = model.base_model
    with pytest.raises(DataError, match=f"embedding of {type(model).__name__} past its own forward, and so unmasked"):
        with mask_inputs(model, **KEYS):
            model(ids)
            inner(ids)
    with mask_inputs(inner, **KEYS) as masks:  # the remedy
        found = inner(ids).last_hidden_state
        corrupted = masks.corrupt(ids)
    assert torch.equal(inner(corrupted).last_hidden_state, found)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_masks_hold_in_threads_after_an_error_and_in_a_copy(ids):
    model = tiny_model("llama")
    with mask_inputs(model, **KEYS):
        expected = model(ids).logits
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(found.logits, expected) for found in pool.map(model, [ids] * 40))
        for _ in range(2):
            with pytest.raises(DataError, match="outside the vocabulary"):
                model(ids + VOCABULARY)
            with pytest.raises(DataError, match="and so unmasked"):
                model.model(ids)
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)


def test_a_block_in_which_nothing_was_masked_is_refused(model, ids):
    with pytest.raises(DataError, match="No forward of .* saw clean text. Run the model inside the block"):
        with mask_inputs(model, **KEYS):
            pass
    with pytest.raises(KeyError, match="of the user"):  # what went wrong before is not hidden
        with mask_inputs(model, **KEYS):
            raise KeyError("of the user")
    with pytest.raises(DataError, match="without input ids"), mask_inputs(model, **KEYS):
        model(inputs_embeds=torch.zeros(1, 2, 16))


def test_masks_are_neither_put_on_twice_nor_used_again(model, ids):
    masks = mask_inputs(model, **KEYS)
    for part in (model, model.base_model):
        with pytest.raises(ConfigError, match="masked already, and would be twice. Call remove"):
            mask_inputs(part, **KEYS)
    masks.remove()
    masks.remove()
    with pytest.raises(ConfigError, match="removed from .* already. Make new ones"), masks:
        model(ids)
    with mask_inputs(model, **KEYS) as again:
        model(ids)
    assert again.is_masked.any()


def test_nnsight_may_have_the_model_already(ids):
    """It puts a function of its own in place of the model's forward, and runs it without values to learn shapes."""
    import nnsight

    model = tiny_model("llama")
    wrapped = nnsight.LanguageModel(model, tokenizer=byte_tokenizer())
    with mask_inputs(model, **KEYS) as masks:
        with wrapped.scan(ids):
            shape = nnsight.save(wrapped.lm_head.output.shape)
        with wrapped.trace(ids):
            found = wrapped.lm_head.output.save()
        corrupted = masks.corrupt(ids)
    assert tuple(shape) == (12, 9, VOCABULARY)
    assert torch.equal(found, model(corrupted).logits) and (corrupted != ids).any()


def test_masks_stay_on_the_device_of_the_ids():
    masks = mask_inputs(tiny_model("llama", layers=1), **KEYS)
    found = masks.corrupt(IDS.to("meta"))
    assert found.is_meta and masks.is_masked.is_meta and masks.is_masked.shape == IDS.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ids_on_a_gpu_get_the_same_masks_there():
    model = tiny_model("llama")
    expected = mask_inputs(model, **KEYS)
    corrupted = expected.corrupt(IDS)
    expected.remove()
    with mask_inputs(model.cuda(), **KEYS) as masks:
        assert model(IDS.cuda()).logits.is_cuda
        found = masks.corrupt(IDS.cuda())
    assert found.is_cuda and masks.is_masked.is_cuda and torch.equal(found.cpu(), corrupted)
