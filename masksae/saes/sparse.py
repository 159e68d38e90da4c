"""The same gradient as `saes/loss.py` at the price of k of F latents: decode and backward touch active entries only.

A kept latent of prefix group g sees only E_g, the sum of the errors e_g' over g' >= g, each times its weight as a share
of the last one's, w, so one backward matrix per group is enough:

    df_bj = (2 w / B) E_g(b) . d_j        dW_j = (2 w / B) sum_b f_bj E_g(b)

and the encoder's gradient follows from df through the rule (`saes/rules.py`). Products of a sparse and a dense matrix
are CSR products, which need MKL; the dot products are `sampled_addmm`. Nothing of size k x d per token exists. Only the
encoder product is dense: it is the floor of the step (`benchmarks/train.py` prints its share). Above `DENSE_SHARE`
active entries the dense step is faster.
"""

import warnings
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from masksae.saes.loss import Outcome, encoder_gradients
from masksae.saes.penalties import due, penalty_loss
from masksae.saes.sae import SAE

DENSE_SHARE = 0.25
"""Share of active entries from which dense products are faster, measured on two cores."""


def runs_sparse(device: torch.device, precision: str) -> bool:
    """Whether SAEs train with the step of this module there, where a rule's `support` is small enough."""
    return device.type == "cpu" and precision == "float32" and torch.backends.mkl.is_available()


class Entries:
    """The latents that take part in a step, by prefix group and in a group by token: entry i is latent `col[i]` of
    token `row[i]`.

    Everything that the step needs of them is an order and some offsets, found once; values are gathered into place by
    need.
    """

    def __init__(self, pre: Tensor, index: Tensor, sizes: tuple[int, ...]):
        self.shape, self.sizes = tuple(pre.shape), sizes
        # int32: half the memory to sort and gather, and what MKL's products take without a copy
        row = torch.div(index, self.shape[1], rounding_mode="floor")
        row, col, value = row.int(), (index - row * self.shape[1]).int(), pre.view(-1)[index]
        self.ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds = [0, len(index)]
        if len(sizes) > 1:
            # `index` ascends, so a stable sort by group leaves tokens and latents ascending in each group, as CSR wants
            # them
            group = torch.bucketize(col, self.ends, right=True)
            order = _stable_order(group, len(sizes))
            row, col, value = row[order], col[order], value[order]
            self.bounds = [0, *torch.bincount(group, minlength=len(sizes)).cumsum(0).tolist()]
        self.row, self.col, self.pre = row, col, value

    def groups(self) -> list[tuple[slice, int, int]]:
        """(entries, first latent, last latent + 1) of each prefix group."""
        ends = self.ends.tolist()
        return [
            (slice(a, b), high - size, high) for a, b, high, size in zip(self.bounds, self.bounds[1:], ends, self.sizes)
        ]

    def by_token(self, part: slice, low: int, high: int, value: Tensor) -> Tensor:
        """CSR [B, high - low] of one group's entries; `value` holds all entries."""
        # the entries lie in this order already: only where each token begins is looked up
        starts = torch.searchsorted(self.row[part], self._tokens, out_int32=True)
        return _csr(starts, self.col[part] - low, value[part], (self.shape[0], high - low))

    def by_latent(self, value: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """CSR [high - low, B]: the transpose of the entries of latents low .. high - 1."""
        # a group is a range of latents, so one sort of all entries serves the decoder's gradient of every group and the
        # encoder's
        order, starts = self._by_latent
        starts = starts[low : (self.shape[1] if high is None else high) + 1]
        part = order[starts[0] : starts[-1]]
        return _csr(starts - starts[0], self.row[part], value[part], (len(starts) - 1, self.shape[0]))

    def per_latent(self, value: Tensor) -> Tensor:
        """Sum over tokens of an entry's value [F]."""
        return value.new_zeros(self.shape[1]).index_add_(0, self.col, value)

    @cached_property
    def _tokens(self) -> Tensor:
        return torch.arange(self.shape[0] + 1, dtype=torch.int32)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor]:
        """(order of the entries by latent, where each latent begins in it): a count gives the second without the sorted
        latents."""
        starts = torch.zeros(self.shape[1] + 1, dtype=torch.int32)
        torch.cumsum(torch.bincount(self.col, minlength=self.shape[1]), 0, dtype=torch.int32, out=starts[1:])
        return _stable_order(self.col, self.shape[1]), starts


@torch.no_grad()
def sparse_step(
    sae: SAE, x: Tensor, xc: Tensor, pre: Tensor, index: Tensor, weight, estimate: bool, step: int | None = None
) -> Outcome:
    """Fill every `.grad`, AuxK apart. `index`: what the rule's `support` gave; the rest as in `dense_step`."""
    rule, e = sae.config.selection, Entries(pre, index, sae.config.group_sizes)
    f, gate = rule.sparse(sae, e)
    sae.zero_grad()
    loss, residual, grad_f = _reconstruct(sae, x, e, f)
    grad_gate = None
    if gate is not None:
        gate_loss, _, grad_gate = _reconstruct(sae, x, e, gate, frozen=True)
        loss = loss + gate_loss
    if due(sae.config, step):
        loss = loss + _penalise_(sae, e, f, grad_f, step)
    grad_pre, penalty = rule.backward(sae, e, f, grad_f, grad_gate, weight)
    # dpre^T xc latent by latent: this is the order in which W_enc is stored, so neither product nor gradient is turned
    # round
    w_enc = _product_(e.by_latent(grad_pre), xc, torch.empty_like(sae.W_dec))
    encoder_gradients(sae, w_enc, e.per_latent(grad_pre))
    active = f > 0
    # of a latent's entries any may be active: accumulating booleans is "or", a plain assignment would keep an arbitrary
    # one
    fired = torch.zeros(e.shape[1], dtype=torch.bool).index_put_((e.col,), active, accumulate=True)
    smallest = rule.smallest(f, e.row.long(), e.shape[0]) if estimate else None
    return Outcome(loss + penalty, residual, fired, active.sum().to(sae.dtype) / e.shape[0], smallest)


def _reconstruct(sae: SAE, x: Tensor, e: Entries, f: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_g w_g mean_b |e_g|^2, x - x_hat, gradient of f at the entries); sets the decoder's gradients unless it is
    frozen."""
    factor, shares = 2 * sae.config.prefix_weight / e.shape[0], sae.config.prefix_shares
    patterns, errors, loss = [], [], 0.0
    for (part, low, high), share in zip(e.groups(), shares):
        # e_g = e_(g - 1) + f_g W_g: all prefixes together cost one reconstruction from all latents
        error = errors[-1] if errors else sae.b_dec - x
        patterns.append(e.by_token(part, low, high, f))
        errors.append(torch.addmm(error, patterns[-1], sae.W_dec[low:high]))
        loss = loss + share * torch.dot(errors[-1].view(-1), errors[-1].view(-1))  # no [B, d] of squares
    residual = -errors[-1]  # a copy: the errors are written over from here on
    grad_f, weighted = torch.empty_like(f), f * factor  # the factor goes to k B numbers, not to F d
    if not frozen:
        sae.W_dec.grad = torch.empty_like(sae.W_dec)  # each group fills its rows
    backward = None
    groups = list(zip(e.groups(), patterns, errors, shares))
    for (part, low, high), pattern, error, share in reversed(groups):
        # from the last group, whose share is 1, to the first E_g = E_(g + 1) + share e_g grows in place, in the last
        # error's memory
        backward = error if backward is None else backward.add_(error, alpha=share)
        # E_g(b) . d_j for the pairs (b, j) of the pattern alone, k B of the F B that E_g W_g^T has; beta = 0: not its
        # values
        grad_f[part] = torch.sparse.sampled_addmm(
            pattern, backward, sae.W_dec[low:high].t(), beta=0.0, alpha=factor
        ).values()
        if not frozen:
            _product_(e.by_latent(weighted, low, high), backward, sae.W_dec.grad[low:high])
    if not frozen:
        sae.b_dec.grad = factor * backward.sum(0)  # b_dec is in every e_g, as the first group's latents are
    return loss * sae.config.prefix_weight / e.shape[0], residual, grad_f


def _penalise_(sae: SAE, e: Entries, f: Tensor, grad_f: Tensor, step: int) -> Tensor:
    """The penalties of this step; their gradients are added to the decoder's and to grad_f."""
    norms = e.per_latent(f.square()).sqrt().requires_grad_()
    with torch.enable_grad():
        loss = penalty_loss(sae, norms, step, e.shape[0])
        loss.backward()
    if norms.grad is not None:  # d|f_j| / df_bj = f_bj / |f_j|, 0 for a silent latent
        grad_f.addcmul_(f, torch.where(norms > 0, norms.grad / norms, 0)[e.col])
    return loss.detach()


def _product_(sparse: Tensor, dense: Tensor, out: Tensor) -> Tensor:
    """Their product, written into `out`: `mm` would fill it with zeros before, which takes as long again."""
    return torch.addmm(out, sparse, dense, beta=0, out=out)


def _stable_order(key: Tensor, below: int) -> Tensor:
    """Indices that sort natural numbers < `below`, equal ones in the order in which they stand."""
    if below > 2**16:
        return key.sort(stable=True).indices
    # NumPy sorts two bytes by radix: a thirteenth of the time of PyTorch's, which does so from 32,768 numbers on only
    return torch.from_numpy(np.argsort(key.to(torch.uint16).numpy(), kind="stable"))


def _csr(starts: Tensor, col: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    # not checked: that costs passes over the entries, and they are right by construction
    return torch.sparse_csr_tensor(starts, col, value, shape, check_invariants=False)


with warnings.catch_warnings():  # PyTorch says once in a process that CSR is in beta: here, where nobody listens
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()
