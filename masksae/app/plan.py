"""What a run costs, before it starts: work by arithmetic, time on several GPUs, memory, disk; and whether it fits here.

No weights are loaded: the language model is built on the `meta` device from its shape, which is known here, or stands
in a folder or the hub's cache; else one small file is asked of the hub, and that is said. FLOP are exact counts of the
matrix products; hours assume that a GPU reaches the share of its peak that `SHARE` states. What can be measured is
measured where the plan is made (`measure.py`): the same step on the same shapes, for a moment. A plan as text fits 80
columns: `masksae plan paper`.
"""

import shutil
import sys
from collections.abc import Sequence
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
from masksae.saes.sparse import runs_sparse
from masksae.study.profile import Group, Part, Profile
from masksae.study.report.tables import to_text
from masksae.study.scores.perturbation import POOLED, kept_bytes
from masksae.study.sections import Arm
from masksae.tracing import hook_point, hook_width
from masksae.training.config import TrainConfig


def _shape(kind: str, width: int, layers: int, heads: int, inner: int, vocabulary: int, **further) -> tuple[str, dict]:
    values = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    return kind, values | {"vocab_size": vocabulary} | further


SHAPES = {
    "hub:EleutherAI/pythia-70m": _shape("gpt_neox", 512, 6, 8, 2048, 50304),
    "hub:EleutherAI/pythia-160m-deduped": _shape("gpt_neox", 768, 12, 12, 3072, 50304),
    "hub:google/gemma-2-2b": _shape("gemma2", 2304, 26, 8, 9216, 256000, num_key_value_heads=4, head_dim=256),
    "hub:google/gemma-2-27b": _shape("gemma2", 4608, 46, 32, 36864, 256000, num_key_value_heads=16, head_dim=128),
    "smollm2-135m": _shape("llama", 576, 30, 9, 1536, 49152, num_key_value_heads=3, tie_word_embeddings=True),
    "gemma3-270m": _shape("gemma3_text", 640, 18, 4, 2048, 262144, num_key_value_heads=1, head_dim=256),
}
"""Shapes of models that a plan must know without a network: transformers' model type and the values of its config."""


@dataclass(frozen=True)
class GPU:
    """A type of GPU by its data sheet."""

    name: str
    half: float
    """TFLOP/s, dense bfloat16 products."""
    single: float
    """TFLOP/s, dense products of float32 in TF32, as `masksae.jobs.allow_tf32` has them."""
    bandwidth: float
    """TB/s."""


GPUS = [
    GPU("L4", 121, 60, 0.30),
    GPU("RTX 4090", 165, 82.6, 1.01),
    GPU("A100 80GB", 312, 156, 2.04),
    GPU("H100 SXM", 989, 494, 3.35),
]

SHARE = 0.4
"""Assumed share of a GPU's peak, in products and in bandwidth alike; `benchmarks/gpu.py` prints what a card reached."""

TRAFFIC = 40
"""Assumed passes over the pre-activations [batch, latents] in single precision of one dense training step (selection
included)."""

BASE, COPIES = 0.8e9, 2
"""Bytes of a Python process with its libraries, and copies of an SAE's latents that a score holds."""

MODES = 2
"""Every SAE is scored as trained and at matched sparsity."""

TASKS = 113
"""Binary tasks of `sae-probes`."""


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
    """Cost of a profile, or of those of its parts that are still to be made. Raises ConfigError or SourceError where
    the model's shape cannot be told."""

    def __init__(self, profile: Profile, parts: Sequence[Part] | None = None):
        self.profile = profile
        self.parts = profile.parts if parts is None else parts
        members = {member for part in self.parts for member in part.members}
        made = [Group(tuple(m for m in g.members if m in members), g.snapshots) for g in profile.groups]
        self.groups = [group for group in made if group.members]

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
    def number(self) -> int:
        """Bytes of a number of the language model."""
        return 2 if self.profile.model.dtype == "bfloat16" else 4

    @cached_property
    def weights(self) -> int:
        """Bytes of the language model."""
        return self.number * sum(p.numel() for p in self.model.parameters())

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
        return [config for group in self.groups for config in self.configs(group)]

    def configs(self, group: Group) -> list[SAEConfig]:
        """Of a group's SAEs."""
        return [member.config(self.width) for member in group.members]

    @property
    def rows(self) -> int:
        """Positions of a block that give activations: all but the BOS."""
        return self.length - (self.profile.model.bos_token is not None)

    def steps(self, share: float = 1.0) -> int:
        """Of training on a share of the text: the batches that fill each pool, as the stream counts them."""
        training, text = self.profile.training, self.profile.text
        used = max(1, round(share * -(-text.train_tokens // text.block_length)))
        pool = -(-training.pool_tokens // self.rows)
        batches = [min(pool, used - first) * self.rows // training.batch_size for first in range(0, used, pool)]
        return training.epochs * sum(batches)

    def recipe(self, group: Group) -> TrainConfig:
        """Of a group, with the snapshots that are taken of it."""
        return self.profile.training.config(max(2, self.steps(group.arm.tokens)), group.snapshots)

    def trained(self, group: Group) -> int:
        """Steps of each SAE of a group, the branches to its snapshots included."""
        recipe = self.recipe(group)
        return recipe.steps + sum(n - recipe.leaves(n) for n in recipe.snapshot_steps)

    def read(self, arm: Arm) -> list[Arm]:
        """The arm, and that of its targets where it has some of its own."""
        return [arm, *([Arm(name="clean", p=0, tokens=arm.tokens)] if arm.denoise else [])]

    def in_scratch(self, arm: Arm) -> bool:
        """Whether an arm's activations are kept there: then they are read once, whoever is trained on them."""
        return self.profile.training.epochs > 1 and not arm.fresh_masks

    @cached_property
    def passes(self) -> dict[tuple, tuple[int, float]]:
        """What is read -> how often the model reads it, and how much of the text in all. In scratch lies one stream for
        each draw of masks, and less text is part of it; else every group makes its own, in every epoch."""
        found: dict[tuple, tuple[int, float]] = {}
        for group in self.groups:
            for arm in self.read(group.arm):
                key, times, again = arm.masks(group.pair), 1, 1.0
                if not self.in_scratch(arm):
                    key, times = (arm.name, group.name), self.profile.training.epochs
                    again = self.trained(group) / self.recipe(group).steps
                found[key] = max(found.get(key, (0, 0.0)), (times, times * arm.tokens * again))
        return found

    @property
    def streams(self) -> int:
        """Streams of activations, each read once."""
        return sum(times for times, _ in self.passes.values())

    @property
    def kept_streams(self) -> int:
        """Streams whose activations lie in scratch at a time: all; or where pairs are kept, those that a part or a
        later one is trained on, and those of targets."""
        own = [{m.arm.masks(m.pair) for m in part.members if self.in_scratch(m.arm)} for part in self.profile.parts]
        made, most = set[tuple](), 0
        for number, part in enumerate(self.profile.parts):
            if part in self.parts:
                made |= {a.masks(m.pair) for m in part.members for a in self.read(m.arm) if self.in_scratch(a)}
            most = max(most, len(made))
            if self.profile.keep_pairs:
                made -= own[number].difference(*own[number + 1 :])
        return most

    @property
    def text_tokens(self) -> float:
        """Tokens of text that fill all blocks: the larger of what the trained-on and the held-out documents need."""
        text, held_out = self.profile.text, self.profile.text.held_out_tokens + self.profile.contexts.tokens
        return max(text.train_tokens / (1 - text.held_out_share), held_out / text.held_out_share)

    @cached_property
    def work(self) -> list[Work]:
        """Activations, training, evaluation."""
        batch = self.profile.training.batch_size
        read = self.profile.text.train_tokens * sum(part for _, part in self.passes.values())
        steps = [(config, self.trained(group)) for group in self.groups for config in self.configs(group)]
        flop = sum(batch * step_flop(config) * n for config, n in steps)
        traffic = sum(step_traffic(config, batch) * n for config, n in steps)
        harvest = Work("activations", self.forward_flop(self.prefix, read))
        return [harvest, Work("training", 0.0, flop, traffic), self._evaluation()]

    @property
    def labelled(self) -> int:
        """Texts of all probing tasks and their shifted sets."""
        task = self.profile.probing
        return ((TASKS if task.tasks == ["all"] else len(task.tasks)) + len(task.shifted)) * (task.train + task.test)

    @property
    def pools(self) -> list[int]:
        """Texts of each group and of each pair of texts that are averaged, at most."""
        options = self.profile.perturbation
        size = options.train + options.test
        return [len(classes) * size for classes in options.groups.values()] + [4 * size] * len(options.pairs)

    def _evaluation(self) -> Work:
        """Scores on clean text: shared forwards to the block once, what lies behind it once for every SAE and mode;
        texts that are averaged and not kept once for every few SAEs and modes."""
        profile, options = self.profile, self.profile.perturbation
        held = profile.text.held_out_tokens + profile.contexts.tokens
        words = profile.absorption.words * profile.absorption.draws
        texts = self.labelled * min(profile.probing.max_tokens, 64)
        again = sum(-(-MODES * len(part.members) // POOLED) for part in self.parts)
        kept = [kept_bytes(n, options.max_tokens, self.width) for n in self.pools]
        averaged = options.max_tokens * sum(n * (1 if size else 1 + again) for n, size in zip(self.pools, kept))
        once = self.forward_flop(self.prefix, held + words + texts + averaged)
        last = self.config.num_hidden_layers - 1
        head = 2 * self.width * self.config.vocab_size
        behind = self.forward_flop(last, 1) - self.forward_flop(self.prefix, 1) + head
        spliced = profile.evaluation.ce_tokens * (2 + MODES * len(self.saes)) * behind
        looks = 3 * held + words * profile.absorption.splits + texts + options.max_tokens * sum(self.pools)
        return Work("evaluation", once + spliced, sum(2 * MODES * looks * c.d_model * c.n_latents for c in self.saes))

    def hours(self, work: Work, gpu: GPU) -> float:
        """By arithmetic: products and other traffic one after the other, at `SHARE` of the data sheet."""
        peak = {"bfloat16": 1e12 * gpu.half}
        seconds = work.flop / peak.get(self.profile.model.dtype, 1e12 * gpu.single)
        seconds += work.sae_flop / peak.get(self.profile.training.precision, 1e12 * gpu.single)
        return (seconds + work.traffic / (1e12 * gpu.bandwidth)) / SHARE / 3600

    def memory(self, device: str = "cuda") -> dict[str, float]:
        """Peak bytes on the device while an arm trains, by part."""
        on_gpu, config = not str(device).startswith("cpu"), self.config
        sequences = (256 if on_gpu else 16) * self.length
        inner = 3 * (getattr(config, "intermediate_size", None) or 4 * self.width) + 8 * self.width
        inner += 2 * config.num_attention_heads * self.length
        pool = self.pool_tokens * self.width * (self.number if on_gpu else 4)
        ahead = on_gpu and self.pool_tokens < self.profile.text.train_tokens  # the next one is made beside that in use
        found = {"language model": self.weights, "its forward": self.number * sequences * inner}
        if self.groups:
            found["activations (two pools)" if ahead else "activations"] = pool * (2 if ahead else 1)
            sizes = {group: self._training_bytes(group, torch.device(device)) for group in self.groups}
            largest = max(sizes, key=sizes.__getitem__)
            found[f"{len(largest.members)} SAEs"] = sizes[largest]
        if on_gpu:
            return found
        beyond = max(0.0, self.scores() - sum(found.values()))
        return found | {"Python and its libraries": BASE, "scores beyond that": beyond}

    def _training_bytes(self, group: Group, device: torch.device) -> float:
        branch, training = bool(self.recipe(group).snapshots), self.profile.training
        sparse = runs_sparse(device, training.precision)
        return training_bytes(self.configs(group), training.batch_size, sparse=sparse, branch=branch)

    @property
    def pool_tokens(self) -> int:
        """Tokens of a pool of activations, the largest."""
        return min(self.profile.training.pool_tokens, self.profile.text.train_tokens)

    @property
    def corrupted(self) -> int:
        """How often the held-out text is shown to the model with masks: once for each pair, if an arm has any."""
        masked = any(arm.p > 0 for arm in self.profile.arms)
        return len({part.pair for part in self.parts}) if masked else 0

    def scores(self) -> float:
        """Bytes of ordinary memory while scores are taken: the language model, contexts and the words in them, the
        held-out text (with masks too, whole and apart), labelled texts, a part's SAEs with their snapshots, and for a
        few SAEs at a time the latents of the first-letter words, or of averaged texts."""
        profile, largest = self.profile, max((c.n_latents for c in self.saes), default=0)
        taken = {m: 1 + len(self.recipe(group).snapshots) for group in self.groups for m in group.members}
        kept = max((sum(taken[member] for member in part.members) for part in self.parts), default=0)
        held, texts, limit = profile.text.held_out_tokens, max(self.pools), profile.perturbation.max_tokens
        words = LARGEST * COPIES * profile.absorption.words
        return (
            self.weights
            + 4 * (2 * profile.contexts.tokens + (3 if self.corrupted else 1) * held + self.labelled) * self.width
            + 4 * kept * max(map(parameters, self.saes), default=0)
            + max(4 * words * largest, 4 * (POOLED + LARGEST) * texts * largest + kept_bytes(texts, limit, self.width))
        )

    def disk(self) -> dict[str, float]:
        """Bytes in the user's cache, by part."""
        profile, text = self.profile, self.profile.text
        tokens = text.train_tokens + text.held_out_tokens + profile.contexts.tokens
        sizes = {group: sum(map(parameters, self.configs(group))) for group in self.groups}
        saes = sum(size * (1 + len(self.recipe(group).snapshots)) for group, size in sizes.items())
        found = {"tokens (twice while they are put together)": 8.0 * tokens, "SAEs": 4.0 * saes}
        if sizes:
            found["checkpoint (twice while it is replaced)"] = 2 * 4.0 * ADAM_AND_WEIGHTS * max(sizes.values())
        if streams := self.kept_streams:
            row = 2 * self.width + 1  # of half precision, and whether it is masked
            found["activations (half precision)"] = row * text.train_tokens * self.rows / self.length * streams
        found["held-out activations"] = 4 * text.held_out_tokens * self.width * (1 + self.corrupted)
        words = profile.contexts.tokens + profile.absorption.words * profile.absorption.draws
        found["contexts and words (at most)"] = 4 * words * self.width
        pools = sum(kept_bytes(n, profile.perturbation.max_tokens, self.width) for n in self.pools)
        found["labelled texts (at most)"] = 4 * self.labelled * self.width + pools
        return found

    def host(self) -> float:
        """Bytes of ordinary memory on a GPU machine: the model as it is loaded, a pool on its way into scratch, or
        scores."""
        pool = 6 * self.pool_tokens * self.width if self.profile.training.epochs > 1 else 0  # single and half precision
        return BASE + max(2 * self.weights, pool, self.scores())

    def check(self, device: str, kept: float = 0.0) -> None:
        """Raise ConfigError, with the remedy, if the run cannot fit on the device, or on the disk beside the `kept`
        bytes that it has there."""
        needed, free = sum(self.memory(device).values()), available_bytes(device)
        if free is not None and needed > free:
            parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in self.memory(device).items())
            raise ConfigError(
                f"Profile {self.profile.name} needs {needed / 1e9:.1f} GB on {device} ({parts}), {free / 1e9:.1f} GB "
                "are free. Use a larger device, or a profile of your own with fewer SAEs, a smaller "
                "training.pool_tokens, or model.dtype bfloat16."
            )
        disk, root = sum(self.disk().values()), cache_dir()
        while not root.exists():
            root = root.parent
        room = shutil.disk_usage(root).free + kept
        if disk > room:
            raise ConfigError(
                f"Profile {self.profile.name} needs {disk / 1e9:.1f} GB of disk in {cache_dir()}, {room / 1e9:.1f} GB "
                "are free. Point MASKSAE_CACHE to a larger disk, or lower text.train_tokens."
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


def amount(value: float, unit: str) -> str:
    """A number with a prefix.

    >>> amount(2.5e17, "FLOP"), amount(640e6, "B")
    ('250 PFLOP', '640 MB')
    """
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(hours: float) -> str:
    """Hours, in the unit that they ask for.

    >>> duration(0.01), duration(0.5), duration(30)
    ('36 s', '30 min', '30 h')
    """
    return f"{hours * 3600:.0f} s" if hours < 1 / 60 else f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.3g} h"


def text(plan: Plan, device: str, kept: float = 0.0, measured: dict[str, float] | None = None) -> str:
    """The whole plan; `measured` holds hours of stages on this machine (`measure.hours_here`)."""
    profile, text = plan.profile, plan.profile.text
    head = f"""{profile.name}{profile.description and f": {profile.description}"}
Text needed: {plan.text_tokens:,.0f} tokens in whole blocks of {text.block_length}
(train {text.train_tokens:,}, held out {text.held_out_tokens:,}, contexts {profile.contexts.tokens:,}; \
{text.held_out_share:.3g} of documents held out)
{len(plan.saes)} SAEs in {len(plan.groups)} groups on {plan.streams} streams of activations; {plan.steps():,} steps of \
{profile.training.batch_size:,} tokens"""
    return "\n\n".join([head, costs(plan, measured), _verdict(plan, device, kept)])


def costs(plan: Plan, measured: dict[str, float] | None = None) -> str:
    """What does not depend on the machine: time and space."""
    times = [["stage", "work", *(gpu.name for gpu in GPUS), *(["here, measured"] if measured else [])]]
    for stage, works in (*((work.stage, [work]) for work in plan.work), ("all", plan.work)):
        hours = [sum(plan.hours(work, gpu) for work in works) for gpu in GPUS]
        here = [duration(measured[stage]) if stage in measured else ""] if measured else []
        flop = sum(work.flop + work.sae_flop for work in works)
        times.append([stage, amount(flop, "FLOP"), *map(duration, hours), *here])
    space = []
    for title, parts in (("memory of a GPU", plan.memory()), ("disk (user's cache)", plan.disk())):
        space += [[title, sum(parts.values())], *([f"  {name}", value] for name, value in parts.items())]
    space += [["ordinary memory beside a GPU", plan.host()]]
    space += [["memory without a GPU", sum(plan.memory("cpu").values())]]
    told = f"Time on one GPU, by arithmetic at {SHARE:.0%} of its data sheet:\n{to_text(times)}"
    return f"{told}\n\nSpace:\n{to_text([[name, amount(value, 'B')] for name, value in space])}"


def record(plan: Plan, device: str, kept: float = 0.0, measured: dict[str, float] | None = None) -> dict:
    """The same as JSON-able numbers: FLOP, hours by GPU, bytes."""
    stages = {work.stage: work for work in plan.work}
    return {
        "profile": plan.profile.name,
        "saes": len(plan.saes),
        "steps": plan.steps(),
        "text_tokens": plan.text_tokens,
        "flop": {name: work.flop + work.sae_flop for name, work in stages.items()},
        "hours": {gpu.name: {name: plan.hours(work, gpu) for name, work in stages.items()} for gpu in GPUS},
        "hours_here": measured,
        "memory_bytes": {place: sum(plan.memory(place).values()) for place in ("cpu", "cuda")},
        "disk_bytes": sum(plan.disk().values()),
        "verdict": _verdict(plan, device, kept),
    }


def _verdict(plan: Plan, device: str, kept: float) -> str:
    try:
        plan.check(device, kept)
    except ConfigError as error:
        return f"Here ({device}): does not fit. {error}"
    return f"Here ({device}): fits."
