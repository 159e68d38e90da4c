"""Robustness of SAEs, the other half of notebook 07: one token of a held-out text is replaced, and what an SAE says about
the tokens after it is compared with what it said before.

The replacement is one of three kinds, and none of them asks an SAE anything, so one forward a text and kind serves
all:

    random    another token, drawn by its frequency in the training text
    gradient  of the tokens that are common there, the one that moves the later activations most, as far as a gradient
              can tell: the `checked` best of a first-order estimate are tried, and the one that moves them farthest is
              taken
    mask      the model's mask token, which SAEs of the masked arms have met

The model is causal, so nothing before the replaced token changes, and at the token itself another word stands. The
positions after it are compared in two stretches, "near" and "far" (`REACHES`).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from masksae.data import models
from masksae.errors import ConfigError
from masksae.metrics.robustness import Robustness, robustness
from masksae.parallel import once
from masksae.study.inputs import Inputs, Scored
from masksae.study.scores.matched import score_saes
from masksae.tracing import activations, replacement_effects

KINDS = {"random": "by a random token", "gradient": "by one chosen by gradient", "mask": "by the mask token"}
REACHES = {"near": (1, 3), "far": (4, 15)}
"""First and last position after the replaced token."""
WINDOW = 15
"""Positions after the replaced token that are compared."""
BEFORE = 8
"""Tokens, at least, that stand before the replaced one: the first few of a text are like no others."""
ITEMS = 20
"""Batches of texts, of one size each, whose means are kept beside the mean of all."""
SCORES = tuple(field.name for field in fields(Robustness))
COUNTED = 1_000_000
"""Tokens of the training text, at most, whose frequencies are counted."""
BATCH = 32
"""Texts per forward."""


def robustness_scores(run: Scored) -> list[dict]:
    """One row per SAE and mode: robustness_KIND_REACH_SCORE for each kind, reach and score of
    `masksae.metrics.robustness.Robustness`, means over texts, and `texts`, the means of batches of neighbouring texts,
    whose mean they are."""
    return run.rows("robustness", run.profile.robustness, lambda: _robustness_scores(run))


def _robustness_scores(run: Scored) -> list[dict]:
    x, top = replaced_activations(run), run.profile.robustness.top

    def score(sae, threshold) -> dict:
        by_text = {}
        for kind in KINDS:
            found = robustness(sae, x["clean"].flatten(0, 1), x[kind].flatten(0, 1), top=top, threshold=threshold)
            for reach, (first, last) in REACHES.items():
                for name in SCORES:
                    values = getattr(found, name).double().view(-1, WINDOW)[:, first - 1 : last]
                    by_text[f"robustness_{kind}_{reach}_{name}"] = values.mean(1).cpu()
        return _means(by_text)

    return score_saes(run, "robustness", score)


def _means(by_text: dict[str, Tensor]) -> dict:
    """Means over texts, and over each batch of texts, of scores [texts]."""
    names, values = list(by_text), torch.stack(list(by_text.values()))
    batches = values.unflatten(1, (min(ITEMS, values.shape[1]), -1)).mean(2)
    size = values.shape[1] // batches.shape[1]
    texts = [
        {"text": f"{i * size}-{(i + 1) * size - 1}", **dict(zip(names, batch))}
        for i, batch in enumerate(batches.t().tolist())
    ]
    return {**dict(zip(names, values.mean(1).tolist())), "texts": texts}


def replaced_activations(run: Inputs) -> dict[str, Tensor]:
    """Activations [texts, WINDOW, d] at the positions after the replaced token: `clean`, and of each kind; with them
    int64 `ids` [texts, tokens] of the clean texts, `positions` [texts], and the replacement `KIND_token` [texts]. Kept
    in scratch.

    Raises ConfigError where no token of a text has BEFORE tokens before it and WINDOW after.
    """
    profile = run.profile
    key = [run.identity(profile.text), profile.contexts.tokens, profile.robustness.model_dump(exclude={"top"})]
    return run.scratch("robustness", key, lambda: Replacement(run).activations())


@dataclass
class Replacement:
    """Held-out texts, in each of which one token is replaced."""

    run: Inputs

    @once
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.run.profile.robustness.seed)

    @once
    def ids(self) -> Tensor:
        """The beginnings of the first held-out blocks, BOS included: int64 [texts, tokens]."""
        options, start = self.run.profile.robustness, len(self.run.start)
        ids = self.run.ids("held_out", slice(options.texts))[:, : start + options.tokens]
        if ids.shape[1] < start + BEFORE + 1 + WINDOW:
            raise ConfigError(
                f"robustness: a block holds {ids.shape[1] - start} tokens of text, and a replaced one needs {BEFORE} "
                f"before it and {WINDOW} after. Raise text.block_length to {start + BEFORE + 1 + WINDOW} or more."
            )
        return ids[: len(ids) - len(ids) % min(ITEMS, len(ids))]  # batches of one size
