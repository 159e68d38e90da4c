"""What a run costs, before it starts: work by arithmetic, time on several GPUs, memory, disk; and whether it fits here.

No weights are loaded: the language model is built on the `meta` device from its shape, which is known here, or stands
in a folder or the hub's cache; else one small file is asked of the hub, and that is said. FLOP are exact counts of the
matrix products; hours assume that a GPU reaches the share of its peak that `SHARE` states, where `MEASURED` holds none
for it. What can be measured is measured where the plan is made (`measure.py`): the same step on the same shapes, for a
moment.
"""

import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from masksae.data.models import require_decoder
from masksae.errors import ConfigError, SourceError
from masksae.files import cache_dir
from masksae.memory import ADAM_AND_WEIGHTS, available_bytes, parameters, training_bytes
from masksae.parallel import LARGEST
from masksae.saes.config import SAEConfig
from masksae.study.profile import Profile
from masksae.tracing import hook_point, hook_width

SHAPES = {
    "hub:EleutherAI/pythia-70m": ("gpt_neox", dict(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=2048, vocab_size=50304,
    )),
    "hub:EleutherAI/pythia-160m-deduped": ("gpt_neox", dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, vocab_size=50304,
    )),
    "hub:google/gemma-2-2b": ("gemma2", dict(
        hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        intermediate_size=9216, vocab_size=256000,
    )),
    "hub:google/gemma-2-27b": ("gemma2", dict(
        hidden_size=4608, num_hidden_layers=46, num_attention_heads=32, num_key_value_heads=16, head_dim=128,
        intermediate_size=36864, vocab_size=256000,
    )),
    "smollm2-135m": ("llama", dict(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True,
    )),
    "gemma3-270m": ("gemma3_text", dict(
        hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        intermediate_size=2048, vocab_size=262144,
    )),
}  # fmt: skip
"""Shapes of models that a plan must know without a network: transformers' model type and the values of its config."""


@dataclass(frozen=True)
class GPU:
    """A type of GPU by its data sheet."""

    name: str
    memory: float
    """GB."""
    half: float
    """TFLOP/s, dense bfloat16 products."""
    single: float
    """TFLOP/s, dense products of float32 in TF32, as `masksae.jobs.allow_tf32` has them."""
    bandwidth: float
    """TB/s."""


GPUS = [
    GPU("L4", 24, 121, 60, 0.30),
    GPU("RTX 4090", 24, 165, 82.6, 1.01),
    GPU("A100 80GB", 80, 312, 156, 2.04),
    GPU("H100 SXM", 80, 989, 494, 3.35),
]

SHARE = 0.4
"""Assumed share of a GPU's peak, in products and in bandwidth alike, where nothing was measured."""

MEASURED: dict[str, dict[str, float]] = {}
"""The share that a stage reached on a GPU of `GPUS`, by its name there: {"H100 SXM": {"activations": .5, "training":
.3}}. `benchmarks/gpu.py` prints the line for the card that it ran on."""

TRAFFIC = 40
"""Assumed passes over the pre-activations [batch, latents] in single precision of one dense training step (selection
included)."""

BASE, COPIES = 0.8e9, 2
"""Bytes of a Python process with its libraries, and copies of an SAE's latents that a score holds."""

MODES = 2
"""Every SAE is scored as trained and at matched sparsity."""


@dataclass(frozen=True)
class Work:
    """One stage: matrix products and bytes moved besides."""

    stage: str
    flop: float
    """In the language model's number format."""
    sae_flop: float = 0.0
    """In that of the SAEs."""
    traffic: float = 0.0
    """Bytes."""


class Plan:
    """Cost of a profile. Raises ConfigError or SourceError where the model's shape cannot be told."""

    def __init__(self, profile: Profile):
        self.profile = profile

    @cached_property
    def config(self):
        """Of the language model."""
        from transformers import AutoConfig

        source = self.profile.model.source
        if source in SHAPES:
            kind, values = SHAPES[source]
            return AutoConfig.for_model(kind, **values)
        name, _, revision = source.removeprefix("hub:").partition("@")
        try:
            config = _looked_up(name, revision or "main")
        except (OSError, ValueError) as error:
            raise SourceError(
                f"The shape of {source} is not known here and cannot be looked up ({str(error).splitlines()[0]}). "
                f"Known without a network: {', '.join(SHAPES)}; or give a folder with a config.json, or a .gguf file."
            ) from error
        require_decoder(config, source)
        return config.get_text_config()

    @cached_property
    def model(self):
        """The language model without values."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    @property
    def width(self) -> int:
        return hook_width(self.model, self.profile.model.block)

    @property
    def length(self) -> int:
        return self.profile.text.block_length

    def forward_flop(self, last: int, tokens: float) -> float:
        """Of a forward through block `last`, without the unembedding."""
        path, _, _ = hook_point(self.model, last).rpartition(".")
        blocks = self.model.get_submodule(path)[: last + 1]
        linear = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
        heads = self.config.num_attention_heads * getattr(
            self.config, "head_dim", self.width // self.config.num_attention_heads
        )
        return tokens * (2 * linear + 4 * heads * self.length * len(blocks))

    @property
    def prefix(self) -> int:
        """The last block that runs for the activations."""
        layer = self.profile.model.layer
        return self.config.num_hidden_layers - 1 if layer is None else layer

    @cached_property
    def saes(self) -> list[SAEConfig]:
        """All SAEs."""
        return [member.config(self.width) for member in self.profile.members]

    @property
    def streams(self) -> int:
        """Activation streams: what the model sees differs by arm, and by pair where tokens are masked. One on less text
        is part of another, one with masks that are fresh in every epoch is read as often."""
        fresh = {member.arm.masks(member.pair): member.arm.drawn_anew for member in self.profile.members}
        return sum(self.profile.training.epochs if each else 1 for each in fresh.values())

    @property
    def kept_streams(self) -> int:
        """Streams whose activations lie in scratch at a time: all; or where pairs are kept, those that a part or a
        later one is trained on."""
        parts = [{m.arm.masks(m.pair) for m in part.members if not m.arm.drawn_anew} for part in self.profile.parts]
        if not self.profile.keep_pairs:
            return len(set().union(*parts))
        done = [set().union(*parts[: i + 1]) for i in range(len(parts))]
        return max(len(made & set().union(*parts[i:])) for i, made in enumerate(done))

    @property
    def groups(self) -> list[list[SAEConfig]]:
        """SAEs that are trained together."""
        return [[member.config(self.width) for member in group.members] for group in self.profile.groups]

    @property
    def steps(self) -> int:
        """Of training; the BOS position of a block is not trained on."""
        training, text = self.profile.training, self.profile.text
        kept = text.block_length - (self.profile.model.bos_token is not None)
        blocks = -(-text.train_tokens // text.block_length)
        return training.epochs * (blocks * kept // training.batch_size)

    @property
    def text_tokens(self) -> float:
        """Tokens of text that fill all blocks: the larger of what the trained-on and the held-out documents need."""
        text, held_out = self.profile.text, self.profile.text.held_out_tokens + self.profile.contexts.tokens
        return max(text.train_tokens / (1 - text.held_out_share), held_out / text.held_out_share)

    @cached_property
    def work(self) -> list[Work]:
        """Activations, training, evaluation."""
        profile, tokens = self.profile, self.profile.text.train_tokens
        harvested = self.streams * tokens
        harvest = Work("activations", self.forward_flop(self.prefix, harvested))
        branches = sum(n * profile.training.decay for n in profile.training.snapshots if n < self.steps) / self.steps
        seen = tokens * profile.training.epochs * (1 + branches)
        share = [member.arm.tokens for member in profile.members]
        flop = sum(part * step_flop(c) for part, c in zip(share, self.saes)) * seen
        moved = sum(part * step_traffic(c, profile.training.batch_size) for part, c in zip(share, self.saes)) * seen
        return [harvest, Work("training", 0.0, flop, moved / profile.training.batch_size), self._evaluation()]

    def _evaluation(self) -> Work:
        """Scores on clean text: shared forwards to the block once, what lies behind it once for every SAE and mode."""
        profile, task = self.profile, self.profile.probing
        held = profile.text.held_out_tokens + profile.contexts.tokens
        words = profile.absorption.words * profile.absorption.draws
        rows = 113 if task.tasks == ["all"] else len(task.tasks)
        texts = (rows + len(task.shifted)) * (task.train + task.test) * min(task.max_tokens, 64)
        scored = self.saes
        once = self.forward_flop(self.prefix, held + words + texts)
        last = self.config.num_hidden_layers - 1
        head = 2 * self.width * self.config.vocab_size
        behind = self.forward_flop(last, 1) - self.forward_flop(self.prefix, 1) + head
        spliced = profile.evaluation.ce_tokens * (2 + MODES * len(scored)) * behind
        looks = 3 * held + words * profile.absorption.splits + texts
        return Work("evaluation", once + spliced, sum(2 * MODES * looks * c.d_model * c.n_latents for c in scored))

    def seconds(self, work: Work, gpu: GPU) -> float:
        """By arithmetic: products and other traffic one after the other, at the whole of the data sheet."""
        peak = {"bfloat16": 1e12 * gpu.half}
        seconds = work.flop / peak.get(self.profile.model.dtype, 1e12 * gpu.single)
        seconds += work.sae_flop / peak.get(self.profile.training.precision, 1e12 * gpu.single)
        return seconds + work.traffic / (1e12 * gpu.bandwidth)

    def hours(self, work: Work, gpu: GPU) -> float:
        """At the share of the data sheet that was measured for the stage, else at `SHARE`."""
        return self.seconds(work, gpu) / MEASURED.get(gpu.name, {}).get(work.stage, SHARE) / 3600

    def memory(self, device: str = "cuda") -> dict[str, float]:
        """Peak bytes on the device while an arm trains, by part."""
        profile, on_gpu = self.profile, not str(device).startswith("cpu")
        size = 2 if profile.model.dtype == "bfloat16" else 4
        config = self.config
        sequences = (256 if on_gpu else 16) * self.length
        inner = (
            3 * (getattr(config, "intermediate_size", None) or 4 * self.width)
            + 8 * self.width
            + 2 * config.num_attention_heads * self.length
        )
        most = max(self.groups, key=len)
        branch = bool(profile.training.snapshots)
        pool = self.pool_tokens * self.width * (size if on_gpu else 4)
        ahead = on_gpu and self.pool_tokens < profile.text.train_tokens  # the next pool is made beside the one in use
        found = {
            "language model": size * sum(p.numel() for p in self.model.parameters()),
            "its forward": size * sequences * inner,
            "activations (two pools)" if ahead else "activations": pool * (2 if ahead else 1),
            f"{len(most)} SAEs": training_bytes(most, profile.training.batch_size, sparse=not on_gpu, branch=branch),
        }
        return (
            found
            if on_gpu
            else found
            | {"Python and its libraries": BASE, "scores beyond that": max(0.0, self.scores() - sum(found.values()))}
        )

    @property
    def pool_tokens(self) -> int:
        """Tokens of a pool of activations, the largest."""
        return min(self.profile.training.pool_tokens, self.profile.text.train_tokens)

    def scores(self) -> float:
        """Bytes of ordinary memory while scores are taken: the language model, the text of the contexts and the words
        in it, the held-out text, a part's SAEs with their snapshots, and the latents of the first-letter words, for a
        few SAEs at a time."""
        profile, largest = self.profile, max(c.n_latents for c in self.saes)
        kept = max(len(part.members) for part in profile.parts) * (1 + len(profile.training.snapshots))
        return (
            (2 if profile.model.dtype == "bfloat16" else 4) * sum(p.numel() for p in self.model.parameters())
            + 4 * (2 * profile.contexts.tokens + profile.text.held_out_tokens) * self.width
            + 4 * kept * max(map(parameters, self.saes))
            + LARGEST * COPIES * 4 * profile.absorption.words * largest
        )

    def disk(self) -> dict[str, float]:
        """Bytes in the user's cache, by part."""
        profile, text = self.profile, self.profile.text
        tokens = text.train_tokens + text.held_out_tokens + profile.contexts.tokens
        weights = 4 * sum(map(parameters, self.saes))
        largest = max(4 * ADAM_AND_WEIGHTS * sum(map(parameters, group)) for group in self.groups)
        found = {
            "tokens (twice while they are put together)": 8 * tokens,
            "SAEs": weights * (1 + len(profile.training.snapshots)),
        }
        found["checkpoint (twice while it is replaced)"] = 2 * largest
        if profile.training.epochs > 1:
            found["activations (half precision)"] = 2 * text.train_tokens * self.width * self.kept_streams
        found["held-out activations"] = 4 * text.held_out_tokens * self.width
        return found

    def host(self) -> float:
        """Bytes of ordinary memory on a GPU machine: the model as it is loaded, a pool on its way into scratch, or
        scores."""
        size = 2 if self.profile.model.dtype == "bfloat16" else 4
        loaded = 2 * size * sum(p.numel() for p in self.model.parameters())
        pool = 6 * self.pool_tokens * self.width if self.profile.training.epochs > 1 else 0  # single and half precision
        return BASE + max(loaded, pool, self.scores())

    def check(self, device: str, kept: float = 0.0) -> None:
        """Raise ConfigError, with the remedy, if the run cannot fit on the device, or on the disk beside the `kept`
        bytes that it has there."""
        needed, free = sum(self.memory(device).values()), available_bytes(device)
        if free is not None and needed > free:
            parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in self.memory(device).items())
            raise ConfigError(
                f"Profile {self.profile.name} needs {needed / 1e9:.1f} GB on {device} ({parts}), {free / 1e9:.1f} GB "
                "are free. Use a larger device, or "
                "a profile of your own with fewer SAEs, a smaller training.pool_tokens, or model.dtype bfloat16."
            )
        disk, root = sum(self.disk().values()), cache_dir()
        while not root.exists():
            root = root.parent
        room = shutil.disk_usage(root).free + kept
        if disk > room:
            raise ConfigError(
                f"Profile {self.profile.name} needs {disk / 1e9:.1f} GB of disk in {cache_dir()}, {room / 1e9:.1f} GB "
                "are free. Point MASKSAE_CACHE to a "
                "larger disk, or lower text.train_tokens."
            )


def _looked_up(name: str, revision: str):
    """Config of a model in a .gguf file, a folder or the hub's cache; else from the hub, which is said, since without a
    network it takes half a minute to fail."""
    from transformers import AutoConfig

    if name.endswith(".gguf"):
        return AutoConfig.from_pretrained(Path(name).parent, gguf_file=Path(name).name, local_files_only=True)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        if Path(name).exists():
            raise
    print(f"masksae: asking the hub for the shape of {name} (its config.json)", file=sys.stderr, flush=True)
    return AutoConfig.from_pretrained(name, revision=revision)


def step_flop(config: SAEConfig) -> float:
    """Of a dense forward and backward, per token: two products forward, three backward (none for the activations)."""
    return 10.0 * config.d_model * config.n_latents


def step_traffic(config: SAEConfig, batch: int) -> float:
    """Bytes that one step moves besides its products: passes over the pre-activations, and Adam's over the
    parameters."""
    return 4.0 * (TRAFFIC * batch * config.n_latents + 8 * parameters(config))


def peers(plan: Plan) -> dict[str, dict[str, float]]:
    """FLOP of the same grid by other tools: "dictionary_learning" (all SAEs of an arm on one forward) and "SAELens" (a
    forward for each SAE), both scored by SAEBench, whose core evaluation takes full forwards for each SAE: 32,000
    sequences of 128 tokens, and 3,200 three times.
    """
    harvest, training, _ = plan.work
    last = plan.config.num_hidden_layers - 1
    core = 128 * (32_000 + 3 * 3_200) * (plan.forward_flop(last, 1) + 2 * plan.width * plan.config.vocab_size)
    scores = core * len(plan.saes)
    per_sae = harvest.flop * len(plan.saes) / plan.streams
    return {
        "dictionary_learning": {"activations": harvest.flop, "training": training.sae_flop, "evaluation": scores},
        "SAELens": {"activations": per_sae, "training": training.sae_flop, "evaluation": scores},
    }
