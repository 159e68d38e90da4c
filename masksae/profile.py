"""A profile is one YAML file that fixes every number of a run. It is checked here, before anything expensive starts.

Unknown keys, wrong types and impossible combinations raise ConfigError naming the key (and the nearest known one). Values
that cannot change a result (threads, device, progress bars) are not in a profile, so they are in no run id either.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from masksae.errors import ConfigError, nearest
from masksae.saes.config import AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, Selection, TopK

PROFILES = Path(__file__).resolve().parents[1] / "profiles"

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    """Which language model, and where its activations are read."""

    source: str
    """A name of `masksae.sources`, `hub:owner/name[@revision]`, or a folder."""
    block: Annotated[int, Field(ge=0)]
    """Hook point: the residual stream after this block, counted from 0."""
    mask_token: str
    """Text of the special token that replaces masked tokens."""
    bos_token: str | None = None
    """Text of the token that starts every block; its own activations are never used. None: no such token."""


class Text(Section):
    """Which text, cut into which blocks."""

    sources: Annotated[list[str], Field(min_length=1)]
    """Names of `masksae.sources`, `hub:...`, or files."""
    block_length: Annotated[int, Field(gt=1)] = 128
    """Tokens of a block, BOS included. A document gives whole blocks only; no block spans two documents."""
    train_tokens: Positive
    """Tokens of the training blocks, the same for every arm."""
    held_out_tokens: Positive
    """Tokens of the evaluation blocks, from documents that are never trained on."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents that is held out, by a hash of the document's text."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Order of the documents."""


class Arm(Section):
    """A masking condition."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    p: Share
    """Probability that an input token is replaced; 0 is the unmasked baseline."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the masks."""


class Training(Section):
    """Recipe shared by all SAEs; see `masksae.TrainConfig` for the meaning of each key."""

    epochs: Positive = 1
    """Passes over the training blocks. Activations are kept in scratch when there is more than one."""
    batch_size: Positive = 2048
    lr: Annotated[float, Field(gt=0)] = 3e-4
    warmup: Annotated[int, Field(ge=0)] = 1000
    decay: Share = 0.2
    sparsity_warmup: Annotated[int, Field(ge=0)] | None = None
    threshold_start: Annotated[int, Field(ge=0)] = 1000
    threshold_ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    pool_tokens: Positive = 131_072
    """Tokens that are shuffled together."""


RULES = {"topk": TopK, "batch_topk": BatchTopK, "jump_relu": JumpReLU, "relu": ReLU, "gated": Gated}


class Rule(Section):
    """A selection rule by name and its parameters; see `masksae.saes.config`. Every rule states the L0 it aims at."""

    rule: Literal["topk", "batch_topk", "jump_relu", "relu", "gated"]
    k: Positive | None = None
    """Of topk and batch_topk."""
    target_l0: Annotated[float, Field(gt=0)] | None = None
    """Of jump_relu, relu and gated; for the last two a controller adapts l1 to it."""
    l1: Annotated[float, Field(gt=0)] | None = None
    """First L1 coefficient of relu and gated."""

    @property
    def config(self) -> Selection:
        """The selection config."""
        return RULES[self.rule](**self.model_dump(exclude={"rule"}, exclude_none=True))

    @model_validator(mode="after")
    def _complete(self):
        wanted = {"topk": {"k"}, "batch_topk": {"k"}, "jump_relu": {"target_l0"}}.get(self.rule, {"l1", "target_l0"})
        found = set(self.model_dump(exclude={"rule"}, exclude_none=True))
        if found != wanted:
            raise ValueError(
                f"{self.rule} takes exactly {' and '.join(sorted(wanted))}, found {', '.join(sorted(found)) or 'nothing'}."
            )
        return self


class Grid(Section):
    """SAEs that differ only in their seed."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    selection: Rule
    n_latents: Positive
    prefixes: tuple[float, ...] = ()
    """Matryoshka group fractions, summing to 1; empty: one group."""
    dead_after_tokens: Positive = 10_000_000
    """A latent that has not fired for so many tokens counts as dead and gets the auxiliary loss (TopK kinds)."""
    drop_masked: bool = False
    """Train on ordinary positions only."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]

    def config(self, d_model: int, seed: int) -> SAEConfig:
        """The SAE's configuration for a model of width `d_model`."""
        aux = AuxK(dead_after_tokens=self.dead_after_tokens) if "topk" in self.selection.rule else None
        return SAEConfig(
            d_model,
            self.n_latents,
            self.selection.config,
            self.prefixes,
            aux=aux,
            seed=seed,
            drop_masked=self.drop_masked,
        )

    @property
    def architecture(self) -> str:
        """Name for figures and tables, such as "Matryoshka BatchTopK".

        >>> Grid(name="a", selection=Rule(rule="jump_relu", target_l0=20), n_latents=64, seeds=[0]).architecture
        'JumpReLU'
        """
        return ("Matryoshka " if self.prefixes else "") + RULES[self.selection.rule].__name__

    @model_validator(mode="after")
    def _possible(self):
        self.config(d_model=1, seed=0)
        return self


class Evaluation(Section):
    """Held-out clean text for the scores."""

    ce_tokens: Positive
    """Tokens of held-out text for the CE score (three kinds of full forwards)."""


class Absorption(Section):
    """The first-letter task."""

    words: Positive
    """Single-token words, drawn from the vocabulary."""
    min_word_letters: Positive = 3
    min_letters: Annotated[int, Field(gt=0, le=26)] = 20
    """Letters that must pass the probe gate."""
    prefixes: Positive = 8
    """In-context prefixes of ten examples; each word follows one of them."""
    seed: Annotated[int, Field(ge=0)] = 0
    draws: Positive = 1
    """Of the noise study: how many times the in-context examples are drawn, for the SAEs of the first grid."""
    splits: Positive = 1
    """Of the noise study: how many times the words are split into training and test."""


class Probing(Section):
    """Sparse probing of labelled texts, and the same under a shift of their distribution."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Binary tasks of `sae-probes` by name, `hub:...`, or files with the columns prompt and target."""
    shifted: Annotated[list[str], Field(min_length=1)]
    """Tables NAME_OOD of `sae-probes`; probes are trained on the table NAME."""
    train: Positive
    """Training rows of a task, half of them positives."""
    test: Positive
    """Test rows of a task, at most; a shifted table is used whole."""
    max_tokens: Positive = 128
    """Tokens of a text, counted from its end."""
    ks: Annotated[list[Positive], Field(min_length=1)]
    """Numbers of latents a probe may use; C2 and C3 are decided on the first."""
    seed: Annotated[int, Field(ge=0)] = 0


class Perturbation(Section):
    """Texts averaged over tokens: SAEBench's k-sparse probing, and ablation of concepts (TPP, SCR)."""

    groups: Annotated[dict[str, Annotated[list[str], Field(min_length=2)]], Field(min_length=1)]
    """Tasks, by name of the group, whose positives are classes that exclude one another."""
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    """[wanted, spurious]: tasks with common prompts."""
    train: Positive
    """Training texts of a class; of a quadrant of a pair two thirds of its texts, at most."""
    test: Positive
    """Test texts of a class."""
    max_tokens: Positive = 128
    """Tokens of a text, counted from its beginning."""
    ns: Annotated[list[Positive], Field(min_length=1)]
    """Numbers of ablated latents."""
    ks: Annotated[list[Positive], Field(min_length=1)]
    """Numbers of latents a probe may use."""
    seed: Annotated[int, Field(ge=0)] = 0


class Profile(Section):
    """Every number of a run; read one with `load_profile`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    description: str
    model: Model
    text: Text
    arms: Annotated[list[Arm], Field(min_length=1)]
    training: Training
    saes: Annotated[list[Grid], Field(min_length=1)]
    evaluation: Evaluation
    absorption: Absorption
    probing: Probing
    perturbation: Perturbation

    @model_validator(mode="after")
    def _possible(self):
        for what, items in (("arms", self.arms), ("saes", self.saes)):
            names = [item.name for item in items]
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: names must differ, found {names}. Rename one.")
        if self.arms[0].p != 0:
            raise ValueError(
                f"arms: the first arm is the baseline of every comparison and needs p = 0, found {self.arms[0].p}."
            )
        if self.text.train_tokens < self.training.batch_size:
            raise ValueError(
                f"text.train_tokens ({self.text.train_tokens}) is less than one training.batch_size ({self.training.batch_size}). Raise the first."
            )
        return self


def profile_path(name_or_path) -> Path:
    """The YAML file of a shipped profile (by name) or of the reader's own (by path). Raises ConfigError."""
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else PROFILES / f"{text}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        raise ConfigError(f"There is no profile {text!r}.{nearest(text, known)} Or give the path of a .yaml file.")
    return path


def load_profile(name_or_path) -> Profile:
    """Read and check a profile, by shipped name ("smoke") or by path of a YAML file. Raises ConfigError naming the key.

    The file is called after the profile, and nobody's file after a shipped profile: outputs go into folders of that name.
    """
    path = profile_path(name_or_path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, found {type(raw).__name__}.")
    if raw.get("name") != path.stem or (path.resolve().parent != PROFILES and (PROFILES / path.name).exists()):
        raise ConfigError(
            f"{path} holds a profile named {raw.get('name')!r}. Outputs are kept apart by name: call the file NAME.yaml and choose "
            "a NAME that no shipped profile has."
        )
    try:
        return Profile(**raw)
    except ValidationError as error:
        problems = "\n".join("  " + _explain(e) for e in error.errors())
        raise ConfigError(f"{path} cannot be used:\n{problems}") from None


def _explain(error: dict) -> str:
    """One line for one pydantic error: where, what was found, what was expected, the nearest known key."""
    where = ".".join(str(part) for part in error["loc"]) or "the profile"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key.{nearest(error['loc'][-1], _keys_at(error['loc'][:-1]))}"
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: found {error['input']!r}.{nearest(error['input'], expected)}"
    if error["type"] == "missing":
        return f"{where}: missing. Add this key."
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    return f"{where}: {error['msg']}, found {error['input']!r}"


def _keys_at(loc) -> list[str]:
    """Known keys of the section at a location inside the profile."""
    section = Profile
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        inner = getattr(annotation, "__args__", None)
        section = inner[0] if inner else annotation
    return list(section.model_fields)
