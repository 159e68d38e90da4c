"""Feature absorption on the first-letter task, by the rules and constants of SAEBench 0.6.0 (Chanin et al. 2024, arXiv
2409.14507).

A probe finds the direction of "starts with S" in the language model. The latents that best tell S-words apart are its
main latents. On an S-word the letter is absorbed when no main latent fires and some other latent, aligned with the
probe, carries the direction instead.

Differences from SAEBench, on purpose: everything is seeded; a probe and its split of the words are given to all SAEs
alike; spellings that differ in case fall on one side of the split; each word has one prompt instead of a second one
with other examples; the probe that ranks latents is solved to its optimum (stopped early it prefers rare latents to
good ones, and words look absorbed that are not) and ranks positive weights only; words that an SAE hardly met in
training may be left out.

The rule does not ask whether an absorber belongs to the word, so an SAE without a latent for the letter scores as one
whose latent was absorbed. Two things tell them apart, and are ours: recall and F1 of the main latents, and full
absorption split by how many of all words its absorbers fire on: `specific`, `middle` and `dense`, which sum to `full`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from masksae.errors import DataError
from masksae.metrics.probes import (
    LETTERS,
    LetterProbe,
    balanced_logistic,
    f1,
    first_letters,
    l1_logistic,
    letter_probe,
)
from masksae.saes.sae import SAE, alike

PROBE_GATE = 0.6
MAX_MAIN, F1_JUMP = 10, 0.03
SILENT = 1e-8
SPECIFIC, DENSE = 0.1, 0.3
"""An absorber is specific to a word if it fires on less than this share of all words, dense if on more than that."""
RANKING_L1 = 0.01
"""Weight of the L1 penalty of the probe that ranks latents."""
FULL_COSINE, FRACTION_COSINE, SHARE, MAX_ABSORBERS = 0.025, 0.1, 0.4, 3
TEMPLATE, ANSWER = "{word} has the first letter:", " {letter}"


@dataclass(frozen=True)
class LetterResult:
    """One letter, or another parent (`metrics.contexts`), of one SAE."""

    letter: str
    words: int
    """Test words with this letter (or parent) that the probe recognises; those left out are not among them."""
    full: float
    """Share of them that are fully absorbed."""
    specific: float
    """Share that is absorbed by a latent which fires on less than 10 % of all words."""
    middle: float
    dense: float
    """... on more than 30 %: no latent of the word, so rather a missing latent for the letter than absorption."""
    fraction: float
    """Mean share of the direction that absorbers carry."""
    fraction_legacy: float
    """The same by SAEBench's rule before 0.4.1 (`legacy_fraction`)."""
    main: tuple[int, ...]
    """Main latents; more than one: the feature is split."""
    recall: float
    """Share of the test words with the letter that a balanced logistic regression on the main latents recognises."""
    f1: float
    """Of that regression on the test words."""
    probe_f1: float


@dataclass(frozen=True)
class AbsorptionResult:
    """Means over the letters that pass the gate."""

    mean_full: float
    mean_specific: float
    mean_middle: float
    mean_dense: float
    """The three sum to mean_full."""
    main_recall: float
    main_f1: float
    """How well the main latents tell the letter: where they tell it badly, their silence says little."""
    mean_fraction: float
    mean_fraction_legacy: float
    mean_split_latents: float
    dense_absorbers: float | None
    """Share of the fully absorbed words that are credited to dense latents. None: no word is absorbed."""
    words_left_out: int
    """Test words that no mean counts (`counted`)."""
    letters: tuple[LetterResult, ...]
    excluded: tuple[str, ...]
    """Letters whose probe does not pass the gate (test F1 above .6), or recognises none of the words that count."""

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def absorbed(x: Tensor, f: Tensor, w_dec: Tensor, direction: Tensor, main) -> tuple[Tensor, Tensor]:
    """The rule per word, for one letter.

    x [n, d]       activations at the words
    f [n, F]       latents of x
    w_dec [F, d]   decoder; the length of a row counts with its latent
    direction [d]  of the letter's probe, of any length
    main           ids of the main latents

    Returns (full bool [n], fraction float [n] in [0, 1]).

    >>> w_dec = torch.tensor([[1.0, 0.0], [0.9, 0.4]])  # a main latent, and the latent of one word
    >>> f = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # on the second word the main latent is silent
    >>> full, fraction = absorbed(f @ w_dec, f, w_dec, torch.tensor([1.0, 0.0]), [0])
    >>> full.tolist(), fraction.tolist()
    ([False, True], [0.0, 1.0])
    """
    x, f, w_dec, direction = alike(x, f, w_dec, direction)
    direction = direction / direction.norm()
    along = w_dec @ direction
    cosine = along / w_dec.norm(dim=1).clamp(min=1e-12)
    needed = x @ direction
    carried = f * along
    main = torch.as_tensor(main, dtype=torch.int64)

    top = carried.max(1)
    full = (f[:, main] < SILENT).all(1) & (cosine[top.indices] >= FULL_COSINE)
    full &= (needed >= 0) & (top.values / needed >= SHARE)

    by_main = carried[:, main].sum(1)
    other = cosine >= FRACTION_COSINE
    other[main] = False
    candidates = carried[:, other].clamp(min=0)
    by_absorbers = candidates.topk(min(MAX_ABSORBERS, candidates.shape[1]), dim=1).values.sum(1)
    credited = torch.minimum(by_absorbers, needed - by_main)
    fraction = torch.where(by_main <= 0, 1.0, credited / (credited + by_main))
    nothing = (by_main >= needed) | ~(by_absorbers / needed >= SHARE)
    return full, fraction.masked_fill(nothing, 0.0)


@torch.no_grad()
def legacy_fraction(f: Tensor, w_dec: Tensor, direction: Tensor, main) -> Tensor:
    """Absorption fraction as SAEBench published it before 0.4.1: what latents other than the main ones carry of the
    direction, as a share of what all carry; no thresholds, so values outside of [0, 1] occur. 0 where nothing is
    carried. Arguments as of `absorbed`.

    >>> w_dec = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    >>> legacy_fraction(torch.tensor([[1.0, 2.0]]), w_dec, torch.tensor([1.0, 0.0]), [0])
    tensor([0.5000])
    """
    f, w_dec, direction = alike(f, w_dec, direction)
    carried = f * (w_dec @ (direction / direction.norm()))
    total = carried.sum(1)
    return torch.where(total == 0, 0.0, 1 - carried[:, torch.as_tensor(main, dtype=torch.int64)].sum(1) / total)


def gated_letters(probe: LetterProbe, min_letters: int) -> list[int]:
    """Letters (0 to 25) whose probe is good enough. Raises DataError if there are fewer than `min_letters`."""
    passed = [i for i in range(LETTERS) if probe.f1[i] > PROBE_GATE]
    if len(passed) < min_letters:
        failed = ", ".join(f"{_name(i)} {probe.f1[i]:.2f}" for i in range(LETTERS) if i not in passed)
        raise DataError(
            f"Only {len(passed)} letters have a probe with test F1 above {PROBE_GATE}, {min_letters} are needed "
            f"(failed: {failed}): the language model does not spell well enough at this block. "
            "Use more words, a later block, or a lower absorption.min_letters."
        )
    return passed


@torch.no_grad()
def first_letter(
    sae: SAE, word_acts: Tensor, words: list[str], *, probe: LetterProbe | None = None, seed: int = 0,
    min_letters: int = 20, threshold: float | None = None, counted: Tensor | None = None,
) -> AbsorptionResult:  # fmt: skip
    """Mean absorption over letters.

    word_acts  [n, d], the activation at each word's token inside the task's prompt
    words      n words, in any case
    probe      shared by all SAEs that are compared; None trains one (`letter_probe`)
    threshold  takes the place of the SAE's own
    counted    bool [n]: test words that count; None: all. Of a word that an SAE hardly met it cannot know the letter.
               The probes are trained on all training words

    Raises DataError if fewer than `min_letters` letters pass the probe gate, or if the probe was trained on other
    words.
    """
    probe = letter_probe(word_acts, words, seed=seed) if probe is None else probe
    counted = torch.ones(len(words), dtype=torch.bool) if counted is None else counted
    if not len(word_acts) == len(words) == len(probe.is_test) == len(counted):
        raise DataError(
            f"{len(word_acts)} activations, {len(words)} words, a probe of {len(probe.is_test)} words and "
            f"{len(counted)} words that count or not do not belong together."
        )
    if word_acts.shape[1] != sae.config.d_model:
        raise DataError(
            f"The activations have width {word_acts.shape[1]}, the SAE {sae.config.d_model}. Take those of its layer."
        )
    letters, tested = first_letters(words), probe.is_test & counted
    recognised = probe.logits(word_acts) > 0
    recognised &= tested[:, None] & torch.nn.functional.one_hot(letters, LETTERS).bool()
    passed = [letter for letter in gated_letters(probe, min_letters) if recognised[:, letter].any()]
    if not passed:
        raise DataError(
            f"The probe recognises none of the {int(tested.sum())} test words that count. Give more words, activations "
            "of a later block, or a lower absorption.min_count."
        )
    f, w_dec = sparse_latents(sae, word_acts, threshold), sae.W_dec.cpu()
    density = firing_shares(f)
    parents = letters[:, None] == torch.tensor(passed)
    ranked = rank_by_regression(f[(~probe.is_test).numpy()], parents[~probe.is_test])
    found, columns = [], f.tocsc()
    for letter, positive, order in zip(passed, parents.unbind(1), ranked):
        main = main_latents(columns, positive, ~probe.is_test, tested, order)
        mine = recognised[:, letter]
        sample = word_acts[mine], torch.from_numpy(f[mine.numpy()].toarray()), w_dec, probe.weight[letter]
        found.append(parent_result(_name(letter), *sample, density, main, probe.f1[letter]))
    excluded = tuple(_name(letter) for letter in range(LETTERS) if letter not in passed)
    return summary(found, excluded, int((probe.is_test & ~counted).sum()))


def sparse_latents(sae: SAE, x: Tensor, threshold: float | None = None, *, rows: int = 4096) -> sparse.csr_array:
    """Latents [n, F] of activations x [n, d], of which only some rows at a time are ever dense."""
    return sparse.vstack([as_sparse(sae.latents(part, threshold)) for part in x.split(rows)], format="csr")


def as_sparse(f: Tensor) -> sparse.csr_array:
    """The entries of f [n, F] that are not zero."""
    row, column = f.nonzero(as_tuple=True)
    ends = torch.bincount(row, minlength=len(f)).cumsum(0)
    index = torch.cat([ends.new_zeros(1), ends]).int().numpy()
    return sparse.csr_array((f[row, column].numpy(), column.int().numpy(), index), shape=tuple(f.shape))


def firing_shares(f: sparse.csr_array) -> Tensor:
    """[F]: share of the rows of f on which each latent fires."""
    return torch.from_numpy(np.bincount(f.indices, minlength=f.shape[1]) / f.shape[0])


@dataclass(frozen=True)
class Main:
    """The main latents of a parent, and how well a balanced logistic regression on them tells it on test words."""

    latents: tuple[int, ...]
    recall: float
    f1: float


def parent_result(
    name: str, x: Tensor, f: Tensor, w_dec: Tensor, direction: Tensor, density: Tensor, main: Main, probe_f1: float
) -> LetterResult:  # fmt: skip
    """Absorption of one parent on its recognised test words x [n, d], f [n, F]. `density` [F]: share of all words on
    which a latent fires."""
    x, f, w_dec, direction = alike(x, f, w_dec, direction)
    full, fraction = absorbed(x, f, w_dec, direction, main.latents)
    fires = density[(f * (w_dec @ direction)).argmax(1)]
    shares = {
        "full": full,
        "specific": full & (fires < SPECIFIC),
        "middle": full & (fires >= SPECIFIC) & (fires <= DENSE),
        "dense": full & (fires > DENSE),
        "fraction": fraction,
        "fraction_legacy": legacy_fraction(f, w_dec, direction, main.latents),
    }
    means = {key: value.double().mean().item() for key, value in shares.items()}
    return LetterResult(name, len(x), main=main.latents, recall=main.recall, f1=main.f1, probe_f1=probe_f1, **means)


def summary(found: list[LetterResult], excluded: tuple[str, ...], words_left_out: int = 0) -> AbsorptionResult:
    """Means over parents."""

    def mean(key: str) -> float:
        return fmean(getattr(result, key) for result in found)

    words, dense = (sum(getattr(r, key) * r.words for r in found) for key in ("full", "dense"))
    return AbsorptionResult(
        mean_full=mean("full"),
        mean_specific=mean("specific"),
        mean_middle=mean("middle"),
        mean_dense=mean("dense"),
        main_recall=mean("recall"),
        main_f1=mean("f1"),
        mean_fraction=mean("fraction"),
        mean_fraction_legacy=mean("fraction_legacy"),
        mean_split_latents=fmean(len(result.main) for result in found),
        dense_absorbers=dense / words if words else None,
        words_left_out=words_left_out,
        letters=tuple(found),
        excluded=excluded,
    )


def _name(letter: int) -> str:
    return chr(ord("a") + letter)


def rank_by_regression(f: Tensor | sparse.sparray, y: Tensor, *, l1: float = RANKING_L1) -> list[list[int]]:
    """For each column of y bool [n, c] the latents of f [n, F] with the largest positive weight at the optimum of an
    L1-regularised probe (`l1_logistic`), best first, ten at most; zeros are not ranked.

    Where the penalty leaves no latent a positive weight, the one that a falling penalty would give one first: a parent
    always has a main latent, and its F1 says what it is worth.
    """
    f = as_sparse(f) if isinstance(f, Tensor) else f
    weight, _ = l1_logistic(f, y, l1=l1)
    ranked = []
    for w, positive in zip(weight.numpy(), y.bool().numpy().T):
        best = np.argsort(-w, kind="stable")[:MAX_MAIN]
        best = best[w[best] > 0]
        if len(best) == 0:
            best = [(f[positive].mean(0) - f[~positive].mean(0)).argmax()]
        ranked.append([int(latent) for latent in best])
    return ranked


def main_latents(
    f: Tensor | sparse.csc_array, positive: Tensor, trained: Tensor, tested: Tensor, ranked: list[int]
) -> Main:
    """The first k of `ranked`, where k grows from 1 as long as each step raises test F1 by more than .03.

    f                [n, F]
    positive         bool [n]: rows that have the parent
    trained, tested  bool [n]: rows that the regressions are fitted to, and scored on

    >>> positive = torch.tensor([True, True, False, False]).repeat(8)
    >>> f = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0], [0.0, 0.0]]).repeat(8, 1)  # each knows half of the words
    >>> main_latents(f, positive, torch.arange(32) >= 16, torch.arange(32) < 16, [0, 1])
    Main(latents=(0, 1), recall=1.0, f1=1.0)
    """
    columns = f[:, ranked].numpy() if isinstance(f, Tensor) else f[:, ranked].toarray()
    (x, y), (x_test, y_test) = ((columns[side], positive.numpy()[side]) for side in (trained.numpy(), tested.numpy()))
    best = Main((), 0.0, -1.0)
    for k in range(1, len(ranked) + 1):
        found = _scored((x[:, :k], y), (x_test[:, :k], y_test), tuple(ranked[:k]))
        if k > 1 and found.f1 <= best.f1 + F1_JUMP:
            break
        best = found
    return best


def _scored(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], latents) -> Main:
    weight, bias = balanced_logistic(*train)
    predicted, true = torch.from_numpy(test[0] @ weight + bias > 0), torch.from_numpy(test[1])
    recall = (predicted & true).sum().item() / max(1, int(true.sum()))
    return Main(latents, recall, f1(predicted[:, None], true[:, None]).item())


def single_token_words(texts: Sequence[str], min_letters: int = 1) -> tuple[list[str], list[int]]:
    """Words of at least `min_letters` letters that are one token, and their token ids, in the order of the ids.

    texts  text of each token id, with its leading space. A word is only a-z and A-Z after at most one such space, so
           that " dog" and "dog" are two tokens of one word

    >>> single_token_words(["<s>", " dog", "dog", "  a", "é"])
    (['dog', 'dog'], [1, 2])
    """
    words = {i: text.removeprefix(" ") for i, text in enumerate(texts)}
    found = [i for i, word in words.items() if len(word) >= min_letters and word.isascii() and word.isalpha()]
    return [words[i] for i in found], found


def icl_prefixes(words: list[str], *, n_prefixes: int, n_examples: int = 10, seed: int = 0) -> list[str]:
    """Prompts that end where the word to be spelt begins; prefix i is for words i, i + n_prefixes, ... and shows none
    of them.

    >>> print(icl_prefixes(["dog", "ant", "Dog", "bee", "Cat"], n_prefixes=2, n_examples=2)[0].strip())
    ant has the first letter: A
    bee has the first letter: B
    """
    prefixes = []
    for i in range(n_prefixes):
        mine = {word.lower() for word in words[i::n_prefixes]}
        others = [word for word in words if word.lower() not in mine]
        if len(others) < n_examples:
            raise DataError(f"{len(words)} words are too few for {n_prefixes} prefixes of {n_examples} examples.")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(1000 * seed + i))[:n_examples]
        chosen = [others[j] for j in order]
        shown = [TEMPLATE.format(word=word) + ANSWER.format(letter=word[0].upper()) for word in chosen]
        prefixes.append("\n" + "\n".join(shown) + "\n")
    return prefixes
