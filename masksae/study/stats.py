"""Paired statistics: what an arm changes, with an interval, and what the run could have seen.

SAEs of two arms are paired by everything but the arm (grid and seed), because the seed moves absorption as much as the
method does and pairs follow their seed. With a handful of seeds the interval is Student's t; its width is the honest
answer. Scores that are means over letters or tasks have a second interval, for other seeds *and* other letters or
tasks; a verdict needs both.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import numpy as np

from masksae.errors import DataError

CONFIDENCE, POWER = 0.95, 0.8


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences treated - baseline; `low`, `high` and `detectable` are None for a single pair."""

    baseline: float
    treated: float
    difference: float
    low: float | None
    high: float | None
    pairs: int
    detectable: float | None
    """Smallest true difference that such a run finds with probability .8 (two-sided test at 5 %)."""
    p_value: float | None = None
    """Of the paired t test, two-sided."""
    size: float | None = None
    """Effect size: mean difference in standard deviations of the differences (Cohen's d_z)."""
    items: int | None = None
    """Letters, tasks or sets that vary beside the seed."""
    items_low: float | None = None
    items_high: float | None = None
    """95 % interval when both seeds and items are drawn anew (`crossed_interval`)."""

    def verdict(self, direction: int) -> str:
        """ "supported" if the whole interval lies on the claimed side (direction +1 or -1), "contradicted" on the
        other, else "inconclusive". Where items vary too, both intervals must agree."""
        bounds = [b for b in (self.low, self.high, self.items_low, self.items_high) if b is not None]
        if self.low is None:
            return "inconclusive"
        if all(direction * bound > 0 for bound in bounds):
            return "supported"
        return "contradicted" if all(direction * bound < 0 for bound in bounds) else "inconclusive"

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict) -> "Effect":
        """From `to_dict`, whatever else the row holds."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


def paired_effect(baseline: Sequence[float], treated: Sequence[float]) -> Effect:
    """Effect of `treated` against `baseline`, paired by position; 95 % t interval. Raises DataError for unequal or no
    data.

    >>> e = paired_effect([1.0, 2.0, 3.0], [0.5, 1.4, 2.6])
    >>> round(e.difference, 3), round(e.low, 3), round(e.high, 3), e.verdict(-1)
    (-0.5, -0.748, -0.252, 'supported')
    """
    from scipy import stats

    n = len(baseline)
    if n == 0 or n != len(treated):
        raise DataError(
            f"Paired values are needed, found {n} of the baseline and {len(treated)} of the treated arm. "
            "Score both arms with the same seeds."
        )
    if not all(map(math.isfinite, [*baseline, *treated])):
        raise DataError("A score is NaN or infinite. Look at the stage that wrote it.")
    differences = [b - a for a, b in zip(baseline, treated)]
    mean = sum(differences) / n
    low = high = detectable = p_value = size = None
    if n > 1:
        error = (sum((d - mean) ** 2 for d in differences) / (n - 1) / n) ** 0.5
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        low, high = float(mean - critical * error), float(mean + critical * error)
        detectable = float((critical + stats.t.ppf(POWER, n - 1)) * error)
        if error > 0:
            p_value, size = float(2 * stats.t.sf(abs(mean) / error, n - 1)), mean / (error * n**0.5)
    return Effect(sum(baseline) / n, sum(treated) / n, mean, low, high, n, detectable, p_value, size)


def paired_effect_by_item(baseline: Sequence[Sequence[float]], treated: Sequence[Sequence[float]]) -> Effect:
    """As `paired_effect`, of the means over items of values [pairs, items], with a second interval that draws the items
    anew too.

    >>> e = paired_effect_by_item([[0.1, 0.3], [0.2, 0.4]], [[0.0, 0.1], [0.1, 0.2]])
    >>> round(e.difference, 3), e.items, e.items_low < -0.15 < e.items_high
    (-0.15, 2, True)
    """
    if len({len(row) for row in (*baseline, *treated)}) != 1:
        raise DataError("Every SAE needs a value for the same items (letters, tasks); some are missing.")
    means = [[sum(row) / len(row) for row in side] for side in (baseline, treated)]
    low, high = crossed_interval(np.asarray(treated) - np.asarray(baseline))
    return replace(paired_effect(*means), items=len(baseline[0]), items_low=low, items_high=high)


def crossed_interval(values, *, draws: int = 10_000, seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """95 % bootstrap interval of the mean of values [a, b, ...] whose axes are crossed random samples (every seed meets
    every letter): each axis is drawn anew with replacement, independently ("pigeonhole" bootstrap, Owen 2007, arXiv
    0711.1838). It errs on the wide side; with an axis of one row there is no interval.
    """
    values = np.asarray(values, dtype=float)
    if min(values.shape) < 2:
        return None, None
    generator = np.random.Generator(np.random.Philox(seed))
    means = np.broadcast_to(values, (draws, *values.shape))
    for size in values.shape:
        weights = generator.multinomial(size, np.full(size, 1 / size), size=draws) / size
        means = np.einsum("na,na...->n...", weights, means)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values that hold for all claims at once (Holm 1979): the chance of any false rejection stays below 5 %.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, worst = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = worst
    return adjusted


def variance_components(values, names: Sequence[str]) -> dict[str, float]:
    """Where the variance of a score comes from: values [a, b, ...] with one axis per source, crossed, one value per
    cell.

    Returns a variance for each source and each interaction ("seed x draw"); the last holds the residual too. Estimates
    of the random-effects analysis of variance by expected mean squares; negative ones, which chance can produce, are
    set to 0.

    >>> variance_components([[1.0, 1.0], [3.0, 3.0]], ["seed", "draw"])
    {'seed': 2.0, 'draw': 0.0, 'seed x draw': 0.0}
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != len(names) or min(values.shape) < 2:
        raise DataError(
            f"One axis of at least two values is needed for each of {list(names)}, found shape {values.shape}."
        )
    axes = range(values.ndim)
    subsets = [s for size in range(1, values.ndim + 1) for s in combinations(axes, size)]
    square = {subset: _mean_square(values, subset) for subset in subsets}
    components = {}
    for subset in subsets:
        wider = [other for other in subsets if set(subset) <= set(other)]
        signed = sum((-1) ** (len(other) - len(subset)) * square[other] for other in wider)
        cells = math.prod(values.shape[axis] for axis in axes if axis not in subset)
        components[" x ".join(names[axis] for axis in subset)] = max(0.0, float(signed / cells))
    return components


def _mean_square(values: np.ndarray, subset: tuple[int, ...]) -> float:
    """Mean square of an effect: of the means over all other axes, what is not explained by effects of fewer axes."""
    others = tuple(axis for axis in range(values.ndim) if axis not in subset)
    effect = values.mean(others, keepdims=True) if others else values
    for axis in subset:
        effect = effect - effect.mean(axis, keepdims=True)
    degrees = math.prod(values.shape[axis] - 1 for axis in subset)
    cells = math.prod(values.shape[axis] for axis in others)
    return float(cells * (effect**2).sum() / degrees)


def interpolate(l0: Sequence[float], values: Sequence[float], at: float, *, log: bool = True) -> float | None:
    """A score at the L0 `at`, linear in log L0 (or in another quantity as it is) between the SAEs of other k; None
    outside of them: nothing is extrapolated.

    >>> interpolate([10, 40], [0.7, 0.9], at=20)
    0.8
    """
    points = sorted(zip(l0, values))
    if len(points) < 2 or not points[0][0] <= at <= points[-1][0]:
        return None
    scale = math.log if log else float
    return round(float(np.interp(scale(at), [scale(x) for x, _ in points], [y for _, y in points])), 12)


def pairs_needed(size: float) -> int | None:
    """Pairs at which an effect of this size (`Effect.size`) is found four times out of five; None beyond a thousand.

    >>> pairs_needed(1.0), pairs_needed(0.01)
    (10, None)
    """
    from scipy import stats

    for n in range(2, 1001):
        if stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) + stats.t.ppf(POWER, n - 1) <= abs(size) * n**0.5:
            return n
    return None


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim that must hold in every cell: supported if all are, contradicted if any is, else
    inconclusive."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if verdicts and all(v == "supported" for v in verdicts) else "inconclusive"
