"""Feature absorption on the first-letter task, by the rules and constants of SAEBench 0.6.0 (Chanin et al. 2024, arXiv
2409.14507).

A probe finds the direction of "starts with S" in the language model. The latents that best tell S-words apart are its
main latents. On an S-word the letter is absorbed when no main latent fires and some other latent, aligned with the
probe, carries the direction instead.

Differences from SAEBench, on purpose: everything is seeded; a probe and its split of the words are given to all SAEs
alike; spellings that differ in case fall on one side of the split; each word has one prompt instead of a second one
with other examples; the probe that ranks latents takes smaller batches, so that it converges (stopped early it prefers
rare latents to good ones, and words look absorbed that are not). `dense_absorbers` is ours: the rule does not ask
whether an absorber is specific to the word.
"""

from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor

from masksae.errors import DataError
from masksae.metrics.probes import LETTERS, LetterProbe, f1, first_letters, fit_linear, letter_probe
from masksae.saes.sae import SAE, alike

PROBE_GATE = 0.6
MAX_MAIN, F1_JUMP = 10, 0.03
SILENT = 1e-8
DENSE = 0.3
FULL_COSINE, FRACTION_COSINE, SHARE, MAX_ABSORBERS = 0.025, 0.1, 0.4, 3
TEMPLATE, ANSWER = "{word} has the first letter:", " {letter}"


@dataclass(frozen=True)
class LetterResult:
    """One letter, or another parent (`metrics.contexts`), of one SAE."""

    letter: str
    words: int
    """Test words with this letter (or parent) that the probe recognises."""
    full: float
    """Share of them that are fully absorbed."""
    fraction: float
    """Mean share of the direction that absorbers carry."""
    fraction_legacy: float
    """The same by SAEBench's rule before 0.4.1 (`legacy_fraction`)."""
    main: tuple[int, ...]
    """Main latents; more than one: the feature is split."""
    f1: float
    """Of the main latents on the test words."""
    probe_f1: float


@dataclass(frozen=True)
class AbsorptionResult:
    """Means over the letters that pass the gate."""

    mean_full: float
    mean_fraction: float
    mean_fraction_legacy: float
    mean_split_latents: float
    dense_absorbers: float | None
    """Share of the fully absorbed words whose absorber fires on more than 30 % of all words: not a latent for the word,
    so rather a missing latent for the letter than absorption. None: no word is absorbed."""
    letters: tuple[LetterResult, ...]
    excluded: tuple[str, ...]
    """Letters whose probe does not pass the gate (test F1 above .6), or recognises none of their test words."""

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
    min_letters: int = 20, threshold: float | None = None,
) -> AbsorptionResult:  # fmt: skip
    """Mean absorption over letters.

    word_acts  [n, d], the activation at each word's token inside the task's prompt
    words      n words, in any case
    probe      shared by all SAEs that are compared; None trains one (`letter_probe`)
    threshold  takes the place of the SAE's own

    Raises DataError if fewer than `min_letters` letters pass the probe gate, or if the probe was trained on other
    words.
    """
    probe = letter_probe(word_acts, words, seed=seed) if probe is None else probe
    if not len(word_acts) == len(words) == len(probe.is_test):
        raise DataError(
            f"{len(word_acts)} activations, {len(words)} words and a probe of {len(probe.is_test)} words do not belong "
            "together."
        )
    if word_acts.shape[1] != sae.config.d_model:
        raise DataError(
            f"The activations have width {word_acts.shape[1]}, the SAE {sae.config.d_model}. Take those of its layer."
        )
    letters, recognised = first_letters(words), probe.logits(word_acts) > 0
    seen = (recognised & probe.is_test[:, None] & torch.nn.functional.one_hot(letters, LETTERS).bool()).any(0)
    passed = [letter for letter in gated_letters(probe, min_letters) if seen[letter]]
    if not passed:
        raise DataError("The probe recognises no test word. Give more words, or activations of a later block.")
    f, w_dec = sae.latents(word_acts, threshold), sae.W_dec.cpu()
    y = torch.nn.functional.one_hot(letters[~probe.is_test], LETTERS).float()
    ranked = rank_by_regression(f[~probe.is_test], y, seed=seed)
    found = []
    for letter in passed:
        main, score = main_latents(f, letters == letter, probe.is_test, ranked[letter].tolist())
        mine = probe.is_test & (letters == letter) & recognised[:, letter]
        sample = word_acts[mine], f[mine], w_dec, probe.weight[letter]
        found.append(parent_result(_name(letter), *sample, main, score, probe.f1[letter]))
    excluded = tuple(_name(letter) for letter in range(LETTERS) if letter not in passed)
    return summary(found, (f > 0).double().mean(0), excluded)


def parent_result(
    name: str, x: Tensor, f: Tensor, w_dec: Tensor, direction: Tensor, main: tuple[int, ...], main_f1: float,
    probe_f1: float,
) -> tuple[LetterResult, Tensor]:  # fmt: skip
    """Absorption of one parent on its recognised test words x [n, d], f [n, F], and the latents that absorbed it, one
    per fully absorbed word."""
    x, f, w_dec, direction = alike(x, f, w_dec, direction)
    full, fraction = absorbed(x, f, w_dec, direction, main)
    legacy = legacy_fraction(f, w_dec, direction, main)
    absorbers = (f[full] * (w_dec @ direction)).argmax(1)
    mean = {
        key: v.double().mean().item()
        for key, v in (("full", full), ("fraction", fraction), ("fraction_legacy", legacy))
    }
    return LetterResult(name, len(x), main=main, f1=main_f1, probe_f1=probe_f1, **mean), absorbers


def summary(found: list[tuple[LetterResult, Tensor]], density: Tensor, excluded: tuple[str, ...]) -> AbsorptionResult:
    """Means over parents. `density` [F]: share of all words on which a latent fires."""
    results = [result for result, _ in found]
    dense = (density > DENSE)[torch.cat([absorbers for _, absorbers in found])].double()
    return AbsorptionResult(
        mean_full=fmean(r.full for r in results),
        mean_fraction=fmean(r.fraction for r in results),
        mean_fraction_legacy=fmean(r.fraction_legacy for r in results),
        mean_split_latents=fmean(len(r.main) for r in results),
        dense_absorbers=dense.mean().item() if len(dense) else None,
        letters=tuple(results),
        excluded=excluded,
    )


def _name(letter: int) -> str:
    return chr(ord("a") + letter)


def rank_by_regression(f: Tensor, y: Tensor, *, seed: int) -> Tensor:
    """[c, 10]: for each column of y [n, c] the latents of f [n, F] with the largest weight in an L1-regularised probe,
    best first."""
    weight, _ = fit_linear(f, y, batch=256, weight_decay=1e-6, l1=0.01, seed=seed)
    return weight.topk(min(MAX_MAIN, weight.shape[1]), dim=1).indices


def main_latents(f: Tensor, positive: Tensor, is_test: Tensor, ranked: list[int]) -> tuple[tuple[int, ...], float]:
    """The first k of `ranked`, where k grows from 1 as long as each step raises test F1 by more than .03; and that F1.

    >>> positive = torch.tensor([True, True, False, False]).repeat(8)
    >>> f = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0], [0.0, 0.0]]).repeat(8, 1)  # each knows half of the words
    >>> main_latents(f, positive, torch.arange(32) < 16, [0, 1])
    ((0, 1), 1.0)
    """
    best, taken = -1.0, 1
    for k in range(1, len(ranked) + 1):
        score = _logistic_f1(f[:, ranked[:k]], positive, is_test)
        if k > 1 and score <= best + F1_JUMP:
            break
        best, taken = score, k
    return tuple(ranked[:taken]), best


def _logistic_f1(f: Tensor, positive: Tensor, is_test: Tensor) -> float:
    """Test F1 of a balanced logistic regression on latents f [n, k]."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=500, class_weight="balanced")
    model.fit(f[~is_test].numpy(), positive[~is_test].numpy())
    predicted = torch.from_numpy(model.decision_function(f[is_test].numpy()) > 0)
    return f1(predicted[:, None], positive[is_test][:, None]).item()


def single_token_words(tokenizer, min_letters: int = 1) -> tuple[list[str], list[int]]:
    """Words of at least `min_letters` letters that are one token, and their token ids, in the order of the ids.

    A word is an entry of the vocabulary whose text, after at most one leading space, is only a-z and A-Z.
    """
    words, ids = [], []
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).removeprefix(" ")
        if len(word) >= min_letters and word.isascii() and word.isalpha():
            words.append(word)
            ids.append(token)
    return words, ids


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
