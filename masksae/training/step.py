"""One SAE in training: its step, its optimiser, and the state that is not a weight.

A step never waits for the device: thresholds, counters, the dead, the controller and the check of the loss are tensors
there, and what depends on the step's number only is decided on the host. That state changes in `_update_` alone, so
logging cannot alter training. What differs between selection rules is asked of the rule (`saes/rules.py`).
"""

import contextlib
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from masksae.saes.config import AuxK
from masksae.saes.loss import Outcome, aux_loss, dead_latents, dense_step
from masksae.saes.sae import SAE, load_state
from masksae.saes.sparse import DENSE_SHARE, runs_sparse, sparse_step

EPS = 1e-8

SILENT_BATCHES = 100
"""`history` counts as silent the latents that fired in none of so many batches."""

EXPLODED = 1e4
"""A loss beyond this is an error; activations are scaled to a mean squared norm of 1, so it starts near 1."""

GAIN = 0.02
"""The controller of a rule multiplies its coefficient by (L0 / target)^GAIN, at most twofold, after each step past the
sparsity warm-up."""


def moments(parameter: Tensor, adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state of a parameter before its first step."""
    where = parameter.device if adam.param_groups[0]["fused"] else "cpu"  # as Adam itself makes it
    state = {"step": torch.zeros((), dtype=torch.float32, device=where)}
    return state | {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}


class Update:
    """What every update shares, of one SAE or of a stack of them (`training/stack.py`), whose tensors have one more
    dimension in front."""

    sae: Any
    config: Any
    """The group's TrainConfig."""
    adam: torch.optim.Adam
    coefficient: Tensor
    failed: Tensor
    """Step at which the loss was out of bounds for the first time, or -1."""

    def _autocast(self):
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        # inside another autocast, even one that is off, a cache would keep the first step's weights
        return torch.autocast(self.sae.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def _ramp(self, step: int) -> float:
        """Share of the sparsity coefficient that this step takes."""
        warmup = self.config.sparsity_steps
        return min(step / warmup, 1.0) if warmup else 1.0

    def _estimates(self, step: int) -> bool:
        """Whether the threshold follows this step."""
        late = step > self.config.threshold_start or step == self.config.steps - 1
        return late and self.sae.config.selection.estimates_threshold

    def _controlled(self, step: int) -> bool:
        """Whether the controller of the coefficient is at work."""
        return self.sae.config.selection.controlled and step >= self.config.sparsity_steps

    @torch.no_grad()
    def _update_(self, outcome: Outcome, batch: int, step, controlled: bool) -> None:
        """Counters, threshold, controller and the watch on the loss; the only place where they change."""
        sae, config = self.sae, self.config
        sae.tokens_since_fired.add_(batch).masked_fill_(outcome.fired, 0)
        if outcome.smallest is not None:
            smallest = outcome.smallest.to(sae.threshold.dtype)
            mixed = config.threshold_ema * sae.threshold + (1 - config.threshold_ema) * smallest
            mixed = torch.where(sae.threshold < 0, smallest, mixed)
            sae.threshold.copy_(torch.where(smallest > 0, mixed, sae.threshold))
        if controlled:
            ratio = (outcome.l0 / sae.config.selection.goal).clamp(1e-6, 1e6)
            self.coefficient.mul_(ratio.pow(GAIN).clamp(0.5, 2.0))
        first = (self.failed < 0) & ~(outcome.loss.abs() < EXPLODED)
        self.failed.copy_(torch.where(first, step, self.failed))

    @torch.no_grad()
    def _descend(self, lr) -> None:
        """Project the decoder's gradient, clip, Adam, decoder rows back to norm 1, the rule's own parameters to where
        they make sense."""
        sae, rule = self.sae, self.sae.config.selection
        unit_rows = rule.unit_rows and not sae.config.frozen_decoder
        if sae.config.frozen_decoder:
            sae.W_dec.grad = None
        if unit_rows:
            sae.W_dec.grad.addcmul_(sae.W_dec, (sae.W_dec.grad * sae.W_dec).sum(-1, keepdim=True), value=-1)
        if rule.clipped:
            self._clip_()
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)  # gradients exist for one SAE of a group, or one stack, at a time
        if unit_rows:
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        self._project_()

    def _clip_(self) -> None:
        """Bring every SAE's gradient to the largest norm."""
        raise NotImplementedError

    def _project_(self) -> None:
        """Bring the rule's own parameters back to where they make sense."""
        raise NotImplementedError


class Trainer(Update):
    """An SAE with its optimiser. `buffers` holds work space shared with other trainers."""

    def __init__(self, sae: SAE, config, device="cpu", buffers: dict | None = None):
        self.sae, self.config = sae.to(device), config
        self.steps = config.steps  # of the whole run, on a snapshot's branch too
        self.buffers = {} if buffers is None else buffers
        device, rule = torch.device(device), sae.config.selection
        self.sparse = runs_sparse(device, config.precision)
        self.adam = torch.optim.Adam(
            sae.parameters(), lr=config.lr, betas=rule.betas, eps=EPS, fused=device.type in ("cpu", "cuda")
        )
        first = getattr(rule, rule.coefficient) if rule.coefficient else 1.0
        self.coefficient = torch.tensor(first, dtype=sae.dtype, device=device)
        self.failed = torch.tensor(-1, device=device)

    def step(self, x: Tensor, step: int, record: bool = False, target: Tensor | None = None) -> None:
        """One update on a scaled batch x [B, d], to be reconstructed or to be turned into `target`; `record` appends to
        the SAE's history."""
        outcome = self.gradients(x, step, target)
        self._update_(outcome, len(x), step, self._controlled(step))
        self._descend(self.config.lr_at(step))
        if record:
            self._record(x if target is None else target, outcome, step)

    @torch.no_grad()
    def gradients(self, x: Tensor, step: int, target: Tensor | None = None) -> Outcome:
        """Fill every parameter's `.grad` and change nothing else."""
        sae, target = self.sae, x if target is None else target
        rule, estimate = sae.config.selection, self._estimates(step)
        dead_after, weight = self._dead_after(len(x), step), self.coefficient * self._ramp(step)
        with self._autocast():
            xc = sae.encoder_input(x)
            pre = self._pre_activations(xc)
            index = rule.support(sae, pre, DENSE_SHARE * pre.numel()) if self.sparse else None
            if index is None:
                return dense_step(sae, target, xc, pre, weight, dead_after, estimate, step)
        outcome = sparse_step(sae, target, xc, pre, index, weight, estimate, step)
        if dead_after is not None:
            dead = dead_latents(sae, outcome.fired, len(x), dead_after)
            if dead.any():
                with torch.enable_grad():
                    extra = aux_loss(sae, x, outcome.residual, dead)
                    extra.backward()
                outcome = replace(outcome, loss=outcome.loss + extra.detach())
        return outcome

    def _pre_activations(self, xc: Tensor) -> Tensor:
        """pre [B, F], on a CPU in a buffer: fresh memory of this size costs a third of the product."""
        sae = self.sae
        if not self.sparse:
            return xc @ sae.W_enc + sae.b_enc
        key = (len(xc), sae.config.n_latents, sae.dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty(key[:2], dtype=sae.dtype)
        return torch.addmm(sae.b_enc, xc, sae.W_enc, out=self.buffers[key])

    def _dead_after(self, batch: int, step: int) -> int | None:
        """Tokens without firing that make a latent dead; None where none can be dead: on a CPU by looking, elsewhere by
        the tokens seen, which needs no waiting."""
        if self.sae.config.aux is None:
            return None
        dead_after = self.sae.config.aux.dead_after(self.steps * batch)
        silent = self.sae.tokens_since_fired.max().item() if self.sparse else step * batch
        return dead_after if silent + batch >= dead_after else None

    def _project_(self) -> None:
        self.sae.config.selection.project_(self.sae)

    def _clip_(self) -> None:
        """As `clip_grad_norm_`; where looking costs no waiting, what is short enough is not multiplied by 1."""
        clip, parameters = self.config.clip, list(self.sae.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not self.sparse or not norm + 1e-6 <= clip:  # so that a norm of NaN goes on
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)

    def _record(self, x: Tensor, outcome: Outcome, step: int) -> None:
        unexplained = (outcome.residual.square().sum() / (x - x.mean(0)).square().sum()).item()
        dead_after = (self.sae.config.aux or AuxK()).dead_after(self.steps * len(x))  # with or without its help
        record = {
            "step": step,
            "loss": outcome.loss.item(),
            "explained_variance": 1 - unexplained if math.isfinite(unexplained) else None,
            "l0": outcome.l0.item(),
            "dead": int((self.sae.tokens_since_fired >= dead_after).sum()),
            "silent": int((self.sae.tokens_since_fired >= SILENT_BATCHES * len(x)).sum()),
            "threshold": self.sae.threshold.item(),
        }
        if name := self.sae.config.selection.coefficient:
            record[name] = self.coefficient.item()
        self.sae.history.append(record)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must survive, by name."""
        result = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.adam.state[parameter].items():  # those of a stack count their steps together
                result[f"adam.{name}.{key}"] = value.clone() if key == "step" else value
        return result | {"coefficient": self.coefficient}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], folder=None) -> None:
        """Take over what `tensors` gave. Raises CheckpointError."""
        load_state(self.sae, {name[4:]: value for name, value in tensors.items() if name.startswith("sae.")}, folder)
        for name, parameter in self.sae.named_parameters():
            state = self.adam.state.get(parameter)
            if state is None:
                if f"adam.{name}.step" not in tensors:
                    continue
                state = self.adam.state[parameter] = moments(parameter, self.adam)
            for key, value in state.items():  # in place: they may be a part of a stack's
                given = tensors.get(f"adam.{name}.{key}")  # None: a start, before the first step
                value.zero_() if given is None else value.copy_(given)
        self.coefficient.copy_(tensors["coefficient"])
