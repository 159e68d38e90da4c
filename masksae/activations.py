"""Shuffled batches of activations for training; the position in the stream is two integers.

Activations come in pools (a slice of an array, or the output of one stretch of forwards). Each visit of a pool draws
its own permutation from (seed, number of the visit), so resuming needs no shuffle buffer: `state_dict()` is {"pool",
"batch"}. Tokens that do not fill a last batch of a pool are left out of that visit; another visit leaves out others.

One pool serves several views at once: orders of different seeds, and masked positions kept or dropped. Where masked
positions are dropped the others come round again within the visit, so that every view has full batches and as many of
them.

The next pool may be made in a thread while the current one is used. One lock is around every load of a process: two
streams of one language model never run it at the same time. The thread ends with its pool, and before the iterator or
the training that began it.
"""

import contextlib
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masksae import progress as bars
from masksae.cache import fingerprint, spaced
from masksae.errors import ConfigError, DataError
from masksae.files import atomic_file, ensure_writable, read_json, read_safetensors, run_id, save_tensors, write_json
from masksae.masking import check_natural, draws, mask_tokens

Pool = tuple[Tensor, ...]
"""Activations [n, d] (any float type), is_masked bool [n], and where there are any, targets [n, d]: what is to be
reconstructed."""

LARGEST_MOVED = 2**31
"""An array of more bytes stays where it is, and its batches are moved: a memory map is never copied to a GPU whole."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_loading = threading.RLock()
_here = threading.local()
"""`_here.reads`: how many pools this thread is making, one inside another."""


@contextlib.contextmanager
def between_pools() -> Iterator[None]:
    """Inside, no other thread of this process makes a pool for a stream: none runs a language model, takes memory of
    the device or waits for it."""
    with _loading:
        yield


def _reads() -> int:
    return getattr(_here, "reads", 0)


class ActivationStream:
    """An endless iterator over (x float32 [batch_size, d], is_masked bool [batch_size]).

    The position belongs to the stream: iterators of one stream share it, and give every batch once between them.

    load        pool number -> (x [n, d], is_masked [n]); called for 0 .. n_pools - 1, again in every epoch, and gives
                the same then
    pool_sizes  rows of each pool
    fresh       `load` gets a number of its own for every visit of a pool, epoch n_pools + pool number, and need not
                give the same in another epoch; still the same for the same number
    prefetch    call `load` for the next pool in a thread while the current one is used; memory for two pools
    d_model     width of the activations; None: found out by loading a pool
    sinks       leave out rows with more than so many times the median norm of their pool (`is_sink`), above 1: others
                of the pool come twice in their place. None: none is left out
    identity    says what the stream is made of, as JSON (see `identity()`); None: what the first pool holds

    >>> stream = ActivationStream.from_array(torch.arange(6.0)[:, None], batch_size=2, seed=0)
    >>> x, is_masked = next(iter(stream))
    >>> x.shape, is_masked.any().item(), stream.state_dict()
    (torch.Size([2, 1]), False, {'pool': 0, 'batch': 1})
    """

    def __init__(
        self, load: Callable[[int], Pool], pool_sizes: list[int], *, batch_size: int, seed: int, prefetch: bool = False,
        d_model: int | None = None, identity: Callable[[], dict] | None = None, fresh: bool = False,
        sinks: float | None = None,
    ):  # fmt: skip
        if sinks is not None:
            _check_number("sinks is in medians of the norm", sinks, above=1)
        check_natural("batch_size", batch_size)
        check_natural("seed", seed)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be positive, found {batch_size}.")
        self._load, self._sizes, self._prefetch, self._fresh = load, list(pool_sizes), prefetch, fresh
        self._full = list(accumulate(size // batch_size for size in self._sizes))  # batches up to the end of each pool
        if not self._full or self._full[-1] == 0:
            raise DataError(
                f"{sum(pool_sizes)} activations do not fill one batch of {batch_size}. Give more text or a smaller "
                "batch_size."
            )
        self.batch_size, self.seed = int(batch_size), int(seed)
        self._d_model, self._made_of, self._sinks = d_model, identity or self._first_pool, sinks
        self._pool, self._batch = 0, 0
        self._end: int | None = None
        self._device = torch.device("cpu")
        self._held: tuple[int, Pool] | None = None
        self._ahead: _Ahead | None = None
        self._beside: Any = None  # stream of a GPU in which pools are made ahead
        self._largest = float("inf")  # pool, in bytes, that goes to another device whole

    @classmethod
    def from_array(
        cls, x, *, batch_size: int, seed: int, is_masked=None, sinks: float | None = None
    ) -> "ActivationStream":
        """Stream over an array or memory map `x` [n, d] of floats; one pool. On another device than the array's, what
        is larger than LARGEST_MOVED stays where it is and is moved batch by batch, in the same order.

        is_masked  bool [n]
        sinks      as above

        Raises DataError for another type or shape, and for NaN or infinity when the first batch is taken.
        """
        x = _as_tensor("Activations", x)
        if x.ndim != 2:
            raise DataError(
                f"Activations must have shape [tokens, d_model], found {tuple(x.shape)}. Flatten batch and sequence."
            )
        is_masked = torch.zeros(len(x), dtype=torch.bool) if is_masked is None else _as_tensor("is_masked", is_masked)
        _check_pool((x, is_masked), tuple(x.shape), "of the array")
        stream = cls(
            lambda _: (x, is_masked), [len(x)], batch_size=batch_size, seed=seed, d_model=x.shape[1], sinks=sinks,
            identity=lambda: {"kind": "array"} | _content((x, is_masked)),
        )  # fmt: skip
        stream._largest = LARGEST_MOVED
        return stream

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass over all pools."""
        return self._full[-1]

    @property
    def d_model(self) -> int:
        """Width of the activations (of `load`s that do not say it: loads the current pool)."""
        if self._d_model is None:
            self._hold(self._number(self._pool))
        return self._d_model

    def to(self, device) -> "ActivationStream":
        """Keep the pool in use on `device`: a GPU then gets it once, and no step waits for a copy. Of large arrays, see
        `from_array`."""
        if torch.device(device) != self._device:
            self._drop_ahead()
            self._device, self._held = torch.device(device), None
        return self

    def identity(self) -> dict:
        """What the stream gives is made of, as JSON: sizes, types, where it comes from and a fingerprint of the
        content. Two streams with the same identity, batch_size and seed give the same batches. `train` keeps it in its
        checkpoints.

        Cheap, and so not complete: of more than 8,192 rows of an array or entries of a parameter of the model, and of
        more than 4,096 blocks of text, it reads evenly spaced ones (is_masked wholly). A change between them goes
        unnoticed, one of everything does not.
        """
        return self._made_of() | ({"sinks": float(self._sinks)} if self._sinks else {})

    def __iter__(self) -> Iterator[Pool]:
        return (views[0][:2] for views in self.batches([(self.seed, False)]))

    def with_targets(self, clean: "ActivationStream") -> "ActivationStream":
        """The same stream with the activations of another, row by row, as what is to be reconstructed. Raises
        DataError."""
        if clean._sizes != self._sizes:
            raise DataError(
                f"The targets come in pools of {clean._sizes} rows, the activations in pools of {self._sizes}."
            )

        def load(number: int) -> Pool:
            return (*self._load(self._number(number))[:2], clean._load(clean._number(number))[0])

        stream = ActivationStream(
            load, self._sizes, batch_size=self.batch_size, seed=self.seed, prefetch=self._prefetch,
            d_model=self._d_model, identity=lambda: self._made_of() | {"targets": clean._made_of()},
            fresh=self._fresh or clean._fresh, sinks=self._sinks,
        )  # fmt: skip
        stream._largest = min(self._largest, clean._largest)
        return stream

    def batches(self, views: list[tuple[int, bool]]) -> Iterator[list[Pool]]:
        """One batch per view (seed of the order, whether masked positions are dropped), again and again; moves the
        position, from wherever it is at the time."""
        for seed, _ in views:
            check_natural("seed", seed)
        return self._batches(views)

    def _batches(self, views: list[tuple[int, bool]]) -> Iterator[list[Pool]]:
        orders: dict = {}
        try:
            while True:
                yield self._next(views, orders)  # without a name here: neither batch nor pool must outlive its use
        finally:
            # the garbage collector may end an iterator in any thread; one that makes a pool must not wait for another
            # that wants to
            if self._ahead and not _reads():
                self._ahead.wait()

    def _next(self, views: list[tuple[int, bool]], orders: dict) -> list[Pool]:
        """The batch at the position, which moves on; `orders` keeps those of one visit of a pool."""
        while (self._batch + 1) * self.batch_size > self._sizes[self._pool % len(self._sizes)]:
            self._pool, self._batch = self._pool + 1, 0
        pool = self._current()
        visit = self._pool, pool[0].device
        if visit not in orders:
            orders.clear()
            found = [self._order(seed, self._pool, pool[1] if dropped else None) for seed, dropped in views]
            orders[visit] = [_moved(order, pool[0].device) for order in found]
        part = slice(self._batch * self.batch_size, (self._batch + 1) * self.batch_size)
        self._batch += 1
        return [self._given(pool, order[part]) for order in orders[visit]]

    def _given(self, pool: Pool, rows: Tensor) -> Pool:
        """A batch in single precision on the stream's device, where all but those of large pools are already."""
        x, is_masked, *targets = (_moved(values[rows], self._device) for values in pool)
        return x.float(), is_masked, *(target.float() for target in targets)

    def scale(self, batches: int = 100) -> float:
        """Root mean square norm over the first `batches` batches of the first pool; the stream does not move."""
        x, order = self._hold(0)[0], self._order(self.seed, 0)[: batches * self.batch_size]
        total = sum(x[rows].double().square().sum().item() for rows in order.to(x.device).split(8192))
        return (total / len(order)) ** 0.5

    @contextlib.contextmanager
    def until(self, batches: int) -> Iterator[None]:
        """Inside, no pool is made ahead that the first `batches` batches of the stream do not need. Where the outermost
        one ends, no thread is at work any more."""
        before, self._end = self._end, batches
        try:
            yield
        finally:
            self._end = before
            if before is None:
                self._drop_ahead()

    def state_dict(self) -> dict[str, int]:
        """Pools finished, batches taken from the current one."""
        return {"pool": self._pool, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position that `state_dict` gave; living iterators do so too."""
        self._pool, self._batch = int(state["pool"]), int(state["batch"])

    def _order(self, seed: int, visit: int, dropped: Tensor | None = None) -> Tensor:
        """Rows of a visit's pool in the order of a seed; without the `dropped` ones, the others repeated to the same
        number."""
        size = self._sizes[visit % len(self._sizes)]
        order = torch.from_numpy(draws(seed, visit).permutation(size))
        if dropped is None:
            return order
        order = order[~dropped.cpu()[order]]
        if len(order) == 0:
            raise DataError("Every position of a pool of activations is masked: dropping them leaves nothing. Lower p.")
        return order.repeat(-(-size // len(order)))[:size]

    def _number(self, visit: int) -> int:
        """What `load` is called with for a visit of a pool."""
        return visit if self._fresh else visit % len(self._sizes)

    def _current(self) -> Pool:
        """The pool of the position; begins to make the next one."""
        pool = self._hold(self._number(self._pool))
        ahead = self._prefetch and self._ahead is None and not _reads()  # inside a load, the lock is taken
        if ahead and (following := self._following()) is not None:
            self._ahead = _Ahead(following, self._read_beside)
        return pool

    def _following(self) -> int | None:
        """Number of the pool that is needed after that of the position; None if it is the same one, or beyond the
        end."""
        pools = len(self._sizes)
        epochs, number = divmod(self._pool, pools)
        if self._end is not None and epochs * self._full[-1] + self._full[number] >= self._end:
            return None
        visits = range(self._pool + 1, self._pool + 1 + pools)
        following = self._number(next(n for n in visits if self._sizes[n % pools] >= self.batch_size))
        return None if following == self._number(self._pool) else following

    def _hold(self, number: int) -> Pool:
        if self._held is None or self._held[0] != number:
            self._held = None
            ahead = self._ahead
            self._drop_ahead()
            if ahead and ahead.number == number:
                self._held = number, _handed_over(ahead.pool())
            else:  # the first, or one after a jump
                self._held = number, self._read(number)
        return self._held[1]

    def _drop_ahead(self) -> None:
        if self._ahead:
            self._ahead.wait()  # if this is interrupted, another call waits again
            self._ahead = None

    def _read_beside(self, number: int) -> Pool:
        """`_read` in another thread; on a GPU in a stream of its own, or it would queue up behind the training
        steps. One stream for all pools: what is freed in one is not memory for another."""
        if self._device.type != "cuda":
            return self._read(number)
        if self._beside is None:
            self._beside = torch.cuda.Stream(self._device)
            self._beside.wait_stream(torch.cuda.default_stream(self._device))  # where the model was loaded
        with _loading:
            with torch.cuda.stream(self._beside):
                pool = self._read(number)
            self._beside.synchronize()  # this thread waits, not the one that trains
        return pool

    def _read(self, number: int) -> Pool:
        _here.reads = _reads() + 1
        try:
            with _loading:
                pool = self._load(number)
                self._check_read(number, pool)
                if self._sinks:
                    pool = _without_sinks(pool, self._sinks)
                small = sum(values.numel() * values.element_size() for values in pool) <= self._largest
                return tuple(values.to(self._device if small else pool[0].device) for values in pool)
        finally:
            _here.reads -= 1

    def _check_read(self, number: int, pool: Pool) -> None:
        x, _, *targets = pool
        width = self._d_model or (x.shape[-1] if x.ndim else 0)
        _check_pool(pool, (self._sizes[number % len(self._sizes)], width), f"of pool {number}")
        self._d_model = width
        for part in (part for values in (x, *targets) for part in values.split(8192)):
            finite = torch.isfinite(part.float() if part.dtype == torch.float64 else part)
            if not finite.all():
                bad = int((~finite).any(1).sum())
                raise DataError(
                    f"Pool {number} of the activations holds NaN or infinity in at least {bad} rows. Look at the "
                    "model's dtype and the hook point."
                )

    def _first_pool(self) -> dict:
        return {"kind": "pools", "sizes": run_id(self._sizes)} | _content(self._hold(0))


def is_sink(x: Tensor, times: float) -> Tensor:
    """bool [n]: rows of x [n, d] with more than so many times the median norm: attention sinks, and other tokens whose
    activations are massive and alike whatever the text says (arXiv 2402.17762).

    >>> is_sink(torch.tensor([[1.0], [1.1], [0.9], [7.0]]), times=3)
    tensor([False, False, False,  True])
    """
    norm = row_norms(x)
    return norm > times * norm.median()


def row_norms(x: Tensor) -> Tensor:
    """Norms [n, ...] of x [n, ..., d], in single precision, without a second x in memory."""
    return torch.cat([part.float().norm(dim=-1) for part in x.split(8192)])


def _without_sinks(pool: Pool, times: float) -> Pool:
    """A pool without its sinks; other rows are repeated in their place."""
    rows = (~is_sink(pool[0], times)).nonzero().squeeze(1)
    size = len(pool[0])
    if len(rows) == size:
        return pool
    rows = rows.repeat(2)[:size]  # half of them at least are no more than the median
    return tuple(values[rows.to(values.device)] for values in pool)


def _check_number(what: str, value, *, least: float | None = None, above: float | None = None) -> None:
    """Raise ConfigError for what is no finite number in one of the two ranges."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not (value > above if least is None else value >= least) or not value < math.inf:
        expected = f"above {above:g}" if least is None else f"from {least:g}"
        raise ConfigError(f"{what} and must be a finite number {expected}, found {value!r}.")


class _Ahead:
    """A pool that is made in a thread of its own, which ends with it."""

    def __init__(self, number: int, read: Callable[[int], Pool]):
        self.number, self._worker = number, ThreadPoolExecutor(1, "next-pool")
        self._made = self._worker.submit(read, number)
        self._worker.shutdown(wait=False)

    def wait(self) -> None:
        self._worker.shutdown()

    def pool(self) -> Pool:
        return self._made.result()


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """values on a device; to a GPU from pinned memory, so that the copy takes its place in the stream and nobody
    waits."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _handed_over(pool: Pool) -> Pool:
    """Tell a GPU's allocator that a pool made in one stream is used in another, so that its memory is not reused too
    early."""
    for tensor in pool:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return pool


def _as_tensor(name: str, values) -> Tensor:
    """An array of any library as a tensor on the same memory. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it here
            return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} must be an array of floats or of bool, found {type(values).__name__}: {error}."
        ) from error


def _check_pool(pool: Pool, shape: tuple[int, int], where: str) -> None:
    """Raise DataError unless activations (and targets) are floats of a shape [n, d], and is_masked is bool [n]."""
    x, is_masked, *targets = pool
    for values in (x, *targets):
        if values.dtype not in FLOATS:
            raise DataError(
                f"The activations {where} must be floats, found {values.dtype}. Convert them, or look at the hook "
                "point."
            )
        if tuple(values.shape) != shape:
            raise DataError(
                f"The activations {where} must have shape {shape}, found {tuple(values.shape)}. A stream gives the "
                "same in every epoch."
            )
    if tuple(is_masked.shape) != shape[:1]:
        raise DataError(
            f"is_masked must have one entry per activation ({shape[0]}), found shape {tuple(is_masked.shape)} {where}."
        )
    if is_masked.dtype != torch.bool:
        raise DataError(f"is_masked must be bool, found {is_masked.dtype} {where}. Give is_masked != 0.")


def _content(pool: Pool) -> dict:
    """Identity of a pool that is there: shape, type, evenly spaced rows and the whole mask."""
    x, is_masked, *targets = pool
    found = {"rows": len(x), "d_model": x.shape[1], "dtype": str(x.dtype), "content": fingerprint([spaced(x)])}
    found["is_masked"] = fingerprint([is_masked])
    return found | ({"targets": fingerprint(map(spaced, targets))} if targets else {})


def _model_fingerprint(model: torch.nn.Module) -> str:
    """Hash of a model's configuration and of evenly spaced entries of every weight, wherever it is kept and whatever it
    is called."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    told = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    weights = [(name, v) for name, v in model.state_dict().items() if isinstance(v, Tensor) and not v.is_meta]
    names = json.dumps([told, [name for name, _ in weights]], sort_keys=True, default=str)
    return run_id([names, fingerprint(spaced(value.reshape(-1)) for _, value in weights)])


def _blocks_fingerprint(blocks) -> str:
    """Hash of the token blocks, or of evenly spaced stretches of many."""
    stretches, length = range(0, len(blocks), max(64, len(blocks) // 64)), 64
    return run_id([list(blocks.shape), fingerprint(blocks[start : start + length] for start in stretches)])


def from_model(
    language_model, blocks, *, block: int, p: float, token_id: int, mask_seed: int, bos_id: int | None,
    batch_size: int, seed: int, pool_tokens: int = 131_072, scratch: Path | None = None, sequences: int | None = None,
    progress: bool = True, replacements: Tensor | None = None, share: float = 1.0, overlap: bool | None = None,
    fresh_masks: bool = False, noise: float = 0.0, sinks: float | None = None,
) -> ActivationStream:  # fmt: skip
    """Stream of the activations after `block` on token blocks [n, s] (a tensor, or `data.blocks.Blocks`) that are
    masked on the way in.

    The BOS position is left out: an attention sink whose norm is several times everyone else's. With `scratch`, each
    pool is kept there (half precision) and later epochs and runs read it back; without, every visit runs the model, and
    the pool stays on its device. What the pools were made of is written beside them: pools of another model, text or
    masking are refused.

    sequences     per forward; None: 16 on a CPU, else 256
    replacements  as in `mask_tokens`
    share         use only the first blocks, this share of them; scratch is that of the whole
    overlap       make the next pool while the SAEs train on the current one; None: on GPUs only, since on a CPU both
                  want the same cores. Use the model for nothing else until the iterator, or the training, has ended
    fresh_masks   draw masks (and noise) anew in every epoch e: block i of n gets number e n + i, as if the text went on
                  (RoBERTa's dynamic masking, arXiv 1907.11692, section 4.1). Every epoch then runs the model, so there
                  is no scratch. False: one draw for all epochs
    noise         from 0: standard deviation of Gaussian noise that is added to the activations of every token, as a
                  share of theirs. Each entry gets its own draw of deviation noise s, with d s^2 the mean squared
                  distance of the first pool's activations from their mean: noise^2 is the ratio of the two variances.
                  It is drawn per block from mask_seed, like the masks and independently of them, and added after
                  scratch is read, which is that of the stream without noise
    sinks         as in `ActivationStream`; scratch is that of all tokens

    Raises ConfigError, DataError, OutputError.
    """
    from masksae.tracing import hook_point, hook_width

    model, start = language_model.model, () if bos_id is None else (bos_id,)
    _check_options(blocks, len(start), share=share, pool_tokens=pool_tokens, sequences=sequences, noise=noise)
    vocabulary = model.get_input_embeddings().num_embeddings if p else None
    masking = {"p": p, "token_id": token_id, "seed": mask_seed, "replacements": replacements}
    mask_tokens(blocks[:1], vocab_size=vocabulary, **masking)  # refuses bad values now, not in the middle
    if fresh_masks and p and scratch is not None:
        raise ConfigError(
            "fresh_masks gives other activations in every epoch, which scratch cannot keep. Leave one of the two out."
        )
    hook_point(model, block)
    with _loading:
        width = hook_width(model, block)
    ahead = model.device.type == "cuda" if overlap is None else overlap
    pools = _ModelPools(
        language_model, blocks, block, masking, start, int(pool_tokens), None if scratch is None else Path(scratch),
        sequences or (16 if model.device.type == "cpu" else 256), progress and not ahead,
    )  # fmt: skip
    if scratch is not None:
        _claim(ensure_writable(scratch), pools.identity())
    used, kept = max(1, round(share * len(blocks))), blocks.shape[1] - len(start)
    sizes = [min(pools.rows, used - row) * kept for row in range(0, used, pools.rows)] if len(blocks) else []

    @cache
    def deviation() -> float:
        x = pools(0)[0]  # of the whole text: a share gets the same noise
        return noise * _deviation(x[~is_sink(x, sinks)] if sinks else x)

    def load(number: int) -> Pool:
        epoch, number = divmod(number, len(sizes))
        scale = deviation() if noise else 0.0  # before the pool is made: there is no second one beside it
        x, is_masked = (values[: sizes[number]] for values in pools(number, epoch))
        return (_add_noise(x, kept, scale, mask_seed, pools.first_sequence(number, epoch)) if noise else x), is_masked

    fresh = bool(fresh_masks and (p or noise))
    made_of = {"share": float(share), "scratch": scratch is not None}
    made_of |= {"noise": float(noise), "noise_seed": int(mask_seed)} if noise else {}
    made_of |= {"fresh_masks": True} if fresh else {}
    return ActivationStream(
        load, sizes, batch_size=batch_size, seed=seed, prefetch=ahead, d_model=width, fresh=fresh,
        identity=lambda: pools.identity() | made_of, sinks=sinks,
    )  # fmt: skip


def _deviation(x: Tensor) -> float:
    """Standard deviation of an entry of x [n, d]: d times its square is the mean squared distance of a row from the
    mean row."""
    parts = x.split(8192)
    mean = sum(part.double().sum(0) for part in parts) / len(x)
    return (sum((part.double() - mean).square().sum().item() for part in parts) / x.numel()) ** 0.5


def _add_noise(x: Tensor, length: int, deviation: float, seed: int, first_sequence: int) -> Tensor:
    """A copy of x [n, d], where every `length` rows are one sequence, with noise that depends on the seed and on the
    number of the sequence alone."""
    noisy, noise = torch.empty_like(x), np.empty((length, x.shape[1]), np.float32)
    for i, (rows, found) in enumerate(zip(x.split(length), noisy.split(length))):
        draws(seed, first_sequence + i, stretch=1).standard_normal(out=noise, dtype=np.float32)
        found.copy_(torch.from_numpy(noise).to(x.device).mul_(deviation).add_(rows))
    return noisy


@dataclass(frozen=True)
class _ModelPools:
    """What a language model makes of all token blocks, in pools; kept in `scratch` if there is one."""

    language_model: Any
    blocks: Any
    block: int | str
    masking: dict
    start: tuple[int, ...]
    """What every block begins with and is left out: the BOS, or nothing."""
    pool_tokens: int
    scratch: Path | None
    sequences: int
    shown: bool

    @property
    def rows(self) -> int:
        """Blocks of a pool."""
        return -(-self.pool_tokens // (self.blocks.shape[1] - len(self.start)))

    def first_sequence(self, number: int, epoch: int) -> int:
        """Number of the masks of a pool's first block."""
        return epoch * len(self.blocks) + number * self.rows

    def __call__(self, number: int, epoch: int = 0) -> Pool:
        """A pool with the masks of an epoch; of scratch it is read back even if it was made now, so that every run has
        the same half precision."""
        if self.scratch is None:
            return self._make(number, epoch, {"device": self.language_model.model.device, "dtype": None})
        file = self.scratch / f"pool-{number:05d}.safetensors"
        if not file.exists():
            _write_pool(file, self._make(number, epoch, {"device": "cpu"}))
        return _read_pool(file)

    def _make(self, number: int, epoch: int, where: dict) -> Pool:
        row, first = number * self.rows, len(self.start)
        ids, draw = self.blocks[row : row + self.rows], self.first_sequence(number, epoch)
        corrupted, is_masked = mask_tokens(ids, first_sequence=draw, spare=self.start, **self.masking)
        label = f"activations, pool {number + 1} of {-(-len(self.blocks) // self.rows)}" if self.shown else None
        x = _forward(self.language_model.model, corrupted, self.block, first, self.sequences, label, where)
        return x, is_masked[:, first:].reshape(-1)

    def identity(self) -> dict:
        """Of the whole: runs that use a share, another order or other batches have the same scratch."""
        p, drawn = float(self.masking["p"]), self.masking["replacements"]
        masks: dict = {
            "token_id": int(self.masking["token_id"]),
            "mask_seed": int(self.masking["seed"]),
            "replacements": None,
        }
        if drawn is not None:
            masks |= {"token_id": None, "replacements": fingerprint([spaced(drawn)])}
        return {
            "kind": "model",
            "model": _model_fingerprint(self.language_model.model),
            "blocks": _blocks_fingerprint(self.blocks),
            "block": self.block if isinstance(self.block, str) else int(self.block),
            "bos_id": int(self.start[0]) if self.start else None,
            "pool_tokens": self.pool_tokens,
            "p": p,
        } | (masks if p else dict.fromkeys(masks))


def _check_options(blocks, first: int, *, share: float, pool_tokens: int, sequences: int | None, noise) -> None:
    shape = tuple(getattr(blocks, "shape", ()))
    if len(shape) != 2:
        raise DataError(f"blocks must have shape [blocks, tokens], found {shape or type(blocks).__name__}.")
    if shape[1] <= first:
        raise DataError(
            f"Blocks of {shape[1]} tokens hold nothing but the BOS. Make longer blocks (text.block_length)."
        )
    if not 0 < share <= 1:
        raise ConfigError(f"share is a part of the blocks and must lie in (0, 1], found {share!r}.")
    what = "noise is the standard deviation of the noise as a share of the activations' own"
    _check_number(what, noise, least=0)
    for name, value in (("pool_tokens", pool_tokens), ("sequences", sequences)):
        if value is not None:
            check_natural(name, value)
            if value < 1:
                raise ConfigError(f"{name} must be positive, found {value}.")


def _forward(model, ids: Tensor, block, first: int, sequences: int, label: str | None, where: dict) -> Tensor:
    """Activations [n * (s - first), d] of ids [n, s], written piece by piece into one tensor: at no time is there a
    second pool."""
    from masksae.tracing import activations

    x, kept = None, ids.shape[1] - first
    step = sequences if label else 8 * sequences  # each trace has to look at the model first, which takes a GPU's time
    for number, piece in enumerate(bars.bar(ids.split(step), label=label, unit="batches")):
        found = activations(model, piece, block=block, batch=sequences, **where)
        if found.ndim != 3 or found.shape[:2] != piece.shape:
            raise DataError(
                f"{block} gives {tuple(found.shape)} for ids {tuple(piece.shape)}, expected {(*piece.shape, 'width')}. "
                "Choose another module."
            )
        if x is None:
            x = found.new_empty(len(ids), kept, found.shape[-1])
        x[number * step :][: len(piece)] = found[:, first:]
    return x.view(-1, x.shape[-1])


def _claim(scratch: Path, made_of: dict) -> None:
    """Take a folder for pools of an identity. Raises DataError if it holds those of another one, or of an unknown
    one."""
    file = scratch / "identity.json"
    if not file.exists():
        if any(scratch.glob("pool-*")):
            raise DataError(
                f"The activations in {scratch} do not say what they were made of (identity.json is missing). Give "
                "another folder."
            )
        write_json(file, made_of)
    elif (found := read_json(file)) != made_of:
        raise DataError(
            f"The activations in {scratch} were made of something else: {differing(found, made_of)} differ. Give "
            "another folder."
        )


def differing(found, ours: dict) -> str:
    """Names of the values that two records do not share."""
    found = found if isinstance(found, dict) else {}
    return ", ".join(key for key in [*ours, *(found.keys() - ours)] if found.get(key) != ours.get(key))


def _write_pool(file: Path, pool: Pool) -> None:
    """Half precision where the values fit into it, else single; atomically."""
    x, is_masked = pool
    dtype = torch.float16 if x.abs().max() < 6e4 else torch.float32
    with atomic_file(file) as tmp:
        save_tensors({"x": x.to(dtype), "is_masked": is_masked}, tmp)


def _read_pool(file: Path) -> Pool:
    tensors = read_safetensors(file)
    if tensors.keys() != {"x", "is_masked"}:
        raise DataError(
            f"The scratch file {file} is damaged (it holds {', '.join(tensors)}). Delete it; it is made again."
        )
    return tensors["x"], tensors["is_masked"]
