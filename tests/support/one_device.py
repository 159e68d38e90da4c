"""Operations that mix devices fail, as they would on a GPU or be slow there."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OneDevice(TorchDispatchMode):
    """Refuses operations that mix devices: on a GPU each is a hidden copy, if it works at all.

    numbers  let arithmetic have single numbers of the CPU, which a kernel gets as an argument: `torch.vmap` makes them
             of those of Python
    """

    ARITHMETIC = ("add", "sub", "mul", "div")

    def __init__(self, numbers: bool = False):
        super().__init__()
        self.numbers = numbers

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        free = self.numbers and function.__name__.partition(".")[0] in self.ARITHMETIC
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if not (free and t.ndim == 0 and t.device.type == "cpu")}
        if len(devices) > 1:
            raise AssertionError(f"{function} mixes {devices}")
        return function(*args, **(kwargs or {}))


class Repeatable(TorchDispatchMode):
    """Refuses what a CUDA graph cannot repeat: reading a number back, shapes that depend on data, masks as indices.
    `seen` holds what was run: every operation with the shapes of its tensors and all other arguments."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "profiler":
            return function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        self.seen.append((str(function), [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in leaves]))
        name = function.__name__.partition(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in self.NAMES or any(i is not None and i.dtype == torch.bool for i in indices):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))
