"""The stream: every row once per pool visit, a seeded order, a position of two integers."""

from collections import Counter
from itertools import islice

import pytest
import torch

import masksae
from masksae import ActivationStream
from masksae.activations import from_model, is_sink
from masksae.errors import ConfigError, DataError
from masksae.metrics import contexts


def rows(n, d=3):
    return torch.arange(n * d, dtype=torch.float32).reshape(n, d)


def test_one_visit_shows_every_row_once_and_the_next_visit_another_order():
    x = rows(24)
    stream = ActivationStream.from_array(x, batch_size=6, seed=0)
    batches = [b for b, _ in islice(stream, 8)]
    first, second = torch.cat(batches[:4]), torch.cat(batches[4:])
    assert torch.equal(first.sort(0).values, x) and torch.equal(second.sort(0).values, x)
    assert not torch.equal(first, second) and not torch.equal(first, x)


def test_masks_travel_with_their_rows():
    x = rows(40)
    stream = ActivationStream.from_array(x, batch_size=7, seed=3, is_masked=x[:, 0] % 2 == 0)
    for batch, is_masked in islice(stream, 12):
        assert torch.equal(is_masked, batch[:, 0] % 2 == 0)


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6, 13])
def test_resumes_anywhere(taken):
    def fresh():
        return ActivationStream.from_array(rows(31), batch_size=6, seed=2)

    whole = [b for b, _ in islice(fresh(), 20)]
    stream = fresh()
    list(islice(stream, taken))
    state = stream.state_dict()
    assert set(state) == {"pool", "batch"} and all(isinstance(v, int) for v in state.values())
    other = fresh()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, (b, _) in zip(whole[taken:], islice(other, 20 - taken), strict=True))


def test_scale_is_the_root_mean_square_norm_and_moves_nothing():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).double()
    stream = ActivationStream.from_array(x, batch_size=100, seed=0)
    next(iter(stream))
    assert stream.scale(False) == pytest.approx(x.square().sum(1).mean().sqrt().item())
    assert stream.state_dict() == {"pool": 0, "batch": 1}


@pytest.mark.parametrize("bos_id, kept", [(None, 9), (1, 8)])
def test_from_model_gives_the_masked_models_activations(language_model, ids, tmp_path, bos_id, kept):
    from masksae import mask_tokens
    from masksae.tracing import activations

    if bos_id is not None:
        ids = ids.clone()
        ids[:, 0] = bos_id
    options = dict(
        block=1,
        p=0.4,
        token_id=0,
        mask_seed=5,
        bos_id=bos_id,
        batch_size=4,
        seed=0,
        pool_tokens=3 * kept,
        progress=False,
    )
    corrupted, is_masked = mask_tokens(ids, p=0.4, token_id=0, seed=5, spare=() if bos_id is None else (bos_id,))
    x = activations(language_model.model, corrupted, block=1)[:, 9 - kept :].reshape(-1, 16)
    expected = Counter(
        (tuple(row.tolist()), bool(m)) for row, m in zip(x.half().float(), is_masked[:, 9 - kept :].flatten())
    )
    stream = from_model(language_model, ids, scratch=tmp_path, **options)
    assert stream.batches_per_epoch == 4 * (3 * kept // 4)
    taken = islice(stream, stream.batches_per_epoch)
    seen = Counter((tuple(row.tolist()), bool(m)) for batch, mask in taken for row, m in zip(batch, mask))
    assert seen.total() == 4 * stream.batches_per_epoch and seen <= expected
    assert len(list(tmp_path.glob("pool-*"))) == 4
    again = from_model(language_model, ids, scratch=tmp_path, **options)
    language_model.model = None  # the second epoch and a second stream must not need it
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(islice(again, 9), islice(stream_from_start(stream), 9)))


def stream_from_start(stream):
    stream.load_state_dict({"pool": 0, "batch": 0})
    return stream


def test_half_precision_is_left_where_it_would_overflow(tmp_path):
    from masksae.activations import _read_pool, _write_pool

    x = torch.tensor([[1.0, 7e4]])
    _write_pool(tmp_path / "pool", (x, torch.tensor([False])))
    assert torch.equal(_read_pool(tmp_path / "pool")[0], x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_activations_are_named_before_a_batch_is_given(value):
    x = rows(20)
    x[7, 1] = value
    with pytest.raises(DataError, match="NaN or infinity in at least 1 rows"):
        next(iter(ActivationStream.from_array(x, batch_size=5, seed=0)))


def test_bad_input():
    with pytest.raises(DataError, match="do not fill one batch"):
        ActivationStream.from_array(rows(5), batch_size=6, seed=0)
    with pytest.raises(DataError, match="Flatten"):
        ActivationStream.from_array(torch.zeros(2, 3, 4), batch_size=1, seed=0)
    with pytest.raises(DataError, match="one entry per activation"):
        ActivationStream.from_array(rows(5), batch_size=1, seed=0, is_masked=torch.zeros(4))
    with pytest.raises(ConfigError, match="batch_size"):
        ActivationStream.from_array(rows(5), batch_size=0, seed=0)


def test_views_share_a_pool_and_differ_as_they_say():
    x, masked = torch.arange(40.0)[:, None], torch.arange(40) % 4 == 0
    stream = ActivationStream.from_array(x, batch_size=10, seed=0, is_masked=masked)
    plain, other, dropped = zip(*[next(stream.batches([(0, False), (7, False), (0, True)])) for _ in range(4)])
    alone = [
        batch for batch, _ in zip(ActivationStream.from_array(x, batch_size=10, seed=0, is_masked=masked), range(4))
    ]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(plain, alone))
    seen = lambda view: torch.cat([batch for batch, _ in view]).flatten()
    assert sorted(seen(plain).tolist()) == sorted(seen(other).tolist()) == list(range(40))
    assert not torch.equal(seen(plain), seen(other))
    assert not any(m.any() for _, m in dropped) and set(seen(dropped).tolist()) == set(x[~masked].flatten().tolist())
    assert all(len(batch) == 10 for batch, _ in dropped)
    ordinary = [
        v for v in seen(plain).tolist() if v % 4
    ]  # the same order, the masked ones left out, begun again at the end
    assert seen(dropped).tolist() == (ordinary + ordinary)[:40]


def test_a_pool_of_masked_positions_only_cannot_be_dropped():
    stream = ActivationStream.from_array(
        torch.ones(8, 2), batch_size=4, seed=0, is_masked=torch.ones(8, dtype=torch.bool)
    )
    with pytest.raises(DataError, match="Lower p"):
        next(stream.batches([(0, True)]))


def test_the_next_pool_is_collected_ahead_and_changes_nothing():
    import threading

    loaded = []

    def load(number):
        loaded.append((number, threading.current_thread() is threading.main_thread()))
        return torch.full((8, 1), float(number)), torch.zeros(8, dtype=torch.bool)

    plain, ahead = (ActivationStream(load, [8, 8, 8], batch_size=4, seed=0, prefetch=p) for p in (False, True))
    expected = [x.tolist() for (x, _), _ in zip(plain, range(12))]
    loaded.clear()
    assert [x.tolist() for (x, _), _ in zip(ahead, range(12))] == expected
    assert [n for n, _ in loaded][:4] == [0, 1, 2, 0] and [main for _, main in loaded][:3] == [True, False, False]
    ahead.load_state_dict({"pool": 2, "batch": 0})
    assert next(iter(ahead))[0].tolist() == [[2.0]] * 4  # a jump: what was collected ahead is not this


def test_an_error_ahead_of_time_comes_when_its_pool_does():
    def load(number):
        return torch.full((4, 1), float("nan") if number else 1.0), torch.zeros(4, dtype=torch.bool)

    batches = iter(ActivationStream(load, [4, 4], batch_size=4, seed=0, prefetch=True))
    assert next(batches)[0].tolist() == [[1.0]] * 4
    with pytest.raises(DataError, match="Pool 1"):
        next(batches)


def test_scratch_is_mapped_not_read(language_model, ids, tmp_path):
    source = from_model(
        language_model, ids, block=1, p=0.5, token_id=1, mask_seed=0, bos_id=None, batch_size=4, seed=0,
        scratch=tmp_path, progress=False,
    )  # fmt: skip
    x, _ = next(iter(source))
    pool = source._current()[0]
    assert pool.dtype == torch.float16 and x.dtype == torch.float32
    if __import__("sys").platform == "linux":
        assert "pool-00000.safetensors" in open("/proc/self/maps").read()


def test_targets_travel_with_their_rows():
    x = rows(40)
    masked = x[:, 0] % 2 == 0
    noisy = ActivationStream.from_array(x + 1000, batch_size=7, seed=3, is_masked=masked)
    stream = noisy.with_targets(ActivationStream.from_array(x, batch_size=7, seed=3))
    for [(batch, _, target)] in islice(stream.batches([(3, True)]), 12):
        assert torch.equal(batch - 1000, target) and not (target[:, 0] % 2 == 0).any()
    stream.load_state_dict(noisy.state_dict())
    assert all(torch.equal(a[0], b[0]) for a, b in islice(zip(stream, noisy), 5))
    with pytest.raises(DataError, match="in pools of"):
        noisy.with_targets(ActivationStream.from_array(x[:30], batch_size=7, seed=3))


def test_sinks_are_rows_of_outlying_norm():
    x = torch.ones(100, 4)
    x[7] *= 3.5
    x[8] *= 2.5
    assert is_sink(x, contexts.SINK).nonzero().tolist() == [[7]]


def test_sinks_are_left_out_and_others_come_in_their_place():
    x = torch.ones(40, 3) + torch.arange(40.0)[:, None] / 100
    massive = torch.arange(40) % 8 == 5
    x[massive] *= 50
    whole = ActivationStream.from_array(x, batch_size=10, seed=3)
    stream = ActivationStream.from_array(x, batch_size=10, seed=3, is_masked=massive, sinks=3)
    seen = torch.cat([batch for batch, _ in islice(stream, 4)])
    assert len(seen) == 40 and set(seen[:, 0].tolist()) == set(x[~massive][:, 0].tolist())
    assert not any(masked.any() for _, masked in islice(stream, 4))  # flags go with their rows
    assert stream.scale(False) < 3 < whole.scale(False)
    assert stream.batches_per_epoch == whole.batches_per_epoch
    assert stream.identity() | {"sinks": 3.0} == stream.identity() and "sinks" not in whole.identity()

    targets = stream.with_targets(ActivationStream.from_array(x + 1000, batch_size=10, seed=3))
    for [(batch, _, target)] in islice(targets.batches([(3, False)]), 4):
        assert torch.allclose(batch + 1000, target) and batch.max() < 3
    assert targets.identity()["sinks"] == 3.0

    same = ActivationStream.from_array(x, batch_size=10, seed=3, sinks=1000)  # none is that large
    assert all(torch.equal(a, b) for (a, _), (b, _) in islice(zip(whole, same), 4))


def test_a_share_of_the_blocks_uses_the_scratch_of_the_whole(language_model, ids, tmp_path):
    options = dict(block=1, p=0.3, token_id=0, mask_seed=0, bos_id=None, batch_size=4, seed=0, pool_tokens=45)
    whole = from_model(language_model, ids, scratch=tmp_path, progress=False, **options)
    part = from_model(language_model, ids, scratch=tmp_path, progress=False, share=0.6, **options)
    assert part._sizes == [45, 18] and whole._sizes == [45, 45, 18]
    x, is_masked = part._load(1)
    assert torch.equal(x, whole._load(1)[0][:18]) and len(is_masked) == 18


@pytest.mark.parametrize("drop_masked", [False, True])
def test_the_next_pool_made_beside_training_changes_nothing(language_model, ids, drop_masked):
    """As on a GPU: the model runs in a thread while SAEs train, and nothing is stored."""
    options = dict(
        block=1, p=0.4, token_id=1, mask_seed=0, bos_id=None, batch_size=8, seed=0, pool_tokens=30, progress=False
    )
    config = masksae.TrainConfig(steps=40, lr=1e-3, warmup=2, threshold_start=5)
    saes = [masksae.SAEConfig(16, 32, masksae.BatchTopK(3), seed=s, drop_masked=drop_masked) for s in range(2)]
    found = [
        masksae.train(saes, from_model(language_model, ids, overlap=overlap, **options), config, progress=False)
        for overlap in (False, True)
    ]
    for one, other in zip(*found):
        assert torch.equal(one.W_dec, other.W_dec) and torch.equal(one.threshold, other.threshold)


def test_blocks_on_disk_give_the_stream_of_blocks_in_memory(language_model, ids, tmp_path):
    import datasets

    from masksae.data.blocks import Blocks

    stored = Blocks(datasets.Dataset.from_dict({"ids": ids.int().numpy()}))
    assert len(stored) == len(ids) and stored.shape == tuple(ids.shape) and torch.equal(stored[3:7], ids[3:7])
    options = dict(
        block=1, p=0.4, token_id=1, mask_seed=0, bos_id=None, batch_size=8, seed=0, pool_tokens=30, progress=False
    )
    for (a, m), (b, n), _ in zip(*(from_model(language_model, x, **options) for x in (ids, stored)), range(20)):
        assert torch.equal(a, b) and torch.equal(m, n)
