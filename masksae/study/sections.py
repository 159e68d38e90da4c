"""The sections of a profile: every number of a run with its meaning, checked as it is read; first what is trained, then
how it is scored.

Unknown keys and wrong types are refused; `masksae.study.profile` turns the refusals into one line each.
"""

import operator
import re
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from masksae.errors import nearest
from masksae.saes.config import AuxK, SAEConfig
from masksae.saes.fields import snake_case
from masksae.saes.penalties import PENALTIES, Penalty
from masksae.saes.rules import SELECTIONS, Selection
from masksae.study.report import labels
from masksae.training.config import TrainConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""Below what every generator takes, and small numbers may still be added to it."""


class Section(BaseModel):
    """A part of a profile: unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @property
    def named_data(self) -> list[str]:
        """Names of models, texts and tasks in this section: what they stand for belongs to the results as much as the
        names do."""
        return []


class Model(Section):
    """Which language model, and where its activations are read."""

    source: str
    """A name of `masksae.data.texts`, `hub:owner/name[@revision]`, a folder, or a .gguf file."""
    block: Annotated[int, Field(ge=0)] | str
    """Hook point: the residual stream after this block, counted from 0; or the path of any module that gives [batch,
    tokens, width], such as "model.layers.9.mlp"."""
    mask_token: str
    """Text of the special token that replaces masked tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of its weights and activations; bfloat16 halves the memory and suits GPUs, and is slow on most
    CPUs."""
    bos_token: str | None = None
    """Text of the token that starts every block; its own activations are never used. None: no such token."""
    sinks: Annotated[float, Field(gt=1)] | None = Field(default=None, exclude_if=lambda times: times is None)
    """Tokens with more than so many times the median norm (3: attention sinks beside BOS) are not trained on, not among
    the held-out activations, and keep their own activations where an SAE's output stands in. None: all tokens alike."""

    @property
    def named_data(self) -> list[str]:
        return [self.source]

    @property
    def layer(self) -> int | None:
        """Number of the block that the hook point is, or lies in; None if its path names no block."""
        if isinstance(self.block, int):
            return self.block
        number = re.search(r"\.(\d+)(\.|$)", self.block)
        return int(number[1]) if number else None

    @property
    def hook_name(self) -> str:
        """As TransformerLens calls the residual stream after a block; else the module's path."""
        return f"blocks.{self.block}.hook_resid_post" if isinstance(self.block, int) else self.block

    @property
    def place(self) -> str:
        """In words, for captions."""
        return f"residual stream after block {self.block}" if isinstance(self.block, int) else f"output of {self.block}"


class Text(Section):
    """Which text, cut into which blocks."""

    sources: Annotated[list[str], Field(min_length=1)]
    """Names of `masksae.data.texts`, `hub:...`, or files. A long .txt file is cut at blank lines into documents."""
    block_length: Annotated[int, Field(gt=1)] = 128
    """Tokens of a block, BOS included. A document gives whole blocks only; no block spans two documents."""
    train_tokens: Positive
    """Tokens of the training blocks, the same for every arm."""
    held_out_tokens: Positive | None = None
    """Tokens of the evaluation blocks, from documents that are never trained on. None: an eighth of train_tokens, 2,048
    at least and 32,000 at most."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of documents that is held out, by a hash of the document's text. None: what held_out_tokens and
    contexts.tokens need with a quarter to spare, .05 at least."""
    seed: Seed = 0
    """Order of the documents."""

    def sized(self, context_tokens: int | None) -> tuple[int, int, float]:
        """(held-out tokens, tokens of the context text, held-out share): what is None follows train_tokens.

        >>> Text(sources=["mine.txt"], train_tokens=60_000).sized(None)
        (7500, 20000, 0.3642)
        """
        held_out = self.held_out_tokens or min(32_000, max(2_048, self.train_tokens // 8))
        contexts = context_tokens or min(160_000, max(16_000, self.train_tokens // 3))
        spare = 1.25 * (held_out + contexts)
        share = self.held_out_share or round(max(0.05, spare / (self.train_tokens + spare)), 4)
        return held_out, contexts, share

    @property
    def named_data(self) -> list[str]:
        return self.sources


class Arm(Section):
    """A masking condition."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    p: Share
    """Probability that an input token is replaced; 0 is the unmasked baseline."""
    seed: Seed = 0
    """Of the masks, beside the seed of the pair: arms of one seed mask the same tokens."""
    token: str | None = None
    """Text of the token that replaces; None: the model's mask_token; "rare": the rarest token of the training text;
    "random": for each position a token drawn by its frequency there."""
    drop_masked: bool = False
    """Train on ordinary positions only."""
    denoise: bool = False
    """Reconstruct the clean activation from the corrupted one, at ordinary positions."""
    fresh_masks: bool = False
    """Draw the masks anew in every epoch, where otherwise one draw serves all epochs of a pair; the language model then
    runs in every epoch."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Gaussian noise on the activations (`ActivationStream.from_model`): is it masking that works, or any noise?"""
    tokens: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training text that is used."""

    @property
    def drawn(self) -> bool:
        """Whether masks or noise are drawn, so that each pair has activations of its own."""
        return self.p > 0 or self.noise > 0

    def mask_seed(self, pair: int) -> int:
        """Seed of the masks and of the noise that the SAEs of a pair see: another for every pair."""
        return self.seed << 32 | pair

    def sees(self, pair: int) -> tuple:
        """What an arm's SAEs of a pair see: arms and pairs of the same are trained on the same activations."""
        noise = (self.noise, self.mask_seed(pair), self.fresh_masks) if self.noise else ()
        return self.masks(pair), noise, self.tokens, self.denoise

    def masks(self, pair: int) -> tuple:
        """All that decides which tokens of a pair are replaced, and by what: arms and pairs of the same share the
        activations of the model. () without masks, in all pairs alike."""
        return (self.p, self.mask_seed(pair), self.token, self.fresh_masks) if self.p else ()


class Training(Section):
    """Recipe shared by all SAEs; see `masksae.TrainConfig` for the meaning of each key."""

    epochs: Positive = 1
    """Passes over the training blocks. Activations are kept in scratch when there is more than one."""
    batch_size: Positive = 2048
    lr: Annotated[float, Field(gt=0)] = 3e-4
    warmup: Annotated[int, Field(ge=0)] | None = None
    """None: a tenth of the steps, 1,000 at most."""
    decay: Share = 0.2
    sparsity_warmup: Annotated[int, Field(ge=0)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    threshold_start: Annotated[int, Field(ge=0)] | None = None
    """None: after a third of the steps, or 1,000."""
    threshold_ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """None: .999, or a memory of a tenth of the steps in a shorter run."""
    pool_tokens: Positive = 131_072
    """Tokens that are shuffled together."""
    snapshots: list[Positive] = []
    """Steps at which the SAEs are also kept, each after a learning-rate decay of its own: absorption along training
    (notebook 04). Those that an arm does not reach are left out."""

    def config(self, steps: int, snapshots: bool = True) -> TrainConfig:
        """The `TrainConfig` of a run of so many steps, with or without snapshots; what is None follows the steps."""
        shared = self.model_dump(exclude={"epochs", "batch_size", "pool_tokens", "snapshots"})
        shared["snapshots"] = tuple(n for n in self.snapshots if snapshots and n < steps)
        seldom = {"checkpoint_every": max(200, steps // 100), "log_every": max(20, steps // 1000)}
        return TrainConfig(steps, **shared, **seldom)


class Rule(Section):
    """A selection rule by the snake case of its name, and its parameters as keys: {rule: batch_topk, k: 20}; see
    `masksae.saes.rules`. A rule of one's own is known once its module is imported. Every rule states the L0 it aims
    at."""

    model_config = ConfigDict(extra="allow")

    rule: str

    @property
    def config(self) -> Selection:
        """The selection config."""
        return _made(_by_name(SELECTIONS)[self.rule], self._given)

    @property
    def _given(self) -> dict:
        return {name: value for name, value in self.model_extra.items() if value is not None}

    @field_validator("rule")
    @classmethod
    def _known(cls, rule: str) -> str:
        if rule not in (known := _by_name(SELECTIONS)):
            raise ValueError(f"found {rule!r}.{nearest(rule, known)}")
        return rule

    @model_validator(mode="after")
    def _complete(self):
        kind = _by_name(SELECTIONS)[self.rule]
        known = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(kind)}
        wanted = kind.stated or tuple(name for name, needed in known.items() if needed)
        if not set(wanted) <= self._given.keys() <= known.keys():
            rest = ", ".join(sorted(known.keys() - set(wanted)))
            further = f" (and {rest} if wanted)" if rest else ""
            spelling = "".join(nearest(name, known) for name in sorted(self._given.keys() - known.keys())[:1])
            raise ValueError(
                f"{self.rule} takes exactly {' and '.join(sorted(wanted))}{further}, "
                f"found {', '.join(sorted(self._given)) or 'nothing'}.{spelling}"
            )
        if self.config.goal is None:
            raise ValueError(
                f"{self.rule} states no L0 that it aims at, and nothing could be matched: give it a `goal`."
            )
        return self


class Penalised(Section):
    """A penalty by the snake case of its name, and its parameters as keys: {penalty: ortsae, every: 8}."""

    model_config = ConfigDict(extra="allow")

    penalty: str

    @property
    def config(self) -> Penalty:
        """The penalty's config."""
        return _made(_by_name(PENALTIES)[self.penalty], self.model_extra)

    @model_validator(mode="after")
    def _known(self):
        if self.penalty not in (kinds := _by_name(PENALTIES)):
            raise ValueError(f"found {self.penalty!r}.{nearest(self.penalty, kinds)}")
        known = {field.name for field in fields(kinds[self.penalty])}
        for name in sorted(self.model_extra.keys() - known):
            raise ValueError(f"{self.penalty} has no {name!r}.{nearest(name, known)}")
        self.config
        return self


def _by_name(kinds: dict[str, type]) -> dict[str, type]:
    """Rules or penalties by their names in profiles."""
    return {snake_case(name): kind for name, kind in kinds.items()}


def _made(kind: type, given: dict):
    """A rule or a penalty with the given parameters, each in the type of its field. Raises ValueError."""
    hints = get_type_hints(kind)
    return kind(**{name: _value(name, value, hints[name]) for name, value in given.items()})


def _value(name: str, value, kind):
    """A value in the type of its field. Raises ValueError."""
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name}: {error.errors()[0]['msg']}, found {value!r}") from None


class Grid(Section):
    """SAEs that differ in their pair only: in the initial weights, the order of the tokens and the masks, all drawn
    from its number."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    selection: Rule
    n_latents: Positive
    prefixes: tuple[float, ...] = ()
    """Matryoshka group fractions, summing to 1; empty: one group."""
    prefix_weighting: str | tuple[float, ...] = "1/G^2"
    """Of the prefixes' losses (`SAEConfig`)."""
    penalties: list[Penalised] = []
    """What is added to the loss: [{penalty: ortsae, every: 8}]; see `masksae.saes.penalties`."""
    frozen_decoder: bool = False
    """Leave the decoder at its random start and train the rest: a control of the scores."""
    aux: bool = True
    """Whether dead latents are revived (rules that are `revived`)."""
    dead_after_tokens: Positive | None = None
    """A latent that has not fired for so many tokens counts as dead and gets the auxiliary loss. None: a sixteenth of
    the run's tokens, 10,000,000 at most."""
    clean_l0: Annotated[float, Field(gt=0)] | None = None
    """Clean L0 at which matched scores are taken; None: the rule's own goal. Of a grid whose k was chosen so that a
    masked arm reaches it as trained (`masksae match`)."""
    against: str | None = None
    """Another grid: where this one has no unmasked SAEs, those of that one are the baseline; where it has, they are
    compared with that one's too."""

    def config(self, d_model: int, seed: int, drop_masked: bool = False) -> SAEConfig:
        """The SAE's configuration for a model of width `d_model`."""
        rule = self.selection.config
        aux = AuxK(dead_after_tokens=self.dead_after_tokens) if rule.revived and self.aux else None
        options = dict(aux=aux, seed=seed, drop_masked=drop_masked, own_order=True, frozen_decoder=self.frozen_decoder)
        options |= {"penalties": tuple(penalty.config for penalty in self.penalties)}
        return SAEConfig(d_model, self.n_latents, rule, self.prefixes, self.prefix_weighting, **options)

    @property
    def l0(self) -> float:
        """Clean L0 at which matched scores are taken."""
        return self.clean_l0 or self.selection.config.goal

    @property
    def architecture(self) -> str:
        """Name for figures and tables, such as "Matryoshka BatchTopK".

        >>> Grid(name="a", selection=Rule(rule="jump_relu", target_l0=20), n_latents=64).architecture
        'JumpReLU'
        """
        return self.config(d_model=1, seed=0).architecture

    @model_validator(mode="after")
    def _possible(self):
        self.config(d_model=1, seed=0)
        return self


class Block(Section):
    """Some arms times some grids times some pairs; blocks are worked off in their order, pair by pair."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "main"
    arms: list[str] = []
    """Names; []: every arm."""
    saes: list[str] = []
    """Names of grids; []: every grid."""
    pairs: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    """A pair is one draw of everything that is drawn: initial weights, order of the tokens, masks. Two pairs share
    nothing but the text."""
    snapshots: bool = True
    """Whether the SAEs are also kept at `training.snapshots`."""
    skipped: bool = Field(default=False, exclude_if=operator.not_)
    """Never worked off, for want of hours: what is decided stays as it was, and the page of results says so."""


class Variant(Section):
    """The same profile with some keys changed: what makes the regime (`masksae gate`)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    changes: dict[str, Any]
    """Section -> key -> value, as in a profile; a list takes the place of a list."""
    candidate: bool = True
    """Whether it may be chosen if it passes; False: it only shows what a key does."""


TASKS = [
    "5_hist_fig_ismale",
    "6_hist_fig_isamerican",
    "21_headline_istrump",
    "87_glue_cola",
    "105_click_bait",
    "113_movie_sent",
]
SHIFTED = [
    "5_hist_fig_ismale_OOD",
    "6_hist_fig_isamerican_OOD",
    "66_living-room_OOD",
    "67_social-security_OOD",
    "87_glue_cola_OOD",
]
NEWS = ["139_news_class_Politics", "140_news_class_Technology", "141_news_class_Entertainment"]
"""Tasks of a profile that names none: few, and short texts."""


class Evaluation(Section):
    """Held-out clean text for the scores."""

    ce_tokens: Positive = 2048
    """Tokens of held-out text for the CE score (three kinds of full forwards)."""


class Absorption(Section):
    """The first-letter task."""

    words: Positive = 16_000
    """Single-token words, drawn from the vocabulary."""
    min_word_letters: Positive = 3
    min_letters: Annotated[int, Field(gt=0, le=26)] = 20
    """Letters that must pass the probe gate."""
    min_count: Annotated[int, Field(ge=0)] = 20
    """Times that the training text must hold a word for it to count: an SAE that hardly met a word cannot know what it
    begins with. Others train the probes, are left out of the means, and counted (words_left_out)."""
    prefixes: Positive = 8
    """In-context prefixes of ten examples; each word follows one of them."""
    seed: Seed = 0
    draws: Positive = 1
    """Of the noise study: how many times the in-context examples are drawn, for the SAEs of the first grid."""
    splits: Positive = 1
    """Of the noise study: how many times the words are split into training and test."""


class Contexts(Section):
    """Absorption of parents that another token sets (`masksae.metrics.contexts`)."""

    tokens: Positive | None = None
    """Of held-out text in which occurrences are looked for. None: a third of text.train_tokens, 16,000 at least and
    160,000 at most."""
    positives: Positive = 2000
    """Occurrences of a parent, at most, and as many others beside them."""
    min_parents: Positive = 5
    """Parents that must pass the probe gate, of the set that decides."""
    min_count: Annotated[int, Field(ge=0)] = 20
    """Times that the training text must hold the word itself for it to count, as in `absorption`."""
    seed: Seed = 0


class Probing(Section):
    """Sparse probing of labelled texts, and the same under a shift of their distribution."""

    tasks: Annotated[list[str], Field(min_length=1)] = TASKS
    """Binary tasks of `sae-probes` by name, `hub:...`, or files with the columns prompt and target; [all]: every binary
    task of `sae-probes`, those with too few rows left out by name."""
    shifted: Annotated[list[str], Field(min_length=1)] = SHIFTED
    """Shifts of the test texts, as in `masksae.data.tasks`: "NAME_OOD", "TASK -> TABLE", "TASK -> typos", "TASK ->
    upper case"."""
    train: Positive = 600
    """Training rows of a task, half of them positives."""
    test: Positive = 400
    """Test rows of a task, at most; a table NAME_OOD is used whole."""
    max_tokens: Positive = 128
    """Tokens of a text, counted from its end."""
    ks: Annotated[list[Positive], Field(min_length=1)] = [5, 1, 16]
    """Numbers of latents a probe may use; C2 is decided on the first."""
    shifted_ks: Annotated[list[Positive], Field(min_length=1)] = [16]
    """The same for shifted texts; C3 is decided on the first."""
    seed: Seed = 0

    @property
    def named_data(self) -> list[str]:
        return [*self.tasks, *(part.strip() for text in self.shifted for part in text.split("->"))]


class Perturbation(Section):
    """Texts averaged over tokens: SAEBench's k-sparse probing, and ablation of concepts (TPP, SCR)."""

    groups: Annotated[dict[str, Annotated[list[str], Field(min_length=3)]], Field(min_length=1)] = {"news": NEWS}
    """Tasks, by name of the group, whose positives are classes that exclude one another; three at least, since of two
    each is the other's mirror image and nothing could hit one alone."""
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    """[wanted, spurious]: tasks with common prompts."""
    train: Positive = 200
    """Training texts of a class; of a quadrant of a pair two thirds of its texts, at most."""
    test: Positive = 120
    """Test texts of a class."""
    max_tokens: Positive = 128
    """Tokens of a text, counted from its beginning."""
    ns: Annotated[list[Positive], Field(min_length=1)] = [2, 5, 10, 20]
    """Numbers of ablated latents."""
    ks: Annotated[list[Positive], Field(min_length=1)] = [1, 5, 16]
    """Numbers of latents a probe may use."""
    seed: Seed = 0

    @property
    def named_data(self) -> list[str]:
        return [task for tasks in (*self.groups.values(), *self.pairs) for task in tasks]


class Robustness(Section):
    """One token of a held-out text is replaced, and later positions are compared (notebook 07)."""

    texts: Positive = 240
    """Texts: the beginnings of the first held-out blocks, as many as there are at most."""
    tokens: Annotated[int, Field(ge=24)] = 48
    """Tokens of a text, BOS left out; a replaced one has 8 before it at least and 15 after it."""
    candidates: Annotated[int, Field(ge=2)] = 2000
    """The most frequent tokens of the training text, of which a gradient puts eight forward to be tried."""
    top: Positive = 5
    """Largest latents of a token whose overlap is given beside that of all active ones."""
    seed: Seed = 0


class Simulation(Section):
    """The world with known features (notebook 00). No model is in it, so what it says is the same for every profile:
    the defaults are few worlds, made in seconds and kept for all profiles; the shipped profiles state more."""

    seeds: Positive = 2
    """Worlds; each with an SAE in every cell."""
    qs: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [0.5, 1.0]
    """Probabilities that a word comes with a parent that another token sets."""
    ks: Annotated[list[Positive], Field(min_length=1)] = [2]
    """Numbers of active latents; three features are active on average. All of qs are run at the first."""
    ps: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [0.3]
    """Shares of masked tokens, run at the largest of qs."""
    main_p: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The one of ps that all of qs and ks are run at."""
    steps: Positive = 400

    @model_validator(mode="after")
    def _possible(self):
        if self.main_p not in self.ps:
            raise ValueError(f"main_p {self.main_p} is none of ps {self.ps}. Add it.")
        return self


class Gate(Section):
    """What unmasked SAEs must reach before absorption in them says anything: a word whose parent has no good latent
    counts as absorbed as soon as any other latent carries its direction. Means over the unmasked SAEs of a grid."""

    letters_f1: Share = 0.5
    """Least F1 of the main latents of first letters."""
    contexts_f1: Share = 0.6
    """Least F1 of the main latents of parents that another token sets."""
    dense_absorbers: Share = 0.1
    """Largest share of absorbed words that is credited to latents of no particular word, first letters."""
    dead: Share = 0.02
    """Largest share of latents that are dead at the end of training."""
    dead_compared: Share = 0.05
    """The same of each arm of a comparison; above it the run says that it cannot compare."""


class Endpoint(Section):
    """One score on which a claim is decided: treated less baseline, paired."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9 ]+$")]
    claim: Literal["C1", "C2", "C3", "C5", "R"]
    score: str
    """Column of the results, one that `report.labels` names; one that ends in an underscore: the first that begins
    so."""
    direction: Literal[-1, 1]
    """Sign of the difference that the claim says."""
    margin: Annotated[float, Field(gt=0)]
    """In the score's own unit: a difference that is shown to be smaller does not matter."""
    items: Literal["fixed", "random"]
    """Whether letters, parents, tasks, sets or texts are all there are, or a sample like the pairs."""
    slight: Annotated[float, Field(gt=0)] | None = None
    """Of a claim with a size in it: the largest difference that is still as small as the claim says."""
    primary: bool = True
    """Primary endpoints decide and share one correction; the others are reported with a correction of their own."""

    @field_validator("score")
    @classmethod
    def _known(cls, score: str) -> str:
        if not labels.known(score):
            raise ValueError(f"found {score!r}, which is no score that has a name.{nearest(score, labels.SCORES)}")
        return score


def _endpoint(name: str, claim: str, score: str, direction: int, margin: float, items: str, **more) -> Endpoint:
    return Endpoint(name=name, claim=claim, score=score, direction=direction, margin=margin, items=items, **more)


ENDPOINTS = [
    _endpoint("letters", "C1", "mean_full", -1, 0.03, "fixed"),
    _endpoint("contexts", "C1", "context_full", -1, 0.02, "random"),
    _endpoint("probing", "C2", "probing_auc_", +1, 0.01, "random"),
    _endpoint("gap", "C3", "ood_gap_", -1, 0.01, "random"),
    _endpoint("explained variance", "C5", "ev_centred", -1, 0.005, "fixed", slight=0.02),
    _endpoint("robustness", "R", "robustness_random_near_jaccard", +1, 0.02, "random"),
    _endpoint("letters specific", "C1", "mean_specific", -1, 0.03, "fixed", primary=False),
    _endpoint("contexts specific", "C1", "context_specific", -1, 0.02, "random", primary=False),
    _endpoint("letters f1", "C1", "main_f1", +1, 0.03, "fixed", primary=False),
    _endpoint("contexts f1", "C1", "context_main_f1", +1, 0.03, "random", primary=False),
]
"""Of a profile that names none."""


class Decisions(Section):
    """What is decided, on what, and how: written down before the data (docs/preregistration.md)."""

    arm: str | None = None
    """The treated arm; None: the profile's second."""
    mode: Literal["as_trained", "matched"] = "as_trained"
    """Scores that decide: with the SAE's own threshold, as they are published, or with it moved to clean L0 = k."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance that any of the primary endpoints is called supported or contradicted without a cause; of each claim of
    equivalence."""
    gate: Gate = Gate()
    endpoints: Annotated[list[Endpoint], Field(min_length=1)] = ENDPOINTS
    cells: list[str] = []
    """Grids in which C4 asks for C1 to C3 again, the first left out; []: every other one with SAEs of both arms whose
    unmasked SAEs are compared with no other grid's."""

    @model_validator(mode="after")
    def _possible(self):
        names = [endpoint.name for endpoint in self.endpoints]
        if len(set(names)) < len(names):
            raise ValueError(f"endpoints: names must differ, found {names}. Rename one.")
        for endpoint in self.endpoints:
            if endpoint.slight is not None and endpoint.slight <= endpoint.margin:
                raise ValueError(
                    f"endpoints.{endpoint.name}: slight ({endpoint.slight}) must be larger than the margin "
                    f"({endpoint.margin}), within which a difference does not matter."
                )
        return self
