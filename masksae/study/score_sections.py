"""The sections of a profile that say how its SAEs are scored, each with defaults for a run of tens of minutes on two CPU cores."""

from typing import Annotated

from pydantic import Field, model_validator

from masksae.study.sections import Positive, Section, Seed

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
    """Parents that must pass the probe gate."""
    seed: Seed = 0


class Probing(Section):
    """Sparse probing of labelled texts, and the same under a shift of their distribution."""

    tasks: Annotated[list[str], Field(min_length=1)] = TASKS
    """Binary tasks of `sae-probes` by name, `hub:...`, or files with the columns prompt and target; [all]: every binary task of `sae-probes`,
    those with too few rows left out by name."""
    shifted: Annotated[list[str], Field(min_length=1)] = SHIFTED
    """Shifts of the test texts, as in `masksae.data.shifts`: "NAME_OOD", "TASK -> TABLE", "TASK -> typos", "TASK -> upper case"."""
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
    """Tasks, by name of the group, whose positives are classes that exclude one another; three at least, since of two each is the other's
    mirror image and nothing could hit one alone."""
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


class Simulation(Section):
    """The world with known features (notebook 00). No model is in it, so what it says is the same for every profile: the
    defaults are few worlds, made in seconds and kept for all profiles; the shipped profiles state more."""

    seeds: Positive = 2
    """Worlds; each with an SAE in every cell."""
    ks: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [1.2, 2.0]
    """Mean numbers of active latents; two features are active on average."""
    ps: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [0.3]
    """Shares of masked tokens."""
    main_p: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The one that is drawn against width; one of ps."""
    widths: Annotated[list[Positive], Field(min_length=1)] = [24]
    """Latents; 18 features can be learned. All of ps are run at the first."""
    steps: Positive = 400

    @model_validator(mode="after")
    def _possible(self):
        if self.main_p not in self.ps:
            raise ValueError(f"main_p {self.main_p} is none of ps {self.ps}. Add it.")
        return self
