"""Train several SAEs on one activation stream; kill it at any moment and it goes on where the last checkpoint was.

The recipe is dictionary_learning's (August 2025) for the unit-norm family: activations divided by their root mean square norm,
b_dec from the geometric median of the first batch, loss, decoder gradients without their radial part, gradient clipping, Adam,
rows of the decoder back to norm 1. State that is not a weight changes in `_update_` only, so logging cannot alter training.

On a CPU with MKL the step is sparse (`saes/loss.py`), elsewhere dense.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from masksae.activations import ActivationStream
from masksae.errors import CheckpointError, ConfigError, DataError
from masksae.files import atomic_dir, ensure_writable, recover, run_id
from masksae.saes.config import SAEConfig
from masksae.saes.loss import Kept, aux_loss, dense_loss, select, sparse_gradients
from masksae.saes.sae import SAE, load_state, read_tensors

SCHEMA = 1
"""Version of the checkpoint's form."""

BETAS, EPS = (0.9, 0.999), 1e-8

SILENT_BATCHES = 100
"""`history` counts as silent the latents that fired in none of so many batches."""


@dataclass(frozen=True)
class TrainConfig:
    """What the SAEs of a group share."""

    steps: int
    """Optimiser steps."""
    lr: float = 3e-4
    """Peak learning rate of Adam."""
    warmup: int = 1000
    """Steps of linear warm-up."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    clip: float = 1.0
    """Largest norm of an SAE's gradient."""
    threshold_start: int = 1000
    """Step after which the inference threshold is estimated."""
    threshold_ema: float = 0.999
    """Memory of the threshold's running mean, per step."""
    log_every: int = 20
    """Steps between records of `SAE.history`; changes no result."""
    checkpoint_every: int = 200
    """Steps between checkpoints; changes no result."""

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps must be positive, found {self.steps}.")
        if not 0 <= self.warmup < self.steps or not 0 <= self.threshold_start < self.steps:
            raise ConfigError(
                f"warmup ({self.warmup}) and threshold_start ({self.threshold_start}) must be below steps ({self.steps}). Train longer or lower them."
            )
        if not self.lr > 0 or not 0 <= self.decay <= 1 or not 0 <= self.threshold_ema < 1 or not self.clip > 0:
            raise ConfigError(f"lr and clip must be positive, decay in [0, 1], threshold_ema in [0, 1): found {self}.")

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        up = (step + 1) / self.warmup if step < self.warmup else 1.0
        left = self.steps - step
        down = min(1.0, left / (self.decay * self.steps)) if self.decay else 1.0
        return self.lr * min(up, down)

    def identity(self) -> dict:
        """The values that change results."""
        return {name: value for name, value in asdict(self).items() if name not in ("log_every", "checkpoint_every")}


def train(
    sae_configs: list[SAEConfig],
    stream: ActivationStream,
    train_config: TrainConfig,
    *,
    checkpoint_dir=None,
    device=None,
    progress: bool = True,
) -> list[SAE]:
    """Train one SAE per config on the batches of `stream`; every SAE sees the same batches.

    checkpoint_dir  where to keep the state (overwritten atomically); training resumes from it by itself, and the result is the
                    same bytes as without the interruption on the same device
    device          of the SAEs; None: the CPU

    Returns SAEs for raw activations (scale folded in), with `history`. Raises ConfigError, DataError, CheckpointError, OutputError.
    """
    from tqdm import tqdm

    folder = None if checkpoint_dir is None else ensure_writable(checkpoint_dir) / "checkpoint"
    _check(sae_configs, stream)
    identity = {
        "saes": [c.to_dict() for c in sae_configs],
        "train": train_config.identity(),
        "batch_size": stream.batch_size,
        "seed": stream.seed,
    }
    group = _Group([_Member(SAE(c), train_config) for c in sae_configs], device or torch.device("cpu"))
    if folder is not None and recover(folder).exists():
        group.load(folder, identity, stream)
    else:
        group.start(stream)
    batches = iter(stream)
    with tqdm(
        total=train_config.steps,
        initial=group.step,
        desc=f"training {len(group.members)} SAEs",
        unit="step",
        disable=not progress,
        mininterval=1,
    ) as bar:
        while group.step < train_config.steps:
            x, _ = next(batches)
            record = group.step % train_config.log_every == 0 or group.step == train_config.steps - 1
            group.advance(x, train_config, record)
            bar.update()
            due = group.step % train_config.checkpoint_every == 0 or group.step == train_config.steps
            if folder is not None and due:
                group.save(folder, identity, stream)
    return [member.sae.rescale_(group.scale).requires_grad_(False) for member in group.members]


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Point [d] with the smallest summed distance to the rows of x [n, d] (Weiszfeld's iteration)."""
    guess = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - guess).norm(dim=1).clamp(min=1e-8)
        new = (x * weight[:, None]).sum(0) / weight.sum()
        moved, guess = (new - guess).norm(), new
        if moved < tolerance:
            break
    return guess


class _Member:
    """One SAE in training, with its optimiser."""

    def __init__(self, sae: SAE, config: TrainConfig):
        self.sae, self.config = sae, config

    def to(self, device):
        self.sae.to(device)
        self.sparse = torch.device(device).type == "cpu" and torch.backends.mkl.is_available()
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=self.config.lr, betas=BETAS, eps=EPS, fused=True)

    def step(self, x: Tensor, step: int, record: bool) -> None:
        """One update on a scaled batch x [B, d]."""
        sae = self.sae
        with torch.set_grad_enabled(not self.sparse):
            h = sae.pre_activations(x)
        kept = select(h.detach(), sae.config.selection.k)
        self._update_(kept, len(x), step)
        dead = None if sae.config.aux is None else sae.tokens_since_fired >= sae.config.aux.dead_after_tokens
        self.adam.zero_grad(set_to_none=True)
        if self.sparse:
            loss, x_hat = sparse_gradients(sae, x, kept)
            if dead is not None and dead.any():
                extra = aux_loss(sae, x, x_hat, dead)
                if extra.requires_grad:
                    extra.backward()
                loss = loss + extra.detach()
        else:
            loss, x_hat = dense_loss(sae, x, kept, h, dead)
            loss.backward()
        if record:
            self._record(x, x_hat, kept, loss.item(), step)
        self._descend(self.config.lr_at(step))

    @torch.no_grad()
    def _update_(self, kept: Kept, batch: int, step: int) -> None:
        """Threshold and firing counters; the only place where they change."""
        sae, config = self.sae, self.config
        strongest = kept.value.new_zeros(sae.config.n_latents).scatter_reduce_(0, kept.col, kept.value, "amax")
        sae.tokens_since_fired.add_(batch).masked_fill_(strongest > 0, 0)
        if step > config.threshold_start and len(kept.value):
            smallest = torch.where(kept.value > 0, kept.value, torch.inf).min().nan_to_num(posinf=0.0)
            mixed = config.threshold_ema * sae.threshold + (1 - config.threshold_ema) * smallest
            sae.threshold.copy_(torch.where(sae.threshold < 0, smallest, mixed))

    @torch.no_grad()
    def _descend(self, lr: float) -> None:
        """Project the decoder's gradient, clip, Adam, decoder rows back to norm 1."""
        w_dec = self.sae.W_dec
        w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.clip)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        w_dec /= w_dec.norm(dim=1, keepdim=True)

    def _record(self, x: Tensor, x_hat: Tensor, kept: Kept, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise DataError(
                f"The loss of SAE {self.sae.config} is {loss} at step {step}. Lower lr, or look at the activations; the last checkpoint is intact."
            )
        unexplained = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        self.sae.history.append(
            {
                "step": step,
                "loss": loss,
                "explained_variance": 1 - unexplained.item(),
                "l0": (kept.value > 0).sum().item() / len(x),
                "silent": int((self.sae.tokens_since_fired >= SILENT_BATCHES * len(x)).sum()),
                "threshold": self.sae.threshold.item(),
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must survive, by name."""
        result = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            result |= {f"adam.{name}.{key}": value for key, value in self.adam.state[parameter].items()}
        return result

    def load(self, tensors: dict[str, Tensor], folder) -> None:
        load_state(self.sae, {name[4:]: value for name, value in tensors.items() if name.startswith("sae.")}, folder)
        for name, parameter in self.sae.named_parameters():
            state = {"step": tensors[f"adam.{name}.step"].clone()}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"adam.{name}.{key}"])
            self.adam.state[parameter] = state


class _Group:
    """All SAEs of one stream, and the step they have reached."""

    def __init__(self, members: list[_Member], device):
        self.members, self.device = members, device
        self.step, self.scale = 0, 1.0
        for member in members:
            member.to(device)

    def start(self, stream: ActivationStream) -> None:
        """Scale and b_dec from the first batches."""
        position = stream.state_dict()
        self.scale = stream.scale()
        median = geometric_median(next(iter(stream))[0].to(self.device) / self.scale)
        stream.load_state_dict(position)
        with torch.no_grad():
            for member in self.members:
                member.sae.b_dec.copy_(median)

    def advance(self, x: Tensor, config: TrainConfig, record: bool) -> None:
        x = x.to(self.device) / self.scale
        for member in self.members:
            member.step(x, self.step, record)
        self.step += 1

    def save(self, folder: Path, identity: dict, stream: ActivationStream) -> None:
        from safetensors.torch import save_file

        tensors = {
            f"{i}.{name}": value.contiguous()
            for i, member in enumerate(self.members)
            for name, value in member.tensors().items()
        }
        record = {"schema": SCHEMA, "identity": identity, "step": self.step, "scale": self.scale}
        record |= {"stream": stream.state_dict(), "history": [member.sae.history for member in self.members]}
        with atomic_dir(folder) as tmp:
            save_file(tensors, tmp / "state.safetensors")
            (tmp / "state.json").write_text(json.dumps(record), encoding="utf-8")

    def load(self, folder: Path, identity: dict, stream: ActivationStream) -> None:
        record, tensors = read_tensors(folder, "state.safetensors", "state.json", SCHEMA)
        if run_id(record["identity"]) != run_id(identity):
            where = [key for key in identity if record["identity"].get(key) != identity[key]]
            raise CheckpointError(
                f"The checkpoint in {folder} belongs to another configuration: {', '.join(where)} differ. Use another checkpoint_dir, or delete this one."
            )
        for i, member in enumerate(self.members):
            prefix = f"{i}."
            member.load(
                {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}, folder
            )
            member.sae.history = record["history"][i]
        self.step, self.scale = record["step"], record["scale"]
        stream.load_state_dict(record["stream"])


def _check(sae_configs: list[SAEConfig], stream: ActivationStream) -> None:
    if not sae_configs:
        raise ConfigError("sae_configs is empty. Give at least one SAEConfig.")
    for config in sae_configs:
        if config.d_model != stream.d_model:
            raise ConfigError(
                f"The SAE reads width {config.d_model}, the stream gives {stream.d_model}. Set d_model to the model's width."
            )
