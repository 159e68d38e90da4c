"""Several scores at a time: order, bits, errors, and nothing left changed."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from masksae.errors import DataError
from masksae.parallel import in_threads, once


def product(seed: int) -> torch.Tensor:
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))
    return (x @ x.t()).sum(0)


def test_order_and_bits_do_not_depend_on_the_cores():
    before, found = torch.get_num_threads(), []
    for cores in (1, 2, 3):
        torch.set_num_threads(cores)
        found.append(in_threads(product, range(8)))
        assert torch.get_num_threads() == cores
    torch.set_num_threads(before)
    for one, other in zip(found[0], found[2]):
        assert torch.equal(one, other)
    assert all(torch.allclose(value, product(seed), rtol=1e-4, atol=1e-3) for seed, value in enumerate(found[1]))


def test_there_are_no_gradients_and_each_has_one_core():
    weight = torch.ones(1, requires_grad=True)
    assert in_threads(lambda x: ((weight * x).requires_grad, torch.get_num_threads()), [1.0, 2.0]) == [(False, 1)] * 2


def test_an_error_ends_the_rest_and_restores_the_cores():
    before, ran = torch.get_num_threads(), []

    def fail(i):
        ran.append(i)
        if i == 0:
            raise DataError("no")
        time.sleep(0.005)

    with pytest.raises(DataError, match="no"):
        in_threads(fail, range(1000))
    assert len(ran) < 1000 and torch.get_num_threads() == before
    assert in_threads(len, []) == []


def test_what_several_threads_want_first_is_made_once():
    made = []

    class Thing:
        @once
        def inner(self):
            time.sleep(0.02)
            made.append("inner")
            return len(made)

        @once
        def outer(self):
            time.sleep(0.02)
            made.append("outer")
            return self.inner

    thing = Thing()
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: thing.outer, range(32)))) == 1
    assert sorted(made) == ["inner", "outer"] and thing.outer == thing.inner == 2
