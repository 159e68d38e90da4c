"""SCR and TPP: does removing a few latents remove one concept and leave the others? (Karvonen et al. 2025, arXiv
2503.09532)

Both ablate latents and look at linear probes on activations averaged over the tokens of a text. The decoder is linear,
so ablating a set C changes the averaged activation by - sum_{j in C} fbar_j d_j with fbar the latents averaged over the
same tokens, and a probe's logit by - sum_{j in C} fbar_j (d_j . w). One pass over the tokens therefore serves every
set, size and class; encoding again for each, as SAEBench 0.6.0 does, gives the same numbers to rounding (tests).
Padding is left out of both averages here; SAEBench encodes padded positions too in the ablated pass, which leaks f(0)
into the average.

Caveat: in the reliability audit of these metrics (arXiv 2605.18229) TPP falls the longer an SAE is trained, and SCR at
many latents goes against the ground truth. Report them with seeds, and draw no conclusion from them alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masksae.errors import DataError
from masksae.saes.sae import alike, at_least_single

NS = (2, 5, 10, 20, 50, 100, 500)
"""Numbers of ablated latents in SAEBench."""
NO_ROOM = 1e-3
"""SCR is 0 where the oracle probe is not better than the spurious one by this much."""


@dataclass(frozen=True)
class Texts:
    """Labelled texts, averaged over tokens."""

    x: Tensor
    """Activations [n, d]."""
    f: Tensor
    """Latents [n, F]."""
    y: Tensor
    """bool [n]: the concept is there."""

    def __post_init__(self):
        for name in ("x", "f"):
            object.__setattr__(self, name, at_least_single(getattr(self, name)))
        if not len(self.x) == len(self.f) == len(self.y):
            raise DataError(
                f"Rows do not match: {len(self.x)} activations, {len(self.f)} latents, {len(self.y)} labels."
            )
        if not 0 < int(self.y.sum()) < len(self.y):
            raise DataError(f"Both classes are needed, found {int(self.y.sum())} positives of {len(self.y)}.")


@dataclass(frozen=True)
class Probe:
    """A linear probe: positive where x . weight + bias > 0."""

    weight: Tensor
    """[d]"""
    bias: float

    def accuracy(self, texts: Texts, ablated: Sequence[int] | Tensor = (), w_dec: Tensor | None = None) -> float:
        """Share of right answers after ablating latents of the decoder w_dec [F, d]."""
        x, weight = alike(texts.x, self.weight)
        logits = x @ weight + self.bias
        if len(ablated):
            f, rows, weight = alike(texts.f[:, ablated], w_dec[ablated], weight)
            logits = logits - f @ (rows @ weight)
        return ((logits > 0) == texts.y).double().mean().item()


def fit_probe(x: Tensor, y: Tensor) -> Probe:
    """A logistic regression on standardised activations x [n, d] with labels y bool [n], as a probe of the activations
    themselves.

    Ridge penalty with C = .01: with more dimensions than texts a weaker one only memorises. SAEBench instead keeps the
    best of 20 epochs by accuracy on the *test* texts. Raises DataError for one class only.
    """
    from sklearn.linear_model import LogisticRegression

    Texts(x, x, y)
    x = x.double()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    model = LogisticRegression(C=0.01, max_iter=1000, solver="newton-cholesky").fit(
        ((x - mean) / std).numpy(), y.numpy()
    )
    weight = torch.from_numpy(model.coef_[0]) / std
    return Probe(weight.float(), float(model.intercept_[0] - weight @ mean))


def separation(probe: Probe, texts: Texts, w_dec: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over positives - mean over negatives of f_j, w . d_j), each [F]: their product is a latent's part in the
    probe's separation."""
    w_dec, weight = alike(w_dec, probe.weight)
    return texts.f[texts.y].mean(0) - texts.f[~texts.y].mean(0), w_dec @ weight


def tpp_effects(probe: Probe, texts: Texts, w_dec: Tensor) -> Tensor:
    """Effect of each latent [F]: max(0, difference of means) x (w . d_j); latents that fire more for negatives have
    none."""
    difference, along = separation(probe, texts, w_dec)
    return difference.clamp(min=0) * along


def scr_effects(probe: Probe, texts: Texts, w_dec: Tensor) -> Tensor:
    """Effect of each latent [F], whatever its sign."""
    difference, along = separation(probe, texts, w_dec)
    return (difference * along).abs()


def strongest(effect: Tensor, n: int) -> Tensor:
    """The n latents of largest effect among those whose effect is not 0; of equal ones, the first.

    >>> strongest(torch.tensor([0.0, 3.0, 1.0, 3.0]), 3)
    tensor([1, 3, 2])
    """
    order = torch.where(effect != 0, effect, -torch.inf).argsort(descending=True, stable=True)
    return order[: min(n, int((effect != 0).sum()))]


@dataclass(frozen=True)
class TPP:
    """Targeted probe perturbation by number of ablated latents."""

    total: dict[int, float]
    """Intended less unintended: 1 would be the perfect surgeon, 0 no selectivity."""
    intended: dict[int, float]
    """Mean fall of a class's own probe."""
    unintended: dict[int, float]
    """Mean fall of the other classes' probes."""


def tpp(probes: Sequence[Probe], train: Sequence[Texts], test: Sequence[Texts], w_dec: Tensor, *, ns=NS) -> TPP:
    """Ablate the latents of each class; compare the fall of its own probe with that of the others. One entry per class
    in each list.

    The latents of class i: the n of largest effect on its probe, on the training texts. Raises DataError for fewer than
    2.
    """
    classes = range(len(probes))
    if len(probes) < 2 or not len(probes) == len(train) == len(test):
        raise DataError(
            f"TPP needs probes and texts of at least two classes, found {len(probes)}, {len(train)}, {len(test)}."
        )
    clean = [probes[j].accuracy(test[j]) for j in classes]
    effect = [tpp_effects(probes[i], train[i], w_dec) for i in classes]
    intended, unintended = {}, {}
    for n in ns:
        falls = [
            [clean[j] - probes[j].accuracy(test[j], strongest(effect[i], n), w_dec) for j in classes] for i in classes
        ]
        intended[n] = sum(falls[i][i] for i in classes) / len(probes)
        others = [sum(falls[i][j] for j in classes if j != i) / (len(probes) - 1) for i in classes]
        unintended[n] = sum(others) / len(probes)
    return TPP({n: intended[n] - unintended[n] for n in ns}, intended, unintended)


@dataclass(frozen=True)
class SCR:
    """Spurious correlation removal by number of ablated latents."""

    direction_1: dict[int, float]
    """Latents of the spurious attribute ablated, wanted attribute tested."""
    direction_2: dict[int, float]
    """The reverse."""
    score: dict[int, float]
    """The direction that starts from the lower accuracy."""
    room: float
    """Of that direction: accuracy of the oracle probe less that of the spurious one. The score divides by it, so where
    it is not far above the standard error of an accuracy the score is noise."""


def scr(
    spurious: Probe, oracles: tuple[Probe, Probe], train: tuple[Texts, Texts], test: tuple[Texts, Texts],
    w_dec: Tensor, *, ns=NS,
) -> SCR:  # fmt: skip
    """Ablate what a probe picked up by correlation; how much of the way to an unbiased probe is regained?

    spurious  probe trained where both attributes go together
    oracles   probes of attribute 1 (wanted) and attribute 2, trained where they are independent
    train     texts with the labels of attribute 1 and of attribute 2, for choosing latents
    test      the same for testing, where the attributes are independent

    Latents of an attribute: the n of largest absolute effect on its oracle probe. 1: all regained; 0: none; below 0:
    worse.
    """
    base = [spurious.accuracy(t) for t in test]
    room = [oracle.accuracy(t) - start for oracle, t, start in zip(oracles, test, base)]
    effect = [scr_effects(oracle, t, w_dec) for oracle, t in zip(oracles, train)]

    def direction(tested: int, ablated: int) -> dict[int, float]:
        if room[tested] < NO_ROOM:
            return {n: 0.0 for n in ns}
        gained = {n: spurious.accuracy(test[tested], strongest(effect[ablated], n), w_dec) - base[tested] for n in ns}
        return {n: gain / room[tested] for n, gain in gained.items()}

    directions = direction(0, 1), direction(1, 0)
    lower = 0 if base[0] <= base[1] else 1
    return SCR(*directions, score=directions[lower], room=room[lower])
