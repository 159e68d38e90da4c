"""OrtSAE and C2R by their definitions, by no code of the package."""

import math

import torch


def naive(name: str, rows, f):
    """A penalty by its definition: all cosines, the largest of each row by autograd's own maximum."""
    unit = rows / rows.square().sum(1, keepdim=True).sqrt()
    cosine, nearest = (unit @ unit.t() - 9 * torch.eye(len(unit), dtype=unit.dtype)).max(1)
    squared = torch.where(cosine > 0, cosine, 0) ** 2
    if name == "OrtSAE":
        return squared.sum() / len(unit)
    size = [
        column.square().sum().sqrt() if column.any() else column.sum() for column in (f * math.sqrt(2048 / len(f))).t()
    ]
    return sum(c * (size[i] + size[n]) for i, (c, n) in enumerate(zip(squared, nearest.tolist()))) / len(unit)
