"""Absorption of parents that *another* token sets: "follows *the*", "follows a number", "two words after *the*".

First letters are parents that a word's own token sets. Here the parent is what came before, and its children are the
particular words that come after it, in natural text. An SAE that folds "follows *the*" into the latent of *United*
absorbs it. Masking replaces the token before as often as the word, so it breaks these co-occurrences and not those of a
word with its own letter.

The algorithm, its constants and its probe gate are those of first letters (`metrics.absorption`), on one balanced
sample of positions per parent, with whole blocks of text held out for testing. One thing differs: the probe that ranks
latents sees each in units of its standard deviation. By raw weights rare latents come first here (mean F1 of the main
latents .35 instead of .6 on SmolLM2).

The parents are ours; there is no published set. Two sets are scored and reported apart. `EXPLORATORY` came first, and
SAEs of both arms had been compared on it. `PARENTS` was written down before any masked SAE was scored on it, so what is
decided is decided on this one.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
TITLES = """Mr Mrs Ms Miss Dr Sir Lord Lady President Minister Secretary Chancellor Senator Sen Rep Governor Gov Mayor
    Judge Justice King Queen Prince Princess Pope Professor Prof General Gen Captain Colonel"""
DATES = """January February March April May June July August September October November December Jan Feb Aug Sept Oct
    Nov Dec Monday Tuesday Wednesday Thursday Friday Saturday Sunday"""
UNITS = """percent per hundred thousand million billion trillion dollars euros pounds years months weeks days hours
    minutes seconds miles kilometres kilometers metres meters feet inches km mph tonnes tons"""


class Inside(NamedTuple):
    """Holds from an opening mark to the closing one; where both are the same, after an odd number of them."""

    opening: str
    closing: str


def one_of(words: str, *, any_case: bool = True) -> str:
    """Pattern of a token that is one of some words, in any case or as it is written here.

    >>> bool(re.fullmatch(one_of("his her"), " Her")), bool(re.fullmatch(one_of("May", any_case=False), " may"))
    (True, False)
    """
    return rf"({'?i' if any_case else '?'}:\s*(?:{'|'.join(words.split())})\s*)"


def after(*patterns: str) -> list[tuple[str, ...]]:
    """Holds where the tokens before the word match, one pattern each, the last one that of the token just before it."""
    return [patterns]


TITLE = one_of(TITLES, any_case=False)
ANY, DIGITS = r"(?s:.*)", r"\s?[0-9]+"
NEGATIONS = rf"{one_of('not never cannot neither nor')}|.*['’]t"

PARENTS: dict[str, list[tuple[str, ...]] | Inside] = {
    "his or her": after(one_of("his her")),
    "a pronoun": after(one_of("i he she it we you they")),
    "a negation": after(NEGATIONS),
    "a negation, two back": after(NEGATIONS, ANY),
    "a comma": after(r""".*,["'”’]*"""),
    "the end of a sentence": after(r""".*[.?!]["'”’)]*"""),
    "a colon or semicolon": after(r".*[:;]"),
    "a dash": after(r"\s*(?:[-–—]+)"),
    "a hyphen, two back": after("-", ANY),
    "a closing parenthesis": after(r".*\)"),
    "inside parentheses": Inside("(", ")"),
    "a title": after(TITLE) + after(TITLE, r"\."),
    "a modal verb": after(one_of("will would can could may might must shall should")),
    "a form of have": after(one_of("have has had having")),
    "a wh-word": after(one_of("who whom whose which what when where why how")),
    "that": after(one_of("that")),
    "a subordinator": after(one_of("because although though while if unless whether")),
    "a month or weekday": after(one_of(DATES, any_case=False)),
    "said": after(one_of("said says told added")),
    "more or less": after(one_of("more most less least")),
    "than": after(one_of("than")),
    "a possessive": after(".*['’]s"),
    "an amount of money": [(r"\W*[$£€]", *[r"[0-9.,]+"] * n) for n in range(1, 9)],
    "a number with its unit": after(DIGITS, rf"%|{one_of(UNITS)}"),
    "a year": after(r"\D*", r"\s?[12]", "[0-9]", "[0-9]", "[0-9]") + after(r"\s?(?:1[5-9]|20)[0-9]{2}"),
    "a number in letters": after(one_of("one two three four five six seven eight nine ten hundred thousand")),
    "an ordinal": after(one_of("first second third fourth fifth last next")),
    "a quantifier": after(one_of("all both many several few most some such other another")),
    "an intensifier": after(one_of("very so too quite really rather just even")),
    "a word in -ly": after(r"\s?[A-Za-z]*ly"),
    "a word in -ing": after(r"\s?[A-Za-z]*ing"),
    "a word in -ed": after(r"\s?[A-Za-z]*ed"),
}
"""Candidates: what stands before the word, as patterns of whole tokens. A language model need not know each of them
well enough to pass the gate."""

EXPLORATORY: dict[str, list[tuple[str, ...]] | Inside] = {
    "the": after(one_of("the")),
    "and": after(one_of("and")),
    "a": after(one_of("a")),
    "in": after(one_of("in")),
    "to": after(one_of("to")),
    "of": after(one_of("of")),
    "a form of be": after(one_of(BE)),
    "a determiner": after(one_of(DETERMINERS)),
    "a preposition": after(one_of(PREPOSITIONS)),
    "a number": after(DIGITS),
    "a capitalised word": after(r" [A-Z][a-z]{2,}"),
    "the, two back": after(one_of("the"), ANY),
    "inside quotes": Inside('"', '"'),
}
"""Parents that masked SAEs had been scored on before the others were written down: they decide nothing."""

ALL = (*PARENTS, *EXPLORATORY)

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

    Returns (where int64 [m, 2]: block and position, labels bool [m, parents] in the order of ALL).

    >>> where, labels = occurrences(torch.tensor([[2, 0, 1, 1]]), [" the", " cat", "x"])
    >>> where.tolist(), [[name for name, yes in zip(ALL, row) if yes] for row in labels.tolist()]
    ([[0, 2], [0, 3]], [['the', 'a determiner'], ['the, two back']])
    """
    used, ids = ids.unique(return_inverse=True)
    texts = [texts[i] for i in used.tolist()]
    word = _tokens(texts, re.compile(WORD).fullmatch)[ids]
    word[:, :2] = False  # nothing two tokens back
    labels = [_holds(rule, ids, texts) for rule in (PARENTS | EXPLORATORY).values()]
    return word.nonzero(), torch.stack([label[word] for label in labels], -1)


def _holds(rule: list[tuple[str, ...]] | Inside, ids: Tensor, texts: Sequence[str]) -> Tensor:
    """bool [n, s]: the tokens before each position are as a parent asks."""
    if isinstance(rule, Inside):
        opens, closes = (torch.tensor([text.count(mark) for text in texts])[ids].cumsum(1) for mark in rule)
        depth = opens - closes
        return opens % 2 == 1 if rule.opening == rule.closing else depth > depth.cummin(1).values.clamp(max=0)
    found = torch.zeros_like(ids, dtype=torch.bool)
    for patterns in rule:
        here = torch.ones_like(found)
        here[:, : len(patterns)] = False  # the block begins later
        for back, pattern in enumerate(reversed(patterns), 1):
            here &= _tokens(texts, re.compile(pattern).fullmatch)[ids].roll(back, 1)
        found |= here
    return found


def _tokens(texts: Sequence[str], test) -> Tensor:
    """bool [vocabulary]: which tokens pass a test."""
    return torch.tensor([bool(test(text)) for text in texts])


def context_probes(x: Tensor, labels: Tensor, block: Tensor, *, positives: int, seed: int = 0) -> list[ContextProbe]:
    """A probe for each parent with at least 50 occurrences.

    x          [m, d]: activations at the occurrences
    labels     bool [m, parents], in the order of ALL
    block      int64 [m]: which block of text each is in; test blocks are never trained on
    positives  occurrences of a parent at most, and as many others; chosen by `seed`
    """
    x, generator = x.float(), torch.Generator().manual_seed(seed)
    blocks = int(block.max()) + 1
    test_blocks = torch.randperm(blocks, generator=generator)[: round(TEST_SHARE * blocks)]
    held_out, found = torch.isin(block, test_blocks), []
    for name, label in zip(ALL, labels.unbind(1)):
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
def probe_latents(
    sae: SAE, x: Tensor, probes: Iterable[ContextProbe], threshold: float | None = None
) -> dict[str, sparse.csr_array]:
    """Latents [n, F] of the occurrences of each probe by its name; what several probes share is encoded once.

    x          [m, d]: activations at all occurrences
    threshold  takes the place of the SAE's own
    """
    rows = {probe.name: probe.rows for probe in probes}
    used, index = torch.cat(list(rows.values())).unique(return_inverse=True)
    f = sparse_latents(sae, x[used], threshold)
    return {name: f[mine.numpy()] for name, mine in zip(rows, index.split([len(r) for r in rows.values()]))}


@torch.no_grad()
def context_absorption(
    sae: SAE, x: Tensor, probes: list[ContextProbe], *, among: Collection[str] = PARENTS, min_parents: int = 5,
    threshold: float | None = None, counted: Tensor | None = None, latents: dict[str, sparse.csr_array] | None = None,
) -> AbsorptionResult:  # fmt: skip
    """Mean absorption over parents that pass the probe gate (test F1 above .6); `letters` of the result are parents.

    x          [m, d]: activations at the occurrences that `probes` were trained on
    among      names of the parents that are asked for; the other probes are not looked at
    threshold  takes the place of the SAE's own
    counted    bool [m]: test occurrences that count; None: all
    latents    of `probe_latents`, where they are there already

    Raises DataError if fewer than `min_parents` pass.
    """
    probes = [probe for probe in probes if probe.name in among]
    counted = torch.ones(len(x), dtype=torch.bool) if counted is None else counted
    passed = [probe for probe in probes if probe.f1 > PROBE_GATE]
    if len(passed) < min_parents:
        seen = ", ".join(f"{probe.name} {probe.f1:.2f}" for probe in probes) or "none occurs often enough"
        raise DataError(
            f"Only {len(passed)} parents have a probe with test F1 above {PROBE_GATE}, {min_parents} are needed "
            f"(F1: {seen}). Give more text (contexts.tokens), a later block, or a lower contexts.min_parents."
        )
    latents = probe_latents(sae, x, passed, threshold) if latents is None else latents
    density = torch.stack([firing_shares(latents[probe.name]) for probe in passed]).mean(0)
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
    return summary(found, tuple(name for name in among if name not in {r.letter for r in found}), left_out)


def in_deviations(f: sparse.csr_array) -> sparse.csr_array:
    """Latents in units of their standard deviation.

    >>> in_deviations(sparse.csr_array([[0.0, 2.0], [0.0, 0.0]])).toarray().round(4).tolist()
    [[0.0, 1.4142], [0.0, 0.0]]
    """
    f = f.astype(np.float64)
    n, mean = f.shape[0], f.mean(0)
    deviation = np.sqrt(np.maximum((f.multiply(f).mean(0) - mean**2) * n / (n - 1), 0))
    return (f @ sparse.diags_array(1 / np.maximum(deviation, 1e-12))).tocsr()
