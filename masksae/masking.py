"""Masked regularisation itself: replace random input tokens by one special token.

A pure function of (ids, p, token, seed, index of the sequence). Each sequence draws from its own Philox counter stream,
keyed by (seed, index), so its mask is the same however sequences are batched, resumed or spread over workers, and
raising p only adds masked positions to those of a smaller p. Costs about 15 microseconds a sequence.
"""

import numpy as np
import torch
from torch import Tensor

from masksae.errors import ConfigError, DataError


def mask_tokens(
    ids: Tensor, *, p: float, token_id: int, seed: int, first_sequence: int = 0, spare=(),
    vocab_size: int | None = None, replacements: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replace each token by `token_id`, independently with probability `p`.

    ids             int64 [n, s], never changed in place
    p               in [0, 1]; 0 returns the ids as they are
    token_id        the special token (arXiv 2604.06495 uses one token and p = .3)
    seed            0 to 2**63 - 1; another seed gives independent masks
    first_sequence  index of ids[0] in the whole data set: sequence i always gets mask number first_sequence + i
    spare           ids that are never replaced (give the BOS id here)
    vocab_size      if given, every id must be below it
    replacements    int64 [m]: masked positions get one of these, drawn uniformly, in place of token_id; give a text's
                    tokens to draw by their frequency. The masks are the same with and without

    Returns (corrupted_ids int64 [n, s], is_masked bool [n, s]), both on the device of `ids`; the masks are the same on
    every device. Raises ConfigError or DataError.

    >>> ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    >>> mask_tokens(ids, p=0.5, token_id=0, seed=3, spare=(1,))[0]
    tensor([[1, 0, 0, 7, 8, 0]])
    """
    _check(ids, p, token_id, seed, first_sequence, vocab_size)
    if replacements is not None:
        found = getattr(replacements, "dtype", type(replacements).__name__), tuple(getattr(replacements, "shape", ()))
        if found[0] != torch.int64 or len(found[1]) != 1 or found[1] == (0,):
            raise DataError(f"replacements must be int64 [m] with at least one id, found {found[0]} {found[1]}.")
    n, s = ids.shape
    if p == 0:
        return ids.clone(), torch.zeros(n, s, dtype=torch.bool, device=ids.device)
    uniform = np.empty((n, 1 if replacements is None else 2, s))
    for i in range(n):
        draws(seed, int(first_sequence) + i).random(out=uniform[i])
    is_masked = torch.from_numpy(uniform[:, 0] < p).to(ids.device)
    for kept in spare:
        is_masked &= ids != kept
    if replacements is None:
        return ids.masked_fill(is_masked, int(token_id)), is_masked
    index = torch.from_numpy((uniform[:, 1] * len(replacements)).astype(np.int64))
    drawn = replacements[index.to(replacements.device)].to(ids.device)
    _check_range(drawn, vocab_size)
    return torch.where(is_masked, drawn, ids), is_masked


def draws(seed: int, number: int, stretch: int = 0) -> np.random.Generator:
    """Random numbers of a pair of natural numbers below 2**64. Stretches of one pair (masks take 0, noise 1, orders 2)
    do not meet: 2**192 steps of the counter lie between them."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64), counter=stretch << 192))


def check_natural(name: str, value) -> None:
    """Raise ConfigError unless `value` is an integer that a seed, an id or an index can be: half of a Philox key, or a
    token."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**63:
        raise ConfigError(f"{name} must be an integer from 0 to 2**63 - 1, found {value!r}.")


def _check(ids, p, token_id, seed, first_sequence, vocab_size) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(
            f"ids must be an int64 tensor of token ids, found {found}. Convert with torch.as_tensor(..., "
            "dtype=torch.int64)."
        )
    if ids.ndim != 2:
        raise DataError(
            f"ids must have shape [sequences, tokens], found {tuple(ids.shape)}. Add a batch dimension with ids[None]."
        )
    if isinstance(p, bool) or not isinstance(p, (int, float, np.integer, np.floating)) or not 0 <= p <= 1:
        raise ConfigError(f"p is the probability of masking a token and must lie in [0, 1], found {p!r}.")
    for name, value in (("token_id", token_id), ("seed", seed), ("first_sequence", first_sequence)):
        check_natural(name, value)
    if vocab_size is not None and token_id >= vocab_size:
        raise ConfigError(
            f"token_id {token_id} is outside the vocabulary of {vocab_size} tokens. Take the mask token from this "
            "model's tokenizer."
        )
    _check_range(ids, vocab_size)


def _check_range(ids: Tensor, vocab_size: int | None) -> None:
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            bad = low if low < 0 else high
            raise DataError(
                f"token id {bad} is outside the vocabulary (0 to {(vocab_size or 2**63) - 1}). Tokenise with this "
                "model's tokenizer."
            )
