"""Many small pieces of work, such as one score for each SAE: several at a time on one core each, instead of one at a
time on all.

The arithmetic of a score is small steps that gain little from a second core, so two scores on two cores take about 1.6
times less time than one after the other. A score's bits do not depend on how many run beside it, nor on the number of
cores.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch

from masksae import progress

LARGEST = 4
"""Scores at a time: each holds the latents of its SAE in memory."""


class once(cached_property):
    """A `cached_property` that is made once, however many threads ask for it first; since Python 3.12 the plain one no
    longer sees to that.

    What makes it may run a language model, and two forwards at once on one model upset each other.
    """

    def __init__(self, make: Callable):
        super().__init__(make)
        self._making = threading.RLock()

    def __get__(self, instance, owner=None):
        with self._making:
            return super().__get__(instance, owner)


def in_threads(function: Callable, items: Iterable, *, label: str | None = None, unit: str = "it") -> list:
    """[function(item) for item in items], without gradients; an error of one ends the rest. `label` shows progress."""
    from threadpoolctl import threadpool_limits

    items, cores = list(items), torch.get_num_threads()

    def one_core() -> None:
        """Libraries keep a limit per thread (OpenMP) or for all threads (BLAS); this sets both, and torch's own."""
        torch.set_num_threads(1)
        threadpool_limits(1)

    with threadpool_limits(1), ThreadPoolExecutor(min(cores, LARGEST), initializer=one_core) as pool:
        try:
            results = pool.map(torch.no_grad()(function), items)
            return list(progress.bar(results, total=len(items), label=label, unit=unit))
        finally:
            torch.set_num_threads(cores)
