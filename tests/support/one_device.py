"""Operations that mix devices fail, as they would on a GPU or be slow there."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OneDevice(TorchDispatchMode):
    """Refuses operations that mix devices: on a GPU each is a hidden copy, if it works at all."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {
            t.device.type for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        if len(devices) > 1:
            raise AssertionError(f"{function} mixes {devices}")
        return function(*args, **(kwargs or {}))
