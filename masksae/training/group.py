"""Train several SAEs on one activation stream; kill it at any moment and it goes on where the last checkpoint was.

The recipe is dictionary_learning's (August 2025): activations divided by their root mean square norm, b_dec from the
geometric median of the first batch (where the rule wants it), loss, decoder gradients without their radial part,
gradient clipping, Adam, rows of the decoder back to norm 1. It differs on purpose in this:

    norm            of the positions that an SAE trains on, theirs of all: what is dropped must change nothing
    warm-up         step s has (s + 1) / warmup of the rate, theirs s / warmup: their first step moves nothing
    sparsity        the warm-up of its coefficient is 5 warm-ups, half of the run at most; theirs is a number of its own
    threshold       its mean leaves out batches without an active latent, and for TopK tokens without one; theirs mixes
                    in 0, which lets everything through for a while, or infinity, which lets nothing through for good
    JumpReLU        thresholds stay at least 0; theirs may fall below, where a latent can be active and negative
    first rows      directions are Gaussian, none is preferred; theirs are uniform in a cube for TopK, BatchTopK,
                    Matryoshka and JumpReLU, which prefers its corners
    dead latents    after a sixteenth of the run's tokens, 10,000,000 at most; theirs always after those

The step itself is in `step.py`; here are the group, its checkpoints and its snapshots.
"""

import copy
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from masksae import progress as bars
from masksae.activations import ActivationStream, differing
from masksae.errors import CheckpointError, ConfigError, DataError, readable
from masksae.files import atomic_dir, ensure_writable, read_json, recover, run_id, save_tensors, write_json
from masksae.memory import check_memory
from masksae.saes.config import AuxK, SAEConfig
from masksae.saes.sae import SAE, SAE_FILES, read_tensors, seal
from masksae.saes.sparse import runs_sparse
from masksae.training.config import TrainConfig
from masksae.training.logs import Log
from masksae.training.stack import own_stream, stacks
from masksae.training.step import EXPLODED, Trainer

STACKED = {"cuda"}
"""Kinds of devices on which SAEs of one architecture take their steps together; on CPUs the sparse step of each is
faster."""

OFFSET = 4
"""A mean of the activations of more times their spread is warned of, where b_dec starts at 0: ReLU then loses a sixth
of the explained variance and JumpReLU most of it (sums of 100 sparse directions, 1,500 steps)."""

SCHEMA = 4
"""Version of the checkpoint's form; raise it when the files change meaning."""


@torch.inference_mode(False)  # an SAE made inside could not be trained, by the caller neither
def train(
    sae_configs: list[SAEConfig],
    stream: ActivationStream,
    train_config: TrainConfig,
    *,
    checkpoint_dir=None,
    device=None,
    progress: bool = True,
    log: Log | None = None,
) -> list[SAE]:
    """Train one SAE per config on the batches of `stream`; every SAE sees the same batches, unless its config says
    otherwise.

    Training begins at the stream's beginning, whatever was read from it before, or where the checkpoint is.

    checkpoint_dir  where to keep the state (overwritten atomically) and the snapshots; training resumes from it by
                    itself, and the result is the same bytes as without the interruption on the same device. Other
                    activations are refused, as far as `ActivationStream.identity` can tell
    device          of the SAEs; None: the CPU
    log             called with (number of the SAE, record) as the records of `SAE.history` come; see
                    `masksae.training.logs`. After a kill the records since the last checkpoint come again

    Returns SAEs for raw activations (scale and decoder norms folded in), with `history`.
    Raises ConfigError, DataError, CheckpointError, OutputError.

    >>> from masksae import BatchTopK
    >>> x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> stream = ActivationStream.from_array(x, batch_size=100, seed=0)
    >>> recipe = TrainConfig(50, warmup=5, threshold_start=20)
    >>> [sae] = train([SAEConfig(8, 32, BatchTopK(4))], stream, recipe, progress=False)
    >>> sae.history[-1]["step"], sae.history[-1]["l0"]
    (49, 4.0)
    """
    folder = None if checkpoint_dir is None else ensure_writable(checkpoint_dir)
    device = torch.device(device or "cpu")
    with own_stream(device), torch.autocast(device.type, enabled=False):  # a caller's; our own is `precision`
        return _train(sae_configs, stream, train_config, folder, device, progress, log)


def _train(sae_configs, stream: ActivationStream, train_config: TrainConfig, folder, device, progress, log):
    stream.to(device)  # before anything asks for a pool
    _check(sae_configs, stream, train_config, folder)
    sparse = runs_sparse(device, train_config.precision)
    check_memory(sae_configs, stream.batch_size, device, sparse=sparse, branch=bool(train_config.snapshots))
    group = Group(sae_configs, stream, train_config, device)
    if folder is not None and recover(folder / "checkpoint").exists():
        group.load(folder / "checkpoint")
    else:
        group.start()
    label = f"training {len(sae_configs)} SAEs" if progress else None
    with (
        bars.bar(total=train_config.steps, initial=group.step, label=label, unit="steps") as bar,
        stream.until(train_config.steps),
    ):
        group.run(train_config, bar.update, folder, log)
    return group.finish()


def load_snapshots(checkpoint_dir, *, device=None) -> dict[int, list[SAE]]:
    """The SAEs that `train` saved along the way, by step, in the order of its configs. Raises CheckpointError for a
    damaged one, and if there is no such folder.

    >>> import tempfile
    >>> from masksae import TopK
    >>> stream = ActivationStream.from_array(torch.randn(100, 4), batch_size=10, seed=0)
    >>> recipe = TrainConfig(20, warmup=2, threshold_start=5, snapshots=(10,))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = train([SAEConfig(4, 16, TopK(2))], stream, recipe, checkpoint_dir=folder, progress=False)
    ...     sorted(load_snapshots(folder))
    [10]
    """
    if not Path(checkpoint_dir).is_dir():
        raise CheckpointError(f"There is no folder {checkpoint_dir}. Give the checkpoint_dir that `train` was given.")
    folders = sorted(Path(checkpoint_dir).glob("snapshots/step-*"))
    with readable(checkpoint_dir):
        return {int(f.name[5:]): [SAE.load(path, device=device) for path in sorted(f.glob("sae-*"))] for f in folders}


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


class Group:
    """All SAEs of one stream, and the step they have reached."""

    def __init__(self, configs: list[SAEConfig], stream: ActivationStream, config: TrainConfig, device):
        buffers: dict = {}
        self.trainers = [Trainer(SAE(c), config, device, buffers) for c in configs]
        self.stream, self.step = stream.to(device), 0
        self.saved: int | None = None
        self.views = list(dict.fromkeys(view_of(c, stream) for c in configs))
        self.scales: list[float] = []  # by view
        self.seen = [self.views.index(view_of(c, stream)) for c in configs]
        self.stacks, self.alone = [], list(range(len(configs)))
        if torch.device(device).type in STACKED:
            self.stacks, self.alone = stacks(self.trainers, self.seen)
        self.identity: dict = {
            "saes": [c.to_dict() for c in configs],
            "train": config.identity(),
            "batch_size": stream.batch_size,
            "seed": stream.seed,
            "stream": stream.identity(),
        }

    def start(self) -> None:
        """Scales and b_dec from the first batches."""
        beginning = {"pool": 0, "batch": 0}
        self.stream.load_state_dict(beginning)
        found = {dropped: self.stream.scale(dropped) for dropped in {dropped for _, dropped in self.views}}
        self.scales = [found[dropped] for _, dropped in self.views]
        if not min(self.scales) > 0:
            raise DataError("The first activations of the stream are all zero. Look at the model and the hook point.")
        with self.stream.until(1):
            first = next(self.stream.batches(self.views))
        self.stream.load_state_dict(beginning)
        first = [x / scale for (x, *_), scale in zip(first, self.scales)]
        self._warn_of_offsets(first)
        medians = [geometric_median(x) for x in first]
        with torch.no_grad():
            for trainer, view in zip(self.trainers, self.seen):
                if trainer.sae.config.selection.median_start:
                    trainer.sae.b_dec.copy_(medians[view])

    def _warn_of_offsets(self, first: list[Tensor]) -> None:
        """Of rules that start from b_dec = 0, where the first batch of their view lies far from it."""
        ratios = []
        for x in first:
            spread = (x - x.mean(0)).square().sum(1).mean().sqrt()
            ratios.append((x.mean(0).norm() / spread).item() if spread > 0 else 0.0)
        rules = [trainer.sae.config.selection for trainer in self.trainers]
        far = [type(r).__name__ for r, view in zip(rules, self.seen) if not r.median_start and ratios[view] > OFFSET]
        if far:
            warnings.warn(
                f"The mean of the activations is {max(ratios):.0f} times their spread around it, of which "
                f"{', '.join(dict.fromkeys(far))} will explain little. Subtract the mean first, or take TopK or "
                "BatchTopK, which start at the median.",
                stacklevel=6,
            )

    def run(self, config: TrainConfig, tick=lambda: None, folder: Path | None = None, log: Log | None = None) -> None:
        """Go on to the last step of `config`, with checkpoints and snapshots if there is a folder."""
        self._follow(config)
        due = {} if folder is None else self._snapshots(config, folder)
        batches = self.stream.batches(self.views)
        while self.step < config.steps:
            for n, target in due.pop(self.step, []):
                self._snapshot(config, n, target)
            views = [
                [x / scale, *(t / scale for t in target)] for (x, _, *target), scale in zip(next(batches), self.scales)
            ]
            record = self.step % config.log_every == 0 or self.step == config.steps - 1
            for stack in self.stacks:
                stack.step([views[i] for i in stack.views], self.step, record)
            for i in self.alone:
                x, *target = views[self.seen[i]]
                self.trainers[i].step(x, self.step, record, *target)
            self.step += 1
            tick()
            if record:
                self.check()
                self._look()
                for i, trainer in enumerate(self.trainers if log else ()):
                    log(i, trainer.sae.history[-1])
            if folder is not None and (self.step % config.checkpoint_every == 0 or self.step == config.steps):
                self.save(folder / "checkpoint")
        self.check()
        for n, target in due.pop(self.step, []):
            self._snapshot(config, n, target)

    def _snapshots(self, config: TrainConfig, folder: Path) -> dict[int, list[tuple[int, Path]]]:
        """Step at which to leave the trunk -> (step n of the snapshot, where it goes), for those that are not there
        yet."""
        due: dict = {}
        for n in config.snapshot_steps:
            target = folder / "snapshots" / f"step-{n:08d}"
            if recover(target).exists():
                try:
                    known = read_json(target / "identity.json")
                except (DataError, FileNotFoundError):
                    known = None
                if known != run_id(self.identity):
                    raise CheckpointError(
                        f"{target} is damaged, or belongs to another configuration. Use another checkpoint_dir."
                    )
                continue
            leave = config.leaves(n)
            if leave < self.step:
                raise CheckpointError(
                    f"The snapshot of step {n} would have to leave at step {leave}, and training is at step "
                    f"{self.step} already. Use another checkpoint_dir, or leave this snapshot out."
                )
            due.setdefault(leave, []).append((n, target))
        return due

    def _snapshot(self, config: TrainConfig, n: int, target: Path) -> None:
        """Save the SAEs of step n, after going there on a branch; the trunk does not notice."""
        trunk = [{name: value.clone() for name, value in trainer.tensors().items()} for trainer in self.trainers]
        history = [list(trainer.sae.history) for trainer in self.trainers]
        step, position = self.step, self.stream.state_dict()
        if n > step:
            with self.stream.until(n):
                self.run(config.branch(n))
        with atomic_dir(target, ("identity.json", *(f"sae-*/{file}" for file in SAE_FILES))) as tmp:
            write_json(tmp / "identity.json", run_id(self.identity))
            for i, (trainer, view) in enumerate(zip(self.trainers, self.seen)):
                _finish(copy.deepcopy(trainer.sae), self.scales[view]).save(tmp / f"sae-{i:04d}")
        self.step = step
        self.stream.load_state_dict(position)
        self._follow(config)
        for trainer, tensors, records in zip(self.trainers, trunk, history):
            trainer.load(tensors)
            trainer.sae.history = records
        self._look()

    def save(self, folder: Path) -> None:
        """Write a checkpoint, of a sane state only."""
        self.check()
        tensors = {
            f"{i}.{name}": value for i, trainer in enumerate(self.trainers) for name, value in trainer.tensors().items()
        }
        record = {"schema": SCHEMA, "identity": self.identity, "step": self.step, "scales": self.scales}
        record |= {"stream": self.stream.state_dict(), "history": [trainer.sae.history for trainer in self.trainers]}
        with atomic_dir(folder, ("state.safetensors", "state.json")) as tmp:
            save_tensors(tensors, tmp / "state.safetensors")
            record["sha256"] = seal(record, tmp / "state.safetensors")
            (tmp / "state.json").write_text(json.dumps(record), encoding="utf-8")
        self.saved = self.step

    def check(self) -> None:
        """Raise DataError if the loss of some SAE was NaN, infinite or beyond reason at some step."""
        for i, trainer in enumerate(self.trainers):
            if (step := trainer.failed.item()) >= 0:
                kept = "No checkpoint" if self.saved is None else f"The checkpoint of step {self.saved}"
                raise DataError(
                    f"SAE {i} ({trainer.sae.config}): the loss was NaN or above {EXPLODED:g} at step {step}. {kept} "
                    "was kept from before. Lower lr, or look at the activations."
                )

    def _follow(self, config: TrainConfig) -> None:
        for each in (*self.trainers, *self.stacks):
            each.config = config

    def _look(self) -> None:
        for stack in self.stacks:
            stack.look(self.step)

    def finish(self) -> list[SAE]:
        """The SAEs, for raw activations."""
        for stack in self.stacks:
            stack.dissolve()
        return [_finish(trainer.sae, self.scales[view]) for trainer, view in zip(self.trainers, self.seen)]

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it is damaged or of another configuration."""
        record, tensors = read_tensors(folder, "state.safetensors", "state.json", SCHEMA)
        with readable(folder):
            self._take_over(record, tensors, folder)

    def _take_over(self, record: dict, tensors: dict[str, Tensor], folder: Path) -> None:
        found = record["identity"]
        if run_id(found) != run_id(self.identity):
            inner = {"stream": f" ({differing(found['stream'], self.identity['stream'])})"}
            where = [key + inner.get(key, "") for key in self.identity if found.get(key) != self.identity[key]]
            raise CheckpointError(
                f"The checkpoint in {folder} belongs to another configuration: {', '.join(where)} differ. Use another "
                "checkpoint_dir."
            )
        for i, trainer in enumerate(self.trainers):
            prefix = f"{i}."
            trainer.load(
                {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}, folder
            )
            trainer.sae.history = record["history"][i]
        self.step, self.scales = record["step"], record["scales"]
        self.saved = self.step
        self._look()
        self.stream.load_state_dict(record["stream"])


def _finish(sae: SAE, scale: float) -> SAE:
    """Make an SAE in training one for raw activations with unit decoder rows."""
    sae.requires_grad_(False)
    return (sae if sae.config.selection.unit_rows else sae.normalise_()).rescale_(scale)


def view_of(config: SAEConfig, stream: ActivationStream) -> tuple[int, bool]:
    """(seed of the order, whether masked positions are dropped): the view of the stream that an SAE trains on."""
    return (config.seed if config.own_order else stream.seed), config.drop_masked


def _check(sae_configs: list[SAEConfig], stream: ActivationStream, config: TrainConfig, folder) -> None:
    if not sae_configs:
        raise ConfigError("sae_configs is empty. Give at least one SAEConfig.")
    if config.snapshots and folder is None:
        raise ConfigError("Snapshots need a place: give checkpoint_dir, or leave TrainConfig.snapshots empty.")
    for sae in sae_configs:
        if not sae.selection.trainable:
            raise ConfigError(
                f"{sae.selection} comes from an SAE trained elsewhere and lacks a coefficient: give it to train."
            )
        _check_tokens(sae, stream.batch_size, config.steps)
        if sae.d_model != stream.d_model:
            raise ConfigError(
                f"The SAE reads width {sae.d_model}, the stream gives {stream.d_model}. Set d_model to "
                "the model's width."
            )


def _check_tokens(sae: SAEConfig, batch: int, steps: int) -> None:
    """Raise ConfigError for what cannot come about in a run of so many steps and tokens."""
    tokens, silent = steps * batch, sae.aux and sae.aux.dead_after_tokens
    if silent and silent >= tokens:
        raise ConfigError(
            f"AuxK.dead_after_tokens is {silent:,} and the run sees {tokens:,} tokens: no latent would ever be "
            f"revived. Leave it out (a sixteenth of the run: {AuxK().dead_after(tokens):,}), lower it, or train "
            "without "
            "aux."
        )
    sae.selection.check_batch(batch)
