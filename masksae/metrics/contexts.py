"""Absorption of parents that *another* token sets: "follows *the*", "follows a number", "two words after *the*".

First letters are parents that a word's own token sets. Here the parent is what came before, and its children are the
particular words that come after it, in natural text. An SAE that folds "follows *the*" into the latent of *United*
absorbs it. Masking replaces the token before as often as the word, so it breaks these co-occurrences and not those of a
word with its own letter.

The algorithm, its constants and its probe gate are those of first letters (`metrics.absorption`), on one balanced
sample of positions per parent, with whole blocks of text held out for testing. One thing differs: the probe that ranks
latents sees each in units of its standard deviation. By raw weights rare latents come first here (mean F1 of the main
latents .35 instead of .6 on SmolLM2). The parents are ours; there is no published set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from masksae.errors import DataError
from masksae.metrics.absorption import (
    PROBE_GATE,
    AbsorptionResult,
    firing_shares,
    main_latents,
    parent_result,
    rank_by_regression,
    sparse_latents,
    summary,
)
from masksae.metrics.probes import TEST_SHARE, f1, fit_linear
from masksae.saes.sae import SAE

FEWEST = 50
"""Occurrences below which a parent is left out."""
RANKING_L1 = 0.03
"""Weight of the L1 penalty of the probe that ranks latents, which sees them in units of their standard deviation."""
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
    sae: SAE, x: Tensor, probes: list[ContextProbe], *, min_parents: int = 5, threshold: float | None = None,
    counted: Tensor | None = None,
) -> AbsorptionResult:  # fmt: skip
    """Mean absorption over parents that pass the probe gate (test F1 above .6); `letters` of the result are parents.

    x          [m, d]: activations at the occurrences that `probes` were trained on
    threshold  takes the place of the SAE's own
    counted    bool [m]: test occurrences that count; None: all

    Raises DataError if fewer than `min_parents` pass.
    """
    counted = torch.ones(len(x), dtype=torch.bool) if counted is None else counted
    passed = [probe for probe in probes if probe.f1 > PROBE_GATE]
    if len(passed) < min_parents:
        seen = ", ".join(f"{probe.name} {probe.f1:.2f}" for probe in probes) or "none occurs often enough"
        raise DataError(
            f"Only {len(passed)} parents have a probe with test F1 above {PROBE_GATE}, {min_parents} are needed "
            f"(F1: {seen}). Give more text (contexts.tokens), a later block, or a lower contexts.min_parents."
        )
    latents = {probe.name: sparse_latents(sae, x[probe.rows], threshold) for probe in passed}
    density = torch.stack([firing_shares(f) for f in latents.values()]).mean(0)
    w_dec, found, left_out = sae.W_dec.cpu(), [], 0
    for probe in passed:
        mine, f = x[probe.rows], latents[probe.name]
        tested = probe.is_test & counted[probe.rows]
        left_out += int((probe.is_test & ~tested).sum())
        recognised = tested & probe.positive & (mine.float() @ probe.weight + probe.bias > 0)
        if not recognised.any():
            continue
        scaled = in_deviations(f)
        [order] = rank_by_regression(
            scaled[(~probe.is_test).numpy()], probe.positive[~probe.is_test, None], l1=RANKING_L1
        )
        main = main_latents(scaled.tocsc(), probe.positive, ~probe.is_test, tested, order)
        sample = mine[recognised], torch.from_numpy(f[recognised.numpy()].toarray()), w_dec, probe.weight
        found.append(parent_result(probe.name, *sample, density, main, probe.f1))
    if not found:
        raise DataError("The probes recognise no test occurrence that counts. Give more text (contexts.tokens).")
    return summary(found, tuple(name for name in PARENTS if name not in {r.letter for r in found}), left_out)


def in_deviations(f: sparse.csr_array) -> sparse.csr_array:
    """Latents in units of their standard deviation.

    >>> in_deviations(sparse.csr_array([[0.0, 2.0], [0.0, 0.0]])).toarray().round(4).tolist()
    [[0.0, 1.4142], [0.0, 0.0]]
    """
    f = f.astype(np.float64)
    n, mean = f.shape[0], f.mean(0)
    deviation = np.sqrt(np.maximum((f.multiply(f).mean(0) - mean**2) * n / (n - 1), 0))
    return (f @ sparse.diags_array(1 / np.maximum(deviation, 1e-12))).tocsr()
