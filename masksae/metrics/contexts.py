"""Absorption of parents that *another* token sets: "follows *the*", "follows a number", "two words after *the*".

First letters are parents that a word's own token sets. Here the parent is what came before, and its children are the
particular words that come after it, in natural text. An SAE that folds "follows *the*" into the latent of *United*
absorbs it. Masking replaces the token before as often as the word, so it breaks these co-occurrences and not those of a
word with its own letter.

The algorithm, its constants and its probe gate are those of first letters (`metrics.absorption`), on one balanced
sample of positions per parent, with whole blocks of text held out for testing. One thing differs: the probe that ranks
latents sees the 256 that differ most, each in units of its standard deviation. By raw weights rare latents come first
here (mean F1 of the main latents .35 instead of .6 on SmolLM2). The parents are ours; there is no published set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.errors import DataError
from masksae.metrics.absorption import (
    MAX_MAIN,
    PROBE_GATE,
    AbsorptionResult,
    main_latents,
    parent_result,
    summary,
)
from masksae.metrics.probes import TEST_SHARE, f1, fit_each, fit_linear
from masksae.saes.sae import SAE

FEWEST = 50
"""Occurrences below which a parent is left out."""
SCREENED, RANKING_L1 = 256, 0.03
"""Latents that the ranking probe of a parent sees, and the weight of its L1 penalty."""
SINK = 3
"""Words whose norm is more than this many times the median are left out: attention sinks (SmolLM2: many a " the"),
whose activations are alike whatever came before."""

BE = "be is are was were been being am"
DETERMINERS = "the a an this that these those my your his her its our their each every some any no"
PREPOSITIONS = """about above across after against along among around at before behind below beneath beside between
    beyond by despite down during except for from in inside into like near of off on onto out outside over past since
    through throughout to toward under until up upon with within without"""
BEFORE = {
    "the": "the",
    "and": "and",
    "a": "a",
    "in": "in",
    "to": "to",
    "of": "of",
    "a form of be": BE,
    "a determiner": DETERMINERS,
    "a preposition": PREPOSITIONS,
}
"""Parents that hold where the token before is one of some words, in any case."""
PATTERNS = {"a number": r"\s?[0-9]+", "a capitalised word": r" [A-Z][a-z]{2,}"}
"""Parents that hold where the token before has some form."""

PARENTS = (*BEFORE, *PATTERNS, "the, two back", "inside quotes")
"""Candidates; a language model need not know each of them well enough to pass the gate."""

WORD = r" [A-Za-z]{3,}"
"""Tokens at which parents are looked for: the beginning of a word, three letters at least."""


@dataclass(frozen=True)
class ContextProbe:
    """A parent, its balanced sample of occurrences, and a linear probe for it."""

    name: str
    rows: Tensor
    """int64 [n]: which of all occurrences."""
    positive: Tensor
    """bool [n]"""
    is_test: Tensor
    """bool [n]: in blocks of text that the probe was not trained on."""
    weight: Tensor
    """[d]"""
    bias: Tensor
    """Scalar."""
    f1: float
    """On the test occurrences, half of which have the parent."""


def occurrences(ids: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Where ordinary words stand and what came before them.

    ids    int64 [n, s]
    texts  text of each token id, with its leading space

    Returns (where int64 [m, 2]: block and position, labels bool [m, parents] in the order of PARENTS).

    >>> where, labels = occurrences(torch.tensor([[2, 0, 1, 1]]), [" the", " cat", "x"])
    >>> where.tolist(), [[name for name, yes in zip(PARENTS, row) if yes] for row in labels.tolist()]
    ([[0, 2], [0, 3]], [['the', 'a determiner'], ['the, two back']])
    """
    bare = [text.strip().lower() for text in texts]
    kind = {name: _tokens(bare, words.split().__contains__) for name, words in BEFORE.items()}
    kind |= {name: _tokens(texts, re.compile(pattern).fullmatch) for name, pattern in PATTERNS.items()}
    word, quotes = _tokens(texts, re.compile(WORD).fullmatch)[ids], _tokens(texts, lambda t: t.count('"') % 2)[ids]
    word[:, :2] = False  # nothing two tokens back
    before = ids.roll(1, 1)
    labels = [kind[name][before] for name in (*BEFORE, *PATTERNS)] + [
        kind["the"][ids.roll(2, 1)],
        quotes.cumsum(1) % 2 == 1,
    ]
    return word.nonzero(), torch.stack(labels, -1)[word]


def _tokens(texts: Sequence[str], test) -> Tensor:
    """bool [vocabulary]: which tokens pass a test."""
    return torch.tensor([bool(test(text)) for text in texts])


def sinks(x: Tensor) -> Tensor:
    """bool [m]: rows of x [m, d] with an outlying norm, more than 3 times the median.

    >>> sinks(torch.tensor([[1.0], [1.1], [0.9], [7.0]]))
    tensor([False, False, False,  True])
    """
    norm = x.norm(dim=1)
    return norm > SINK * norm.median()


def context_probes(x: Tensor, labels: Tensor, block: Tensor, *, positives: int, seed: int = 0) -> list[ContextProbe]:
    """A probe for each parent with at least 50 occurrences.

    x          [m, d]: activations at the occurrences
    labels     bool [m, parents]
    block      int64 [m]: which block of text each is in; test blocks are never trained on
    positives  occurrences of a parent at most, and as many others; chosen by `seed`
    """
    x, generator = x.float(), torch.Generator().manual_seed(seed)
    blocks = int(block.max()) + 1
    test_blocks = torch.randperm(blocks, generator=generator)[: round(TEST_SHARE * blocks)]
    held_out, found = torch.isin(block, test_blocks), []
    for name, label in zip(PARENTS, labels.unbind(1)):
        sides = [side.nonzero().squeeze(1) for side in (label, ~label)]
        count = min(positives, *map(len, sides))
        if count < FEWEST:
            continue
        rows = torch.cat([side[torch.randperm(len(side), generator=generator)[:count]] for side in sides])
        y, is_test = label[rows], held_out[rows]
        weight, bias = fit_linear(x[rows[~is_test]], y[~is_test, None].float(), batch=64, weight_decay=1e-4, seed=seed)
        score = f1(x[rows[is_test]] @ weight.t() + bias > 0, y[is_test, None]).item()
        found.append(ContextProbe(name, rows, y, is_test, weight[0], bias[0], score))
    return found


@torch.no_grad()
def context_absorption(
    sae: SAE,
    x: Tensor,
    probes: list[ContextProbe],
    *,
    min_parents: int = 5,
    threshold: float | None = None,
    seed: int = 0,
) -> AbsorptionResult:
    """Mean absorption over parents that pass the probe gate (test F1 above .6); `letters` of the result are parents.

    x          [m, d]: activations at the occurrences that `probes` were trained on
    threshold  takes the place of the SAE's own

    Raises DataError if fewer than `min_parents` pass.
    """
    passed = [probe for probe in probes if probe.f1 > PROBE_GATE]
    if len(passed) < min_parents:
        seen = ", ".join(f"{probe.name} {probe.f1:.2f}" for probe in probes) or "none occurs often enough"
        raise DataError(
            f"Only {len(passed)} parents have a probe with test F1 above {PROBE_GATE}, {min_parents} are needed "
            f"(F1: {seen}). Give more text (contexts.tokens), a later block, or a lower contexts.min_parents."
        )
    w_dec, fired, samples = sae.W_dec.cpu(), torch.zeros(sae.config.n_latents, dtype=torch.float64), []
    for probe in passed:
        mine = x[probe.rows]
        f = sae.latents(mine, threshold)
        fired += (f > 0).double().mean(0) / len(passed)
        tested = probe.is_test & probe.positive & (mine.float() @ probe.weight + probe.bias > 0)
        kept = screened(f[~probe.is_test], probe.positive[~probe.is_test])
        scaled = f[:, kept] / f[:, kept].std(0).clamp(min=1e-12)
        samples.append((kept, scaled, mine[tested], f[tested]))
    train = [~probe.is_test for probe in passed]
    weight = fit_each(
        [f[rows] for (_, f, _, _), rows in zip(samples, train)],
        [probe.positive[rows] for probe, rows in zip(passed, train)],
        batch=64, l1=RANKING_L1, seed=seed, epochs=20,
    )  # fmt: skip
    found = []
    for probe, (kept, f, x_tested, f_tested), w in zip(passed, samples, weight):
        best, score = main_latents(
            f, probe.positive, probe.is_test, w[: len(kept)].topk(min(MAX_MAIN, len(kept))).indices.tolist()
        )
        main = tuple(kept[list(best)].tolist())
        found.append(parent_result(probe.name, x_tested, f_tested, w_dec, probe.weight, main, score, probe.f1))
    return summary(found, fired, tuple(name for name in PARENTS if name not in {probe.name for probe in passed}))


def screened(f: Tensor, positive: Tensor) -> Tensor:
    """Ids of the latents of f [n, F] that can be main latents: those whose means with and without the parent differ
    most, in standard deviations. The ranking probe is trained on these only."""
    difference = (f[positive].mean(0) - f[~positive].mean(0)).abs() / f.std(0).clamp(min=1e-12)
    return difference.topk(min(SCREENED, f.shape[1])).indices.sort().values
