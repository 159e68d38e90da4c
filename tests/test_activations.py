"""The stream: every row once per pool visit, a seeded order, a position of two integers."""

from collections import Counter
from itertools import islice

import pytest
import torch

from masksae import ActivationStream
from masksae.activations import from_model
from masksae.errors import ConfigError, DataError


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
    assert stream.scale() == pytest.approx(x.square().sum(1).mean().sqrt().item())
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
    assert len(list(tmp_path.iterdir())) == 4
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


def test_damaged_scratch_is_named(tmp_path, language_model, ids):
    options = dict(
        block=1, p=0.0, token_id=0, mask_seed=0, bos_id=None, batch_size=4, seed=0, scratch=tmp_path, progress=False
    )
    next(iter(from_model(language_model, ids, **options)))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="Delete it"):
        next(iter(from_model(language_model, ids, **options)))


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
