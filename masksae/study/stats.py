"""Paired statistics: what an arm changes, with an interval, and what the run could have seen.

SAEs of two arms are paired by everything but the arm (grid and seed), because the seed moves absorption as much as the
method does and pairs follow their seed. Each effect has one interval, and one p-value from the same statistic:

items fixed   only pairs vary (letters: there are no others). Student's t over the pairs' means
items random  pairs and items both vary (parents, tasks, sets: a sample of what could have been asked). Two-way random
              effects with Satterthwaite's degrees of freedom (`grand_mean`)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from typing import Literal

import numpy as np

from masksae.errors import DataError

LEVEL, POWER = 0.05, 0.8

Items = Literal["fixed", "random"]


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences treated - baseline; what needs a second pair is None for a single one."""

    baseline: float
    treated: float
    difference: float
    low: float | None
    high: float | None
    """Interval that covers the truth with probability 1 - `level`, by the rule for the items."""
    pairs: int
    detectable: float | None
    """Smallest true difference that such a run finds with probability .8 (two-sided, at `level`), by the same rule."""
    p_value: float | None = None
    """Two-sided, of no difference."""
    size: float | None = None
    """Effect size: mean difference in standard deviations of the pairs' differences (Cohen's d_z)."""
    items: int | None = None
    """Parents, tasks or sets that vary beside the pair; None: none do."""
    error: float | None = None
    """Standard error of the difference."""
    degrees: float | None = None
    """Degrees of freedom of its t distribution."""
    squares: tuple[float, float, float] | None = None
    """Mean squares of pairs, items and the rest, on which error and degrees rest where items vary; None: none do."""
    level: float = LEVEL
    """Of the interval and of `detectable`."""

    def at(self, level: float) -> "Effect":
        """The same with interval and `detectable` of another level than 5 %."""
        if self.error is None:
            return replace(self, level=level)
        from scipy import stats

        reach = float(stats.t.isf(level / 2, self.degrees)) * self.error
        ends = {"low": self.difference - reach, "high": self.difference + reach}
        return replace(self, **ends, detectable=self.finds(level), level=level)

    def p_equivalent(self, margin: float) -> float | None:
        """p-value that the true difference is not within (-margin, margin): the larger of two one-sided tests
        (Schuirmann 1987).

        >>> paired_effect([0.0] * 4, [-0.01, 0.01, 0.0, 0.0]).p_equivalent(0.03) < 0.01
        True
        """
        from scipy import stats

        excess = abs(self.difference) - margin
        if self.error is None:
            return None
        return float(stats.t.cdf(excess / self.error, self.degrees)) if self.error else float(excess >= 0)

    def finds(self, level: float) -> float | None:
        """`detectable` for a two-sided test at another level."""
        return None if self.error is None else errors_found(self.degrees, level) * self.error

    def verdict(
        self, direction: int, *, p_value: float | None = None, margin: float | None = None, level: float = 0.05
    ) -> str:
        """ "supported" (direction +1 or -1) or "contradicted" if the p-value is below `level`; else "equivalent" if the
        difference is shown to lie within the margin; else "inconclusive".

        p_value  corrected for several tests; None: this effect's own

        >>> paired_effect([0.0] * 4, [-0.01, 0.01, 0.0, 0.0]).verdict(-1, margin=0.03)
        'equivalent'
        """
        p_value = self.p_value if p_value is None else p_value
        if p_value is None:
            return "inconclusive"
        if p_value < level:
            return "supported" if direction * self.difference > 0 else "contradicted"
        return "equivalent" if margin is not None and self.p_equivalent(margin) < level else "inconclusive"

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict) -> "Effect":
        """From `to_dict`, whatever else the row holds."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})


def paired_effect(baseline, treated, *, items: Items = "random") -> Effect:
    """Effect of `treated` against `baseline`, paired by position: values [pairs], or [pairs, items] for scores that
    are means over letters, parents, tasks or sets.

    Raises DataError for unequal or no data, and for NaN.

    >>> e = paired_effect([1.0, 2.0, 3.0], [0.5, 1.4, 2.6])
    >>> round(e.difference, 3), round(e.low, 3), round(e.high, 3), e.verdict(-1)
    (-0.5, -0.748, -0.252, 'supported')
    >>> paired_effect([[0.1, 0.3], [0.2, 0.4]], [[0.0, 0.1], [0.1, 0.2]]).items
    2
    """
    from scipy import stats

    sides = [_table(side) for side in (baseline, treated)]
    if sides[0].shape != sides[1].shape or not sides[0].size:
        raise DataError(
            f"Paired values are needed, found {len(sides[0])} of the baseline and {len(sides[1])} of the treated arm. "
            "Score both arms with the same seeds."
        )
    if not all(np.isfinite(side).all() for side in sides):
        raise DataError("A score is NaN or infinite. Look at the stage that wrote it.")
    values = sides[1] - sides[0]
    n, m = values.shape
    fixed = items == "fixed" or m == 1
    mean, error, degrees = (float(part) for part in grand_mean(values, items="fixed" if fixed else "random"))
    before, after = (float(side.mean()) for side in sides)
    found = Effect(before, after, mean, None, None, n, None, items=None if fixed else m)
    if n == 1:
        return found
    spread = float(values.mean(1).std(ddof=1))
    found = replace(
        found,
        p_value=float(2 * stats.t.sf(abs(mean) / error, degrees)) if error else float(mean == 0),
        size=mean / spread if spread else None,
        error=error,
        degrees=degrees,
        squares=None if fixed else tuple(map(float, _squares(values))),
    )
    return found.at(LEVEL)


@cache
def errors_found(degrees: float, level: float = LEVEL) -> float:
    """True difference, in standard errors, that a two-sided t test at `level` finds with probability .8: the noncentral
    t distribution's, which few degrees take far from t(1 - level / 2) + t(.8).

    >>> round(errors_found(2), 2), round(errors_found(1000), 2)
    (5.65, 2.8)
    """
    from scipy import optimize, stats

    bound = stats.t.isf(level / 2, degrees)
    return float(optimize.brentq(lambda shift: stats.nct.sf(bound, degrees, shift) - POWER, 0, 4 * bound))


def _table(values) -> np.ndarray:
    """Values as float64 [pairs, items]. Raises DataError for rows of several lengths."""
    try:
        table = np.asarray([np.atleast_1d(row) for row in values], dtype=float)
    except ValueError:
        raise DataError("Every SAE needs a value for the same items (letters, tasks); some are missing.") from None
    return table.reshape(len(table), -1) if table.size else table.reshape(0, 0)


def grand_mean(values, *, items: Items = "random") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of values [..., pairs, items], its standard error, and the degrees of freedom of its t distribution; leading
    axes are cases of their own.

    items "fixed": other pairs would have met the same items, so the pairs' means are the sample.
    items "random": y = mean + pair + item + rest, all but the mean drawn afresh. With the mean squares A of pairs, B of
    items and R of the rest, (A + B - R) / (pairs x items) estimates the squared error without bias (Searle, Casella and
    McCulloch 1992, ch. 4). It is never taken below A or B alone, its value where one of the two components is none, so
    that a negative estimate cannot narrow an interval. Degrees are Satterthwaite's (1946),

        (A + B - R)^2 / (A^2 / a + B^2 / b + R^2 / r),    a = pairs - 1, b = items - 1, r = a b,

    min(a, b) at least, with A (1 + 2 / a) and B (1 + 2 / b) in the places of A and B: a mean square of two or four
    degrees is often far too small, its weight with it, and the degrees then far too many. 1 + 2 / a is E[A^2] / E[A]^2.
    Without it an interval over three pairs covers the truth 92.2 % of the time at worst, with it 93.8 %;
    tests/study/test_stats.py prints what it covers.

    >>> [round(float(part), 3) for part in grand_mean([[1.0, 2.0], [3.0, 4.0]], items="fixed")]
    [2.5, 1.0, 1.0]
    """
    values = np.asarray(values, dtype=float)
    pairs, count = values.shape[-2:]
    mean = values.mean((-2, -1))
    by_pair = values.mean(-1)
    if pairs == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    if items == "fixed" or count == 1:
        return mean, by_pair.std(-1, ddof=1) / pairs**0.5, np.full_like(mean, pairs - 1.0)
    return mean, *_error_and_degrees(*_squares(values), pairs, count)


def _error_and_degrees(A, B, R, pairs, count) -> tuple[np.ndarray, np.ndarray]:
    """Those of `grand_mean` for random items, from the mean squares of pairs, items and the rest."""
    a, b = pairs - 1, count - 1
    error = np.sqrt(np.maximum(np.maximum(A, B), A + B - R) / (pairs * count))
    A, B = A * (1 + 2 / a), B * (1 + 2 / b)
    least = np.full(np.shape(error), np.minimum(a, b), dtype=float)
    weight = A**2 / a + B**2 / b + R**2 / (a * b)
    degrees = np.divide(np.maximum(np.maximum(A, B), A + B - R) ** 2, weight, out=least.copy(), where=weight > 0)
    return error, np.maximum(degrees, least)


def _squares(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares of pairs, items and the rest, of values [..., pairs, items]."""
    pairs, items = values.shape[-2:]
    values = values - values.mean((-2, -1), keepdims=True)
    of_pairs = items * np.square(values.mean(-1)).sum(-1)
    of_items = pairs * np.square(values.mean(-2)).sum(-1)
    rest = np.maximum(0.0, np.einsum("...pi,...pi->...", values, values) - of_pairs - of_items)
    return of_pairs / (pairs - 1), of_items / (items - 1), rest / ((pairs - 1) * (items - 1))


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


def pairs_needed(effect: Effect, level: float = LEVEL) -> int | None:
    """Fewest pairs at which a true difference as large as the one found is found again four times out of five by the
    same rule, with the same items and a two-sided test at `level`; None beyond a thousand, and where no number of pairs
    would do.

    The variances of pairs, items and the rest are taken for what they were estimated as. More pairs average the first
    and the last; the items' part of the error stays, and with it the items' few degrees of freedom.

    >>> pairs_needed(paired_effect([0.0] * 3, [0.0, 1.0, 2.0])), pairs_needed(paired_effect([0.0] * 2, [-1.0, 1.001]))
    (10, None)
    """
    from scipy import stats

    if effect.error is None:
        return None
    n = np.arange(2, 1001)
    if effect.items is None:
        error, degrees = effect.error * (effect.pairs / n) ** 0.5, n - 1.0
    else:
        A, B, R = effect.squares
        error, degrees = _error_and_degrees(A, B + (n / effect.pairs - 1) * max(0.0, B - R), R, n, effect.items)
    least = stats.norm.isf(level / 2) + stats.norm.ppf(
        POWER
    )  # `errors_found` with endless degrees: spares most of them
    asked = zip(*(part[error * least <= abs(effect.difference)] for part in (n, error, degrees)))
    return next((int(n) for n, e, d in asked if errors_found(float(d), level) * e <= abs(effect.difference)), None)


VERDICTS = ("supported", "contradicted", "equivalent", "inconclusive", "not measurable", "not measured")
"""What can be said of a claim: that it holds; its opposite; that there is no difference beyond the margin; that this
run cannot tell; that the instrument fails its gate, so that no run with it could; that nothing was scored."""


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim that must hold in every cell: contradicted if any is; else of the cells that could be
    measured, what all of them say, or inconclusive.

    >>> combine(["supported", "not measurable"]), combine(["supported", "equivalent"]), combine(["not measurable"])
    ('supported', 'inconclusive', 'not measurable')
    """
    told = {v for v in verdicts if not v.startswith("not ")}
    if "contradicted" in told:
        return "contradicted"
    if not told:
        return "not measurable" if "not measurable" in verdicts else "not measured"
    return told.pop() if len(told) == 1 else "inconclusive"
