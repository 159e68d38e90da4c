"""Shuffled batches of activations for training; the position in the stream is two integers.

Activations come in pools (a slice of an array, or the output of one stretch of forwards). Each visit of a pool draws its own
permutation from (seed, number of the visit), so resuming needs no shuffle buffer: `state_dict()` is {"pool", "batch"}. Tokens
that do not fill a last batch of a pool are left out of that visit; another visit leaves out others.

One pool serves several views at once: orders of different seeds, and masked positions kept or dropped. Where masked positions are
dropped the others come round again within the visit, so that every view has full batches and as many of them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from masksae.errors import ConfigError, DataError
from masksae.files import atomic_file, ensure_writable, read_safetensors, save_tensors

Pool = tuple[Tensor, ...]
"""Activations [n, d] (any float type), is_masked bool [n], and where there are any, targets [n, d]: what is to be reconstructed."""


class ActivationStream:
    """An endless iterator over (x float32 [batch_size, d], is_masked bool [batch_size]).

    load        pool number -> (x [n, d], is_masked [n]); called for 0 .. n_pools - 1, again in every epoch
    pool_sizes  rows of each pool
    prefetch    call `load` for the next pool in a thread while the current one is used; memory for two pools

    >>> stream = ActivationStream.from_array(torch.arange(6.0)[:, None], batch_size=2, seed=0)
    >>> x, is_masked = next(iter(stream))
    >>> x.shape, is_masked.any().item(), stream.state_dict()
    (torch.Size([2, 1]), False, {'pool': 0, 'batch': 1})
    """

    def __init__(
        self, load: Callable[[int], Pool], pool_sizes: list[int], *, batch_size: int, seed: int, prefetch: bool = False
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size must be positive, found {batch_size}.")
        if not pool_sizes or sum(size // batch_size for size in pool_sizes) == 0:
            raise DataError(
                f"{sum(pool_sizes)} activations do not fill one batch of {batch_size}. Give more text or a smaller batch_size."
            )
        self._load, self._sizes = load, list(pool_sizes)
        self.batch_size, self.seed = batch_size, seed
        self._pool, self._batch = 0, 0
        self._device = torch.device("cpu")
        self._held: tuple[int, Pool] | None = None
        self._ahead: tuple[int, Future] | None = None
        self._worker = ThreadPoolExecutor(1, "next-pool") if prefetch and len(pool_sizes) > 1 else None

    @classmethod
    def from_array(cls, x, *, batch_size: int, seed: int, is_masked=None) -> "ActivationStream":
        """Stream over an array or memory map `x` [n, d]; one pool. Raises DataError for NaN, infinity or a wrong shape."""
        if x.ndim != 2:
            raise DataError(
                f"Activations must have shape [tokens, d_model], found {tuple(x.shape)}. Flatten batch and sequence."
            )
        x = torch.as_tensor(x)
        mask = torch.zeros(len(x), dtype=torch.bool) if is_masked is None else torch.as_tensor(is_masked)
        if mask.shape != (len(x),):
            raise DataError(
                f"is_masked must have one entry per activation ({len(x)}), found shape {tuple(mask.shape)}."
            )
        return cls(lambda _: (x, mask), [len(x)], batch_size=batch_size, seed=seed)

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass over all pools."""
        return sum(size // self.batch_size for size in self._sizes)

    @property
    def d_model(self) -> int:
        """Width of the activations (loads the current pool)."""
        return self._current()[0].shape[1]

    def to(self, device) -> "ActivationStream":
        """Keep the pool in use on `device`: a GPU then gets it once, and no step waits for a copy."""
        if torch.device(device) != self._device:
            self._device, self._held, self._ahead = torch.device(device), None, None
        return self

    def __iter__(self) -> Iterator[Pool]:
        return (views[0][:2] for views in self.batches([(self.seed, False)]))

    def with_targets(self, clean: "ActivationStream") -> "ActivationStream":
        """The same stream with the activations of another, row by row, as what is to be reconstructed. Raises DataError."""
        if clean._sizes != self._sizes:
            raise DataError(
                f"The targets come in pools of {clean._sizes} rows, the activations in pools of {self._sizes}."
            )
        load = lambda number: (*self._load(number)[:2], clean._load(number)[0])
        return ActivationStream(
            load, self._sizes, batch_size=self.batch_size, seed=self.seed, prefetch=self._worker is not None
        )

    def batches(self, views: list[tuple[int, bool]]) -> Iterator[list[Pool]]:
        """One batch per view (seed of the order, whether masked positions are dropped), again and again; moves the position."""
        while True:
            x, is_masked, *targets = self._current()
            orders = [self._order(seed, is_masked if dropped else None).to(x.device) for seed, dropped in views]
            while (self._batch + 1) * self.batch_size <= len(orders[0]):
                part = slice(self._batch * self.batch_size, (self._batch + 1) * self.batch_size)
                self._batch += 1
                rows = [order[part] for order in orders]
                yield [(x[row].float(), is_masked[row], *(target[row].float() for target in targets)) for row in rows]
            self._pool, self._batch = self._pool + 1, 0

    def scale(self, batches: int = 100) -> float:
        """Root mean square norm over the first `batches` batches of the first pool; the stream does not move."""
        position = self.state_dict()
        self.load_state_dict({"pool": 0, "batch": 0})
        x, order = self._current()[0], self._order(self.seed)[: batches * self.batch_size]
        total = sum(x[rows].double().square().sum().item() for rows in order.to(x.device).split(8192))
        self.load_state_dict(position)
        return (total / len(order)) ** 0.5

    def state_dict(self) -> dict[str, int]:
        """Pools finished, batches taken from the current one."""
        return {"pool": self._pool, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position that `state_dict` gave."""
        self._pool, self._batch = int(state["pool"]), int(state["batch"])

    def _order(self, seed: int, dropped: Tensor | None = None) -> Tensor:
        """Rows of the current pool in the order of a seed; without the `dropped` ones, the others repeated to the same number."""
        key = np.array([seed, self._pool], dtype=np.uint64)
        size = self._sizes[self._pool % len(self._sizes)]
        order = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).permutation(size))
        if dropped is None:
            return order
        order = order[~dropped.cpu()[order]]
        if len(order) == 0:
            raise DataError("Every position of a pool of activations is masked: dropping them leaves nothing. Lower p.")
        return order.repeat(-(-size // len(order)))[:size]

    def _current(self) -> Pool:
        number = self._pool % len(self._sizes)
        if self._held is None or self._held[0] != number:
            self._held = None
            ahead, self._ahead = self._ahead, None
            self._held = number, _handed_over(ahead[1].result()) if ahead and ahead[0] == number else self._read(number)
            if self._worker:
                following = (number + 1) % len(self._sizes)
                self._ahead = following, self._worker.submit(self._read_beside, following)
        return self._held[1]

    def _read_beside(self, number: int) -> Pool:
        """`_read` in the worker thread; on a GPU in a stream of its own, or it would queue up behind the training steps."""
        if self._device.type != "cuda":
            return self._read(number)
        beside = torch.cuda.Stream(self._device)
        with torch.cuda.stream(beside):
            pool = self._read(number)
        beside.synchronize()
        return pool

    def _read(self, number: int) -> Pool:
        x, is_masked, *targets = self._load(number)
        for part in (part for values in (x, *targets) for part in values.split(65536)):
            finite = torch.isfinite(part)
            if not finite.all():
                bad = int((~finite).any(1).sum())
                raise DataError(
                    f"Pool {number} of the activations holds NaN or infinity in at least {bad} rows. Look at the model's dtype and the hook point."
                )
        return tuple(values.to(self._device) for values in (x, is_masked, *targets))


def _handed_over(pool: Pool) -> Pool:
    """Tell a GPU's allocator that a pool made in one stream is used in another, so that its memory is not reused too early."""
    for tensor in pool:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return pool


def from_model(
    language_model, blocks, *, block: int, p: float, token_id: int, mask_seed: int, bos_id: int | None,
    batch_size: int, seed: int, pool_tokens: int = 131_072, scratch: Path | None = None, sequences: int | None = None, progress: bool = True,
    replacements: Tensor | None = None, share: float = 1.0, overlap: bool | None = None,
) -> ActivationStream:  # fmt: skip
    """Stream of the activations after `block` on token blocks [n, s] (a tensor, or `corpus.Blocks`) that are masked on the way in.

    The BOS position is left out: an attention sink whose norm is several times everyone else's. With `scratch`, each pool is
    kept there (half precision) and later epochs and runs read it back; without, every visit runs the model, and the pool stays on its
    device.

    sequences     per forward; None: 16 on a CPU, else 256
    replacements  as in `mask_tokens`
    share         use only the first blocks, this share of them; scratch is that of the whole
    overlap       make the next pool while the SAEs train on the current one; None: on GPUs only, since on a CPU both want the same cores
    """
    from masksae.masking import mask_tokens
    from masksae.tracing import activations, hook_point

    hook_point(language_model.model, block)
    first = 0 if bos_id is None else 1
    kept = blocks.shape[1] - first
    rows, used = -(-pool_tokens // kept), max(1, round(share * len(blocks)))
    starts = range(0, len(blocks), rows)
    device = language_model.model.device
    sequences = sequences or (16 if device.type == "cpu" else 256)
    where = {"device": "cpu"} if scratch is not None else {"device": device, "dtype": None}
    ahead = device.type == "cuda" if overlap is None else overlap
    if scratch is not None:
        ensure_writable(scratch)

    def load(number: int) -> Pool:
        file = None if scratch is None else Path(scratch) / f"pool-{number:05d}.safetensors"
        if file is not None and file.exists():
            return _read_pool(file)
        start = starts[number]
        ids = blocks[start : start + rows]
        spare = () if bos_id is None else (bos_id,)
        corrupted, is_masked = mask_tokens(
            ids, p=p, token_id=token_id, seed=mask_seed, first_sequence=start, spare=spare, replacements=replacements
        )
        label = f"activations, pool {number + 1} of {len(starts)}" if progress and not ahead else None
        x = activations(language_model.model, corrupted, block=block, batch=sequences, label=label, **where)[:, first:]
        pool = x.reshape(-1, x.shape[-1]), is_masked[:, first:].reshape(-1)
        if file is not None:
            _write_pool(file, pool)
            return _read_pool(file)
        return pool

    sizes = [min(rows, used - start) * kept for start in starts if start < used]
    first_rows = lambda number: tuple(values[: sizes[number]] for values in load(number))
    return ActivationStream(first_rows, sizes, batch_size=batch_size, seed=seed, prefetch=ahead)


def _write_pool(file: Path, pool: Pool) -> None:
    """Half precision where the values fit into it, else single; atomically."""
    x, is_masked = pool
    dtype = torch.float16 if x.abs().max() < 6e4 else torch.float32
    with atomic_file(file) as tmp:
        save_tensors({"x": x.to(dtype), "is_masked": is_masked}, tmp)


def _read_pool(file: Path) -> Pool:
    tensors = read_safetensors(file)
    return tensors["x"], tensors["is_masked"]
