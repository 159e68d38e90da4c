"""What each selection rule computes in training, twice: dense with autograd (the definition), and on its few active entries.

    dense(sae, pre, weight) -> (f [B, F], gate [B, F] or None, penalty)
    support(sae, pre, most) -> flat indices, ascending, of the entries of pre that can have a gradient; None for more than `most`
    sparse(sae, e)          -> (f, gate or None) at the entries `e`
    backward(sae, e, f, grad_f, grad_gate, weight) -> (gradient of pre at the entries, penalty); sets the gradients of a rule's own
                               parameters and adds to those of the decoder
    smallest(f, row, B)     -> what the inference threshold follows (TopK kinds), 0 if nothing is active; f of the entries, whose tokens `row`
                               names, or of all latents [B, F] without it

`weight` is the sparsity coefficient of the step (warm-up and controller included). A gate is a second set of latents whose
reconstruction is also trained, through a frozen decoder. The formulas are those of dictionary_learning 0.1.0.
"""

import torch
from torch import Tensor

from masksae.saes.config import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK


class ReLURule:
    """f = ReLU(pre); penalty weight x mean_b sum_j f_j |d_j|."""

    def dense(self, sae, pre: Tensor, weight):
        f = torch.relu(pre)
        return f, None, weight * (f @ sae.W_dec.norm(dim=1)).mean()

    def support(self, sae, pre: Tensor, most: float) -> Tensor | None:
        return _indices(pre > 0, most)

    def sparse(self, sae, e):
        return e.pre, None

    def backward(self, sae, e, f: Tensor, grad_f: Tensor, grad_gate, weight):
        norm, batch = sae.W_dec.norm(dim=1), e.shape[0]
        total = e.per_latent(f)
        sae.W_dec.grad.addcmul_(sae.W_dec, (weight / batch * total / norm.clamp(min=1e-12))[:, None])
        return grad_f + (weight / batch * norm)[e.col], weight / batch * (total @ norm)


class GatedRule:
    """f = ReLU(exp(r_mag) z + b_mag) where the gate pre = z + b_enc is open; penalty weight x mean_b sum_j ReLU(pre_j)."""

    def dense(self, sae, pre: Tensor, weight):
        gate = torch.relu(pre)
        return sae.magnitudes(pre) * (pre > 0), gate, weight * gate.sum(1).mean()

    support = ReLURule.support

    def sparse(self, sae, e):
        z = e.pre - sae.b_enc[e.col]
        return torch.relu(sae.r_mag.exp()[e.col] * z + sae.b_mag[e.col]), e.pre

    def backward(self, sae, e, f: Tensor, grad_f: Tensor, grad_gate: Tensor, weight):
        grad_f = grad_f * (f > 0)
        scaled = grad_f * sae.r_mag.exp()[e.col]
        sae.b_mag.grad = e.per_latent(grad_f)
        sae.r_mag.grad = e.per_latent(scaled * (e.pre - sae.b_enc[e.col]))
        grad_gate = grad_gate + weight / e.shape[0]
        sae.b_enc.grad = -e.per_latent(
            scaled
        )  # the magnitude does not see b_enc; the caller adds all of the pre-activation's
        return scaled + grad_gate, weight * e.pre.sum() / e.shape[0]


class JumpReLURule:
    """f = pre where pre > threshold; penalty weight x (L0 / target - 1)^2; rectangles in place of the step's derivative.

    As in dictionary_learning the step of L0 is taken of f, not of pre: values just above a threshold move it, values below don't.
    """

    def dense(self, sae, pre: Tensor, weight):
        rule = sae.config.selection
        f, l0 = _Jump.apply(pre, sae.thresholds, rule.bandwidth)
        return f, None, weight * (l0 / rule.target_l0 - 1).square()

    def support(self, sae, pre: Tensor, most: float) -> Tensor | None:
        return _indices(pre > sae.thresholds - 0.5 * sae.config.selection.bandwidth, most)

    def sparse(self, sae, e):
        return e.pre * (e.pre > sae.thresholds[e.col]), None

    def backward(self, sae, e, f: Tensor, grad_f: Tensor, grad_gate, weight):
        rule, batch = sae.config.selection, e.shape[0]
        theta, width = sae.thresholds, rule.bandwidth
        active = e.pre > theta[e.col]
        count = e.per_latent(active.to(f.dtype))
        excess = count.sum() / batch / rule.target_l0 - 1
        step = (
            2 * weight * excess / (rule.target_l0 * batch)
        )  # derivative of the penalty with respect to each entry's step
        near, near_f = _window(e.pre - theta[e.col], width), _window(f - theta[e.col], width) & active
        grad = -(theta / width) * e.per_latent(near * grad_f) - step / width * e.per_latent(near_f.to(f.dtype))
        sae.thresholds.grad = grad - step / width * (batch - count) * _window(theta, width)  # silent entries have f = 0
        return grad_f * active, weight * excess.square()


class TopKRule:
    """f = ReLU(pre) at the k largest of each token."""

    def dense(self, sae, pre: Tensor, weight):
        h = torch.relu(pre)
        index = h.detach().topk(sae.config.selection.k, dim=1, sorted=False).indices
        return h * torch.zeros_like(h, dtype=torch.bool).scatter(1, index, True), None, 0.0

    def support(self, sae, pre: Tensor, most: float) -> Tensor | None:
        if sae.config.selection.k * len(pre) > most:
            return None
        value, index = pre.topk(sae.config.selection.k, dim=1, sorted=False)
        index = torch.where(value > 0, index, -1).sort(dim=1).values
        kept = index >= 0
        return (index + torch.arange(len(pre))[:, None] * pre.shape[1])[kept]

    sparse = ReLURule.sparse

    def backward(self, sae, e, f: Tensor, grad_f: Tensor, grad_gate, weight):
        return grad_f, 0.0

    def smallest(self, f: Tensor, row: Tensor | None, batch: int) -> Tensor:
        """Mean over tokens of the smallest positive value kept, 0 if there is none."""
        active = torch.where(f > 0, f, torch.inf)
        if row is None:
            least = active.amin(1)
        else:
            least = f.new_full((batch,), torch.inf).scatter_reduce_(0, row, active, "amin")
        some = least < torch.inf
        return torch.where(some, least, 0).sum() / some.sum().clamp(min=1)


class BatchTopKRule(TopKRule):
    """f = ReLU(pre) at the k B largest of the whole batch; of equal ones, the first (on a GPU: any)."""

    def dense(self, sae, pre: Tensor, weight):
        h = torch.relu(pre)
        flat = h.detach().reshape(-1)
        index = flat.topk(min(round(sae.config.selection.k * len(pre)), len(flat)), sorted=False).indices
        return h * torch.zeros_like(flat, dtype=torch.bool).scatter(0, index, True).view_as(h), None, 0.0

    def support(self, sae, pre: Tensor, most: float) -> Tensor | None:
        count = round(sae.config.selection.k * len(pre))
        return largest(pre, count) if count <= most else None

    def smallest(self, f: Tensor, row: Tensor | None, batch: int) -> Tensor:
        """The smallest positive value kept, 0 if there is none."""
        if f.numel() == 0:
            return f.new_zeros(())
        return torch.where(f > 0, f, torch.inf).min().nan_to_num(posinf=0.0)


_RULES = {ReLU: ReLURule(), Gated: GatedRule(), JumpReLU: JumpReLURule(), TopK: TopKRule(), BatchTopK: BatchTopKRule()}


def rule_of(config: SAEConfig):
    """The rule of an SAE."""
    return _RULES[type(config.selection)]


class _Jump(torch.autograd.Function):
    """(pre, thresholds, bandwidth) -> (f, mean number of active latents per token)."""

    @staticmethod
    def forward(ctx, pre, theta, width):
        active = pre > theta
        ctx.save_for_backward(pre, theta, active)
        ctx.width = width
        return pre * active, active.sum(dtype=pre.dtype) / len(pre)

    @staticmethod
    def backward(ctx, grad_f, grad_l0):
        (pre, theta, active), width = ctx.saved_tensors, ctx.width
        near = _window(pre - theta, width)
        grad_theta = -(theta / width) * torch.where(near, grad_f, 0).sum(0)
        near_f = (near & active).sum(0) + (~active).sum(0) * _window(theta, width)  # where f, 0 if silent, is near
        return grad_f * active, grad_theta - grad_l0 / (len(pre) * width) * near_f, None


def _window(x: Tensor, width: float) -> Tensor:
    """Where the rectangle kernel is not 0."""
    return x.abs() < 0.5 * width


def _indices(mask: Tensor, most: float) -> Tensor | None:
    return None if torch.count_nonzero(mask) > most else mask.view(-1).nonzero().squeeze(1)


def largest(h: Tensor, count: int) -> Tensor:
    """Flat indices, ascending, of the `count` largest positive entries of h [B, F]; of equal ones, the first in row-major order."""
    flat = h.view(-1)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=h.device)
    index = _above_lower_bound(flat, count)
    if len(index) <= count:
        return index
    value = flat[index]
    edge = value.topk(count, sorted=False).values.min()
    keep = value > edge
    ties = (value == edge).nonzero().squeeze(1)[: count - int(keep.sum())]
    keep[ties] = True
    return index[keep]


def _above_lower_bound(flat: Tensor, count: int) -> Tensor:
    """Indices of a small superset of the `count` largest positive entries: a strided sample tells where to cut."""
    sample = flat[::61]
    bound = sample.topk(min(len(sample), int(1.15 * count / 61) + 64)).values[-1].clamp(min=0)
    index = (flat > bound).nonzero().squeeze(1)
    if len(index) < count and bound > 0:
        index = (flat > 0).nonzero().squeeze(1)
    return index
