"""The training loss and its gradient, twice: once as the definition (dense, autograd), once fast (sparse, by hand).

With B tokens, G prefix groups and e_g = x_hat_g - x the error of the reconstruction from groups 1..g,

    loss = w sum_g mean_b |e_g|^2  +  c mean_b |r - x_aux|^2 / mean_b |r - mean r|^2

where w is the prefix weight and the second term (AuxK) exists only while latents are dead: r is the detached residual and
x_aux its reconstruction by the k_aux strongest dead latents. A kept latent of group g sees only E_g, the sum of e_g' over
g' >= g, so one backward matrix per group is enough: df_bj = (2 w / B) E_g(b) . d_j and dW_j = (2 w / B) sum_b f_bj E_g(b).

The sparse form touches k of F latents per token in decode and backward (CSR products, which need MKL); only the encoder
product is dense. Both forms give the same gradient to rounding, which the tests check.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.saes.sae import SAE


@dataclass(frozen=True)
class Kept:
    """The selected latents of a batch, in row-major order: token `row`, latent `col`, pre-activation `value` > 0."""

    row: Tensor
    col: Tensor
    value: Tensor


def select(h: Tensor, k: int) -> Kept:
    """The k x B largest positive entries of h [B, F]; of equal ones, the first in row-major order."""
    count = k * h.shape[0]
    flat = h.reshape(-1)
    if h.device.type == "cpu":
        index = _above_lower_bound(flat, count)
        value = flat[index]
        if len(index) > count:
            keep = _exactly(value, count)
            index, value = index[keep], value[keep]
    else:
        value, index = flat.topk(min(count, flat.numel()))
        index, order = index.sort()
        value = value[order]
    n_latents = h.shape[1]
    return Kept(torch.div(index, n_latents, rounding_mode="floor"), index % n_latents, value)


def _above_lower_bound(flat: Tensor, count: int) -> Tensor:
    """Indices of a small superset of the `count` largest positive entries: a strided sample tells where to cut."""
    sample = flat[::61]
    bound = sample.topk(min(len(sample), int(1.3 * count / 61) + 8)).values[-1].clamp(min=0)
    index = (flat > bound).nonzero().squeeze(1)
    if len(index) < count and bound > 0:
        index = (flat > 0).nonzero().squeeze(1)
    return index


def _exactly(value: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of `value`; ties at the edge go to the first."""
    edge = value.topk(count, sorted=False).values.min()
    keep = value > edge
    ties = (value == edge).nonzero().squeeze(1)[: count - int(keep.sum())]
    keep[ties] = True
    return keep


def dense_loss(sae: SAE, x: Tensor, kept: Kept, h: Tensor, dead: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition: (loss, x_hat [B, d]) with autograd. `h` are the pre-activations, `dead` bool [F] or None."""
    mask = torch.zeros_like(h, dtype=torch.bool)
    mask[kept.row, kept.col] = True
    f = h * mask
    x_hat = sae.b_dec.expand_as(x)
    total = x.new_zeros(())
    for f_g, w_g in zip(f.split(sae.config.group_sizes, 1), sae.W_dec.split(sae.config.group_sizes, 0)):
        x_hat = x_hat + f_g @ w_g
        total = total + (x_hat - x).square().sum(1).mean()
    loss = total * sae.config.prefix_weight
    if dead is not None and sae.config.aux is not None:
        loss = loss + aux_loss(sae, x, x_hat.detach(), dead)
    return loss, x_hat.detach()


def aux_loss(sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor:
    """AuxK with its coefficient: share of the residual's variance that the strongest dead latents leave unexplained."""
    aux, n_dead = sae.config.aux, int(dead.sum())
    residual = x - x_hat
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    if n_dead == 0 or not variance > 0:
        return x.new_zeros(())
    k_aux = min(aux.k or max(1, sae.config.d_model // 2), n_dead)
    h_dead = torch.relu((x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead])
    value, index = h_dead.topk(k_aux, sorted=False)
    f_aux = torch.zeros_like(h_dead).scatter(1, index, value)
    return aux.coefficient * (residual - f_aux @ sae.W_dec[dead]).square().sum(1).mean() / variance


@torch.no_grad()
def sparse_gradients(sae: SAE, x: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """Fill the four `.grad`s with the gradient of the loss without AuxK; return (loss, x_hat [B, d]). CPU with MKL."""
    batch, n_latents = x.shape[0], sae.config.n_latents
    factor = 2 * sae.config.prefix_weight / batch
    groups = _groups(kept, sae.config.group_sizes)
    errors, loss = [], 0.0
    error = sae.b_dec - x
    for sub, (low, high) in groups:
        if len(sub.value):
            error = error + _csr(sub.row, sub.col - low, sub.value, (batch, high - low)) @ sae.W_dec[low:high]
        errors.append(error)
        loss = loss + error.square().sum()
    x_hat = error + x
    grad_f = torch.empty_like(kept.value)
    sae.W_dec.grad = torch.zeros_like(sae.W_dec)
    backward = torch.zeros_like(x)
    for (sub, (low, high)), error, where in reversed(
        list(zip(groups, errors, _positions(kept, sae.config.group_sizes)))
    ):
        backward = backward + error
        if len(sub.value):
            pattern = _csr(sub.row, sub.col - low, torch.zeros_like(sub.value), (batch, high - low))
            dots = torch.sparse.sampled_addmm(pattern, backward, sae.W_dec[low:high].t(), beta=0.0, alpha=factor)
            grad_f[where] = dots.values()
            order = sub.col.argsort(stable=True)
            transposed = _csr(sub.col[order] - low, sub.row[order], sub.value[order] * factor, (high - low, batch))
            sae.W_dec.grad[low:high] = transposed @ backward
    order = kept.col.argsort(stable=True)
    grad_h = _csr(kept.col[order], kept.row[order], grad_f[order], (n_latents, batch))
    sae.W_enc.grad = (grad_h @ (x - sae.b_dec)).t()
    sae.b_enc.grad = torch.zeros_like(sae.b_enc).index_add_(0, kept.col, grad_f)
    sae.b_dec.grad = factor * backward.sum(0) - sae.W_enc @ sae.b_enc.grad
    return loss * sae.config.prefix_weight / batch, x_hat


def _groups(kept: Kept, sizes) -> list[tuple[Kept, tuple[int, int]]]:
    """The kept latents of each prefix group, with the group's range of latents."""
    result, low = [], 0
    for where, size in zip(_positions(kept, sizes), sizes):
        result.append((Kept(kept.row[where], kept.col[where], kept.value[where]), (low, low + size)))
        low += size
    return result


def _positions(kept: Kept, sizes) -> list:
    """Where in `kept` each group's entries are."""
    if len(sizes) == 1:
        return [slice(None)]
    edges = torch.tensor(sizes).cumsum(0)
    group = torch.bucketize(kept.col, edges, right=True)
    return [(group == g).nonzero().squeeze(1) for g in range(len(sizes))]


def _csr(row: Tensor, col: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix from entries sorted by row."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=shape[0]), 0, out=starts[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, col, value, shape, check_invariants=False)
