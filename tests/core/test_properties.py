"""Properties of streams, masks and selections that hold for whatever sizes, seeds and values Hypothesis comes up
with."""

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_saes import ALL_RULES, random_sae
from scipy.stats import binomtest
from tiny_project import VOCABULARY, tiny_model

from masksae import ActivationStream, BatchTopK, TopK, mask_dataset, mask_inputs
from masksae.saes.rules import largest

quick = settings(max_examples=60, deadline=None)
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def make(pools, batch_size, seed):
    """A stream of several pools whose rows are their numbers; every third row is masked."""
    starts = [sum(pools[:i]) for i in range(len(pools))]

    def load(number):
        rows = torch.arange(starts[number], starts[number] + pools[number])
        return rows[:, None].float(), rows % 3 == 0

    return ActivationStream(load, pools, batch_size=batch_size, seed=seed)


def rows_of(stream, batches):
    return [next(iter(stream))[0][:, 0].long().tolist() for _ in range(batches)]


@given(sizes, st.integers(1, 12), st.integers(0, 5), st.integers(0, 30))
@quick
def test_a_stream_resumes_anywhere_to_the_same_batches(pools, batch_size, seed, taken):
    pools = [max(size, batch_size) for size in pools]
    stream = make(pools, batch_size, seed)
    rows_of(stream, taken)
    position = stream.state_dict()
    expected = rows_of(stream, 7)
    other = make(pools, batch_size, seed)
    other.load_state_dict(position)
    assert rows_of(other, 7) == expected and set(position) == {"pool", "batch"}


@given(sizes, st.integers(1, 12), st.integers(0, 5))
@quick
def test_an_epoch_shows_no_row_twice_and_leaves_out_less_than_a_batch_of_each_pool(pools, batch_size, seed):
    pools = [max(size, batch_size) for size in pools]
    stream = make(pools, batch_size, seed)
    for _ in range(2):
        shown = sum(rows_of(stream, stream.batches_per_epoch), [])
        assert len(set(shown)) == len(shown) == sum(size - size % batch_size for size in pools)
        start = 0
        for size in pools:
            assert sum(start <= row < start + size for row in shown) == size - size % batch_size
            start += size


@given(st.integers(6, 40), st.integers(1, 6), st.integers(0, 5))
@quick
def test_dropping_shows_no_masked_row_and_the_others_about_equally_often(size, batch_size, seed):
    batches = make([size], batch_size, seed).batches([(seed, True), (seed + 1, False)])
    dropped = [next(batches)[0][0][:, 0].long().tolist() for _ in range(size // batch_size)]
    shown = sum(dropped, [])
    assert all(row % 3 for row in shown)
    counts = [shown.count(row) for row in range(size) if row % 3]
    assert max(counts) - min(counts) <= 1 + size % batch_size


values = st.lists(
    st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0]) | st.floats(-4, 4, width=32), min_size=96, max_size=96
)


@given(st.lists(values, min_size=1, max_size=5), st.integers(1, 12), st.sampled_from([TopK, BatchTopK]))
@quick
def test_top_k_keeps_the_largest_positive_values_and_no_more(rows, k, kind):
    sae, pre = random_sae(kind(k)), torch.tensor(rows, dtype=torch.float64)
    f = sae.config.selection.dense(sae, pre, 0.0)[0]
    assert ((f == 0) | (f == pre)).all() and (f >= 0).all()
    groups = [(f, pre, k * len(rows))] if kind is BatchTopK else [(f[i], pre[i], k) for i in range(len(rows))]
    for kept, given_, most in groups:
        positive = given_[given_ > 0].sort(descending=True).values
        assert torch.equal(kept[kept > 0].sort(descending=True).values, positive[:most])


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 9, width=32), min_size=1, max_size=400), st.integers(1, 60)
)
@quick
def test_the_largest_of_a_batch_are_those_of_a_sort(numbers, count):
    h = torch.tensor(numbers).view(1, -1)
    found = h.flatten()[largest(h, count)]
    assert torch.equal(found.sort().values, h.flatten().sort().values[-count:][h.flatten().sort().values[-count:] > 0])


@given(st.sampled_from(ALL_RULES), st.integers(0, 1000), st.floats(0.1, 10))
@quick
def test_latents_scale_with_the_activations(rule, seed, scale):
    """An SAE folded for activations `scale` times as large gives latents and reconstructions as much larger."""
    sae = random_sae(rule)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(seed)).double()
    f, x_hat = sae.encode(x), sae(x)
    sae.requires_grad_(False).rescale_(scale)
    torch.testing.assert_close(sae.encode(scale * x), scale * f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae(scale * x), scale * x_hat, rtol=1e-9, atol=1e-9)


MODEL = tiny_model("llama", layers=1)
seeds, shares = st.integers(0, 2**63 - 1), st.sampled_from([0.0, 1.0]) | st.floats(1e-9, 1)


def masks_of(number, p, seed):
    """(sequences [128, 32], where they are masked by content); the sequences are distinct but for a chance of
    nothing."""
    ids = torch.randint(2, VOCABULARY, (128, 32), generator=torch.Generator().manual_seed(number))
    with mask_inputs(MODEL, p=p, token_id=1, seed=seed, spare=[0]) as masks:
        corrupted = masks.corrupt(ids)
    assert torch.equal(corrupted, ids.masked_fill(masks.is_masked, 1))
    return masks.is_masked


@given(
    st.lists(st.lists(st.integers(0, 90), max_size=9), min_size=1, max_size=30), shares, seeds, st.integers(1, 5),
    st.integers(1, 3), st.integers(1, 9), st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_masks_by_content_do_not_depend_on_batches_shards_nodes_or_order(rows, p, seed, shards, nodes, buffer, late):
    keys = {"p": p, "token_id": 1, "seed": seed, "spare": [0]}
    data = datasets.Dataset.from_list([{"input_ids": row, "row": i} for i, row in enumerate(rows)])
    data = data.cast_column("input_ids", datasets.List(datasets.Value("int64")))
    stream = data.to_iterable_dataset(min(shards, len(rows)))
    stream = stream if late else mask_dataset(stream, **keys)
    parts = [split_dataset_by_node(stream.shuffle(seed=1, buffer_size=buffer), rank, nodes) for rank in range(nodes)]
    parts = [mask_dataset(part, **keys) if late else part for part in parts]
    found = {row["row"]: row["input_ids"] for part in parts for row in part}
    with mask_inputs(MODEL, **keys) as masks:
        assert found == {i: masks.corrupt(torch.tensor([row]).long())[0].tolist() for i, row in enumerate(rows)}


@given(st.integers(0, 2**32), shares, seeds)
@quick
def test_a_share_p_is_masked_by_content_and_more_p_only_adds(number, p, seed):
    where, more = masks_of(number, p, seed), masks_of(number, (1 + p) / 2, seed)
    assert (more | ~where).all()
    assert binomtest(int(where.sum()), where.numel(), p).pvalue > 1e-9


@given(st.integers(0, 2**32), st.floats(0.05, 0.95), seeds, seeds | st.integers(1, 3))
@quick
def test_masks_of_two_seeds_are_independent(number, p, seed, other):
    """They agree at a position as often as two coins do, whether the seeds are neighbours or far from each other."""
    other = seed + other if other < 4 and seed < 2**62 else other
    assume(seed != other)
    agree = masks_of(number, p, seed) == masks_of(number, p, other)
    assert binomtest(int(agree.sum()), agree.numel(), p**2 + (1 - p) ** 2).pvalue > 1e-9
