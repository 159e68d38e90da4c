"""Robustness of SAEs, in notebook 07: one token of a held-out text is replaced, and what an SAE says about the tokens
after it is compared with what it said before.

The replacement is of three kinds, and none of them asks an SAE anything, so one forward a text and kind serves all:

    random    another token, drawn by its frequency in the training text
    gradient  of the common tokens there, one that moves the later activations far: the change that each makes is
              estimated to first order along DIRECTIONS random directions, whose mean square is that of the whole
              change, and of the TRIED largest estimates the one that does move them farthest is taken
    mask      the model's mask token, which SAEs of masked arms have met

The model is causal, so nothing before the replaced token changes, and at the token itself another word stands. What is
compared are the positions after it, in two stretches (`REACHES`).

Another token is a long step for a gradient: on 48 texts of SmolLM2-135M, block 4, the best of four tokens that the
estimate puts first moved the activations hardly farther than the best of four that were drawn blindly (median sum of
squared relative changes .63 and .61; one random token .43). So several are tried, and trying is what makes this kind
the harder one. It is no worst case.
"""

from dataclasses import fields

import torch
from torch import Tensor

from masksae import progress
from masksae.data import models
from masksae.data.tokens import token_texts
from masksae.errors import ConfigError
from masksae.metrics.robustness import Robustness, robustness
from masksae.study.inputs import Inputs
from masksae.study.scores.matched import score_saes
from masksae.study.store import Subject
from masksae.tracing import activations, replacement_effects

KINDS = ("random", "gradient", "mask")
"""What stands in the token's place."""
REACHES = {"near": (1, 3), "far": (4, 15)}
"""First and last position after the replaced token."""
WINDOW = 15
"""Positions after the replaced token that are compared."""
BEFORE = 8
"""Tokens, at least, before the replaced one: the first few of a text are like no others."""
ITEMS = 20
"""Batches of texts, all of one size, whose means are kept beside the mean of all texts."""
SCORES = tuple(field.name for field in fields(Robustness))
BY_TEXT = {f"robustness_{kind}_{reach}_{name}" for kind in KINDS for reach in REACHES for name in ("jaccard", "recon")}
"""Scores of which these means are kept."""
COUNTED = 1_000_000
"""Tokens of the training text, at most, whose frequencies count."""
DIRECTIONS, TRIED = 4, 8
"""Backward passes and forwards a text to choose a token by gradient; nearly all of the time of this file."""
BATCH = 32
"""Texts per forward."""


def robustness_scores(run: Subject) -> list[dict]:
    """One row per SAE and mode: robustness_KIND_REACH_SCORE for each kind, reach and score of
    `masksae.metrics.robustness.Robustness`, means over texts; and `texts`, {score: [means of batches of texts]}, to six
    digits, whose mean the score is."""
    return run.rows("robustness", run.profile.robustness, _robustness_scores)


def _robustness_scores(run: Subject) -> list[dict]:
    x, top = run.shared("robustness", lambda: replaced_activations(run)), run.profile.robustness.top

    def score(sae, threshold) -> dict:
        by_text = {}
        for kind in KINDS:
            found = robustness(sae, x["clean"].flatten(0, 1), x[kind].flatten(0, 1), top=top, threshold=threshold)
            for reach, (first, last) in REACHES.items():
                for name in SCORES:
                    values = getattr(found, name).double().view(-1, WINDOW)[:, first - 1 : last]
                    by_text[f"robustness_{kind}_{reach}_{name}"] = values.mean(1)
        return _means(by_text)

    return score_saes(run, "robustness", score)


def _means(by_text: dict[str, Tensor]) -> dict:
    """Means of scores [texts] over all texts; and of overlap and reconstruction, over each of ITEMS batches of
    neighbouring texts, which often come from one document."""
    batches = min(ITEMS, len(next(iter(by_text.values()))))
    items = {name: values.unflatten(0, (batches, -1)).mean(1) for name, values in by_text.items()}
    texts = {name: [round(v, 6) for v in items[name].tolist()] for name in items if name in BY_TEXT}
    return {**{name: values.mean().item() for name, values in by_text.items()}, "texts": texts}


def replaced_activations(run: Inputs) -> dict[str, Tensor]:
    """Activations [texts, WINDOW, d] at the positions after the replaced token: "clean", and those of each kind. With
    them, as int64, the clean texts "ids" [texts, tokens], the replaced "positions" in them [texts], and "KIND_token"
    [texts]. Kept in scratch.

    Raises ConfigError if no token of a text has BEFORE tokens before it and WINDOW after it.
    """
    profile = run.profile
    key = [run.identity(profile.text), profile.contexts.tokens, profile.robustness.model_dump(exclude={"top"})]
    return run.scratch("robustness", key, lambda: _replaced_activations(run))


def _replaced_activations(run: Inputs) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(run.profile.robustness.seed)
    ids = _texts(run)
    first, last = len(run.start) + BEFORE, ids.shape[1] - WINDOW
    positions = torch.randint(first, last, (len(ids),), generator=generator)
    original = ids[torch.arange(len(ids)), positions]
    tokens, counts = run.ids("train", slice(-(-COUNTED // ids.shape[1])))[:, len(run.start) :].unique(
        return_counts=True
    )
    weights = counts.float().repeat(len(ids), 1).masked_fill(tokens == original[:, None], 0)
    common = tokens[counts.argsort(descending=True, stable=True)[: run.profile.robustness.candidates]]
    clean = _after(run, ids, positions, label="robustness, clean texts")
    mask = models.token_id(run.language_model.tokenizer, run.profile.model.mask_token)
    by_kind = {
        "random": tokens[torch.multinomial(weights, 1, generator=generator)[:, 0]],
        "gradient": _by_gradient(run, ids, positions, clean, common, generator),
        "mask": torch.full_like(positions, mask),
    }
    changed = {
        kind: _after(run, _replaced(ids, positions, token), positions, label=f"robustness, {kind} token")
        for kind, token in by_kind.items()
    }
    told = {"ids": ids, "positions": positions} | {f"{kind}_token": token for kind, token in by_kind.items()}
    return {"clean": clean, **changed, **told}


def _texts(run: Inputs) -> Tensor:
    """Beginnings of held-out blocks, BOS included: int64 [texts, tokens]; as many as ITEMS batches of one size hold."""
    options, start = run.profile.robustness, len(run.start)
    ids = run.ids("held_out", slice(options.texts))[:, : start + options.tokens]
    needed = BEFORE + 1 + WINDOW
    if ids.shape[1] - start < needed:
        raise ConfigError(
            f"robustness: a text has {ids.shape[1] - start} tokens, and a replaced one needs {BEFORE} before it and "
            f"{WINDOW} after it. Raise text.block_length to {start + needed} or more."
        )
    return ids[: len(ids) - len(ids) % min(ITEMS, len(ids))]


def _replaced(ids: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Texts with another token at one position of each."""
    return ids.scatter(1, positions[:, None], tokens[:, None])


def _window(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the WINDOW positions after some, text by text."""
    return torch.arange(len(positions))[:, None], positions[:, None] + torch.arange(1, WINDOW + 1)


def _after(run: Inputs, ids: Tensor, positions: Tensor, label: str | None = None) -> Tensor:
    """Activations at the WINDOW positions after some: [texts, WINDOW, d]."""
    x = activations(run.language_model.model, ids, block=run.profile.model.block, batch=BATCH, label=label)
    return x[_window(positions)]


def _by_gradient(
    run: Inputs, ids: Tensor, positions: Tensor, clean: Tensor, candidates: Tensor, generator: torch.Generator
) -> Tensor:
    """Of the candidates a token that moves the later activations of each text far: int64 [texts]. How far is the sum
    over positions of |x' - x| / |x - m|, with m the mean of the clean activations."""
    model, block = run.language_model.model, run.profile.model.block
    unit = (clean - clean.mean((0, 1))).norm(dim=2, keepdim=True)
    chosen = []
    for low in progress.bar(range(0, len(ids), BATCH), label="robustness, by gradient", unit="batches"):
        part, at, x, scale = (each[low : low + BATCH] for each in (ids, positions, clean, unit))
        texts, window = _window(at)
        weights = torch.zeros(DIRECTIONS, *part.shape, x.shape[2])
        weights[:, texts, window] = torch.randn(DIRECTIONS, *x.shape, generator=generator) / scale
        estimate = replacement_effects(model, part, at, candidates, weights, block=block).square().sum(0)
        tried = candidates[estimate.topk(min(TRIED, len(candidates)), dim=1).indices]
        moved = [((_after(run, _replaced(part, at, t), at) - x) / scale).norm(dim=2).sum(1) for t in tried.t()]
        chosen.append(tried.gather(1, torch.stack(moved, 1).argmax(1, keepdim=True))[:, 0])
    return torch.cat(chosen)


def examples(run: Inputs, n: int = 5) -> list[dict]:
    """The first texts up to the replaced token, it, and what stands in its place."""
    x, tokenizer = run.shared("robustness", lambda: replaced_activations(run)), run.language_model.tokenizer
    rows = []
    for i in range(min(n, len(x["ids"]))):
        ids, at = x["ids"][i], int(x["positions"][i])
        shown = [int(ids[at]), *(int(x[f"{kind}_token"][i]) for kind in KINDS)]
        token, *replaced = map(repr, token_texts(tokenizer, shown))
        rows.append({"before": tokenizer.decode(ids[at - 6 : at]), "token": token} | dict(zip(KINDS, replaced)))
    return rows
