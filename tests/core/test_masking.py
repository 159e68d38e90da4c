"""Masking is a pure function of (ids, p, token, seed, index of the sequence)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_device import OneDevice

from masksae import mask_tokens
from masksae.errors import ConfigError, DataError


def sequences(n, s, seed=0, low=1, high=1000):
    return torch.randint(low, high, (n, s), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    s=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    p=st.floats(0, 1),
    cuts=st.lists(st.integers(0, 12)),
    start=st.integers(0, 2**40),
)
def test_a_sequence_keeps_its_mask_however_it_is_batched(n, s, seed, p, cuts, start):
    ids = sequences(n, s)
    whole, where = mask_tokens(ids, p=p, token_id=0, seed=seed, first_sequence=start)
    edges = sorted({0, n, *(c for c in cuts if c < n)})
    for low, high in zip(edges, edges[1:]):
        part, part_where = mask_tokens(ids[low:high], p=p, token_id=0, seed=seed, first_sequence=start + low)
        assert torch.equal(part, whole[low:high]) and torch.equal(part_where, where[low:high])


def test_replaces_exactly_the_marked_positions_and_leaves_its_input():
    ids = sequences(50, 64)
    before = ids.clone()
    out, where = mask_tokens(ids, p=0.3, token_id=0, seed=1)
    assert torch.equal(ids, before)
    assert torch.equal(out[where], torch.zeros_like(out[where])) and torch.equal(out[~where], ids[~where])


def test_rate_is_p_within_five_standard_errors_and_neighbours_are_independent():
    p, ids = 0.3, sequences(400, 256)
    where = mask_tokens(ids, p=p, token_id=0, seed=5)[1].double()
    error = (p * (1 - p) / where.numel()) ** 0.5
    assert abs(where.mean().item() - p) < 5 * error
    for a, b in ((where[:, 1:], where[:, :-1]), (where[1:], where[:-1])):
        covariance = ((a - p) * (b - p)).mean().item()
        assert abs(covariance) < 5 * p * (1 - p) / a.numel() ** 0.5
    other = mask_tokens(ids, p=p, token_id=0, seed=6)[1].double()
    assert abs(((where - p) * (other - p)).mean().item()) < 5 * p * (1 - p) / where.numel() ** 0.5


def test_zero_is_the_identity_one_masks_everything_and_more_p_only_adds():
    ids = sequences(20, 30)
    out, where = mask_tokens(ids, p=0, token_id=0, seed=0)
    assert torch.equal(out, ids) and not where.any()
    assert (mask_tokens(ids, p=1, token_id=0, seed=0)[0] == 0).all()
    little, much = (mask_tokens(ids, p=p, token_id=0, seed=0)[1] for p in (0.2, 0.6))
    assert (much | ~little).all()


def test_spared_ids_survive_even_p_one():
    ids = sequences(20, 30, low=1, high=6)
    out, where = mask_tokens(ids, p=1, token_id=0, seed=0, spare=(1, 3))
    spared = (ids == 1) | (ids == 3)
    assert spared.any() and torch.equal(where, ~spared) and torch.equal(out[spared], ids[spared])


def test_known_answer():
    """Freezes the random numbers: a change here changes every masked run."""
    where = mask_tokens(torch.ones(2, 12, dtype=torch.int64), p=0.3, token_id=0, seed=7, first_sequence=3)[1]
    for row, sequence in zip(where, (3, 4)):
        expected = np.random.Generator(np.random.Philox(key=np.array([7, sequence], dtype=np.uint64))).random(12) < 0.3
        assert row.tolist() == expected.tolist()
    assert where.int().tolist() == [[0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1]]


GOOD = dict(p=0.3, token_id=0, seed=0)


@pytest.mark.parametrize(
    "ids, changed, error, words",
    [
        (sequences(2, 3), {"p": 1.2}, ConfigError, "[0, 1], found 1.2"),
        (sequences(2, 3), {"p": -0.1}, ConfigError, "found -0.1"),
        (sequences(2, 3), {"p": float("nan")}, ConfigError, "found nan"),
        (sequences(2, 3), {"p": True}, ConfigError, "found True"),
        (sequences(2, 3), {"token_id": -1}, ConfigError, "token_id"),
        (sequences(2, 3), {"token_id": 1.5}, ConfigError, "token_id"),
        (sequences(2, 3), {"token_id": 5000, "vocab_size": 1000}, ConfigError, "outside the vocabulary of 1000"),
        (sequences(2, 3, low=1000, high=1001), {"vocab_size": 1000}, DataError, "token id 1000"),
        (-sequences(2, 3), {}, DataError, "outside the vocabulary"),
        (sequences(2, 3).float(), {}, DataError, "torch.float32"),
        (sequences(2, 3).int(), {}, DataError, "torch.int32"),
        (sequences(2, 3)[0], {}, DataError, "[sequences, tokens]"),
        ([[1, 2]], {}, DataError, "list"),
        (sequences(2, 3), {"seed": -1}, ConfigError, "seed"),
        (sequences(2, 3), {"first_sequence": -1}, ConfigError, "first_sequence"),
        (sequences(2, 3), {"seed": 2**63}, ConfigError, "seed must be an integer from 0 to 2**63 - 1"),
        (sequences(2, 3), {"seed": 10**30}, ConfigError, "seed must be an integer from 0 to 2**63 - 1"),
        (sequences(2, 3), {"p": np.nan}, ConfigError, "found nan"),
        (sequences(2, 3), {"p": "0.3"}, ConfigError, "found '0.3'"),
        (sequences(2, 3), {"vocab_size": 0}, ConfigError, "vocabulary of 0"),
        (sequences(2, 3), {"replacements": torch.tensor([5, -1])}, DataError, "token id -1"),
        (sequences(2, 3), {"replacements": torch.tensor([5, 2000]), "vocab_size": 1000}, DataError, "token id 2000"),
    ],
)
def test_bad_input(ids, changed, error, words):
    with pytest.raises(error) as caught:
        mask_tokens(ids, **(GOOD | changed))
    assert words in str(caught.value)


def test_replacements_are_drawn_by_their_share_at_the_same_places():
    ids, drawn = torch.full((200, 50), 7), torch.tensor([1, 1, 1, 2])
    plain, is_masked = mask_tokens(ids, p=0.4, token_id=0, seed=5)
    corrupted, again = mask_tokens(ids, p=0.4, token_id=0, seed=5, replacements=drawn)
    assert torch.equal(is_masked, again) and (corrupted[~again] == 7).all()
    share = (corrupted[again] == 1).double().mean().item()
    assert set(corrupted[again].tolist()) == {1, 2} and share == pytest.approx(0.75, abs=0.03)
    later, _ = mask_tokens(ids[3:], p=0.4, token_id=0, seed=5, first_sequence=3, replacements=drawn)
    assert torch.equal(later, corrupted[3:])
    for none in (torch.tensor([1.0]), torch.tensor(1), torch.tensor([], dtype=torch.int64), [1, 2]):
        with pytest.raises(DataError, match="replacements must be int64"):
            mask_tokens(ids, p=0.4, token_id=0, seed=5, replacements=none)


@pytest.mark.parametrize("replacements", [None, "here", "there"])
@pytest.mark.parametrize("p", [0, 0.4, 1])
def test_masks_are_where_the_ids_are(monkeypatch, p, replacements):
    """On the `meta` device, where nothing may be mixed with tensors of the CPU, as on a GPU."""
    monkeypatch.setattr("masksae.masking._check_range", lambda *values: None)  # it looks at values
    ids = torch.zeros(4, 6, dtype=torch.int64, device="meta")
    drawn = replacements and torch.ones(3, dtype=torch.int64, device="meta" if replacements == "here" else "cpu")
    with OneDevice():
        corrupted, is_masked = mask_tokens(ids, p=p, token_id=1, seed=0, spare=(0, 7), replacements=drawn)
    assert corrupted.is_meta and is_masked.is_meta and is_masked.dtype == torch.bool
    assert corrupted.shape == is_masked.shape == (4, 6)


def test_numpy_numbers_are_numbers():
    ids = sequences(3, 8)
    ours = mask_tokens(ids, p=0.25, token_id=1, seed=3)
    theirs = mask_tokens(ids, p=np.float32(0.25), token_id=np.int32(1), seed=np.uint8(3))
    assert all(map(torch.equal, ours, theirs))
