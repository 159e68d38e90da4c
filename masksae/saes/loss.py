"""The training loss and its gradient as the definition has it: dense, by autograd. GPUs run this, many SAEs at a time
(`training/stack.py`); CPUs mostly `saes/sparse.py`.

With B tokens, G prefix groups and e_g = x_hat_g - x the error of the reconstruction from groups 1..g,

    loss = sum_g w_g mean_b |e_g|^2  +  penalty  +  [ the first term for the gate ]
           +  c mean_b |r - x_aux|^2 / mean_b |r - mean r|^2  +  the SAE's penalties

w_g are the prefix weights; penalty and gate belong to the selection rule (`saes/rules.py`). The next term, AuxK, exists
only while latents are dead: r is the detached residual x - x_hat and x_aux its reconstruction by the k_aux strongest
dead latents. The last ones are those of `saes/penalties.py`, on the steps that apply them.

Nothing here waits for the device: no number is read back, and no shape depends on data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.saes.penalties import due, penalty_loss
from masksae.saes.sae import SAE


@dataclass(frozen=True)
class Outcome:
    """What a step leaves besides gradients; tensors on the SAE's device."""

    loss: Tensor
    """Scalar."""
    residual: Tensor
    """x - x_hat [B, d]."""
    fired: Tensor
    """bool [F]: active for some token of the batch."""
    l0: Tensor
    """Scalar: mean number of active latents per token."""
    smallest: Tensor | None
    """Scalar that the inference threshold follows, if one is estimated; 0 if no latent was active."""


def reconstruction_loss(sae: SAE, x: Tensor, f: Tensor, w_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_g w_g mean_b |e_g|^2, e_G [B, d]) with autograd."""
    error, total, sizes = b_dec - x, 0.0, sae.config.group_sizes
    groups = zip(f.split(sizes, 1), w_dec.split(sizes, 0)) if len(sizes) > 1 else [(f, w_dec)]  # a split is copied back
    for (f_g, rows), share in zip(groups, sae.config.prefix_shares):
        error = error + f_g @ rows
        total = total + share * error.square().sum(1).mean()
    return total * sae.config.prefix_weight, error


def aux_loss(sae: SAE, x: Tensor, residual: Tensor, dead: Tensor, pre: Tensor | None = None) -> Tensor:
    """AuxK with its coefficient: share of the residual's variance that the strongest dead latents leave unexplained; 0
    without any.

    pre  pre-activations of all latents [B, F]; without them, only those of the dead latents are computed
    """
    aux = sae.config.aux
    if pre is None:
        h, w_dec = torch.relu(sae.encoder_input(x) @ sae.W_enc[:, dead] + sae.b_enc[dead]), sae.W_dec[dead]
    else:
        h, w_dec = torch.relu(pre) * dead, sae.W_dec
    value, index = h.topk(min(aux.k or max(1, sae.config.d_model // 2), h.shape[1]), sorted=False)
    f_aux = torch.zeros_like(h).scatter(1, index, value)
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    loss = aux.coefficient * (residual - f_aux @ w_dec).square().sum(1).mean() / variance.clamp(min=1e-30)
    return torch.where(dead.any() & (variance > 0), loss, 0.0)


def dead_latents(sae: SAE, fired: Tensor, batch: int, dead_after: int) -> Tensor:
    """bool [F]: not fired in this batch, nor in the last `dead_after` tokens, this batch included."""
    return (sae.tokens_since_fired + batch >= dead_after) & ~fired


def dense_terms(
    sae: SAE, x: Tensor, pre: Tensor, weight=0.0, dead_after: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition without penalties: (loss, residual [B, d], f [B, F]), loss and f with autograd from `pre`, the
    pre-activations of x, and the parameters.

    weight      sparsity coefficient
    dead_after  add AuxK for latents that have not fired for so many tokens: 0 without any, but a top-k over all
                latents; None: do not
    """
    f, gate, penalty = sae.config.selection.dense(sae, pre, weight)
    loss, error = reconstruction_loss(sae, x, f, sae.W_dec, sae.b_dec)
    loss = loss + penalty
    if gate is not None:
        loss = loss + reconstruction_loss(sae, x, gate, sae.W_dec.detach(), sae.b_dec.detach())[0]
    residual = -error.detach()
    if dead_after is not None:
        loss = loss + aux_loss(sae, x, residual, dead_latents(sae, (f > 0).any(0), len(x), dead_after), pre)
    return loss, residual, f


def dense_loss(
    sae: SAE, x: Tensor, pre: Tensor, weight=0.0, dead_after: int | None = None, step: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: `dense_terms` and the penalties that this step applies (None: none); f without autograd."""
    loss, residual, f = dense_terms(sae, x, pre, weight, dead_after)
    if due(sae.config, step):
        loss = loss + penalty_loss(sae, f.norm(dim=0, dtype=sae.dtype), step, len(x))
    return loss, residual, f.detach()


def dense_step(
    sae: SAE,
    x: Tensor,
    xc: Tensor,
    pre: Tensor,
    weight,
    dead_after: int | None,
    estimate: bool,
    step: int | None = None,
) -> Outcome:
    """Fill every `.grad`. `xc` is the encoder's input, `pre` [B, F] its pre-activations, `dead_after` and `step` as in
    `dense_loss`; `estimate`: fill `Outcome.smallest`."""
    sae.zero_grad()
    pre = pre.detach().requires_grad_()
    with torch.enable_grad():
        loss, residual, f = dense_loss(sae, x, pre, weight, dead_after, step)
        loss.backward()
    encoder_gradients(sae, (pre.grad.t() @ xc).to(sae.dtype), pre.grad.sum(0, dtype=sae.dtype))
    smallest = sae.config.selection.smallest(f, None, len(f)) if estimate else None
    active = f > 0
    return Outcome(loss.detach(), residual, active.any(0), active.sum().to(sae.dtype) / len(f), smallest)


def encoder_gradients(sae: SAE, w_enc: Tensor, b_enc: Tensor) -> None:
    """From dpre^T xc [F, d] and the sum of dpre over tokens [F]: set W_enc.grad, add to b_enc.grad and b_dec.grad."""
    sae.W_enc.grad = w_enc.t()
    sae.b_enc.grad = b_enc if sae.b_enc.grad is None else sae.b_enc.grad + b_enc
    if sae.config.selection.centred:
        sae.b_dec.grad -= sae.W_enc.detach() @ b_enc
