"""Paired statistics: what an arm changes, with an interval, and what the run could have seen.

SAEs of two arms are paired by everything but the arm (grid and seed), because the seed moves absorption as much as the method
does and pairs follow their seed. With a handful of seeds the interval is Student's t; its width is the honest answer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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

    def verdict(self, direction: int) -> str:
        """ "supported" if the whole interval lies on the claimed side (direction +1 or -1), "contradicted" on the other, else
        "inconclusive"."""
        if self.low is None:
            return "inconclusive"
        if direction * self.low > 0 and direction * self.high > 0:
            return "supported"
        if direction * self.low < 0 and direction * self.high < 0:
            return "contradicted"
        return "inconclusive"

    def to_dict(self) -> dict:
        return asdict(self)


def paired_effect(baseline: Sequence[float], treated: Sequence[float]) -> Effect:
    """Effect of `treated` against `baseline`, paired by position; 95 % t interval. Raises DataError for unequal or no data.

    >>> e = paired_effect([1.0, 2.0, 3.0], [0.5, 1.4, 2.6])
    >>> round(e.difference, 3), round(e.low, 3), round(e.high, 3), e.verdict(-1)
    (-0.5, -0.748, -0.252, 'supported')
    """
    from scipy import stats

    n = len(baseline)
    if n == 0 or n != len(treated):
        raise DataError(
            f"Paired values are needed, found {n} of the baseline and {len(treated)} of the treated arm. Score both arms with the same seeds."
        )
    if not all(map(math.isfinite, [*baseline, *treated])):
        raise DataError("A score is NaN or infinite. Look at the stage that wrote it.")
    differences = [b - a for a, b in zip(baseline, treated)]
    mean = sum(differences) / n
    low = high = detectable = None
    if n > 1:
        error = (sum((d - mean) ** 2 for d in differences) / (n - 1) / n) ** 0.5
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        low, high = float(mean - critical * error), float(mean + critical * error)
        detectable = float((critical + stats.t.ppf(POWER, n - 1)) * error)
    return Effect(sum(baseline) / n, sum(treated) / n, mean, low, high, n, detectable)


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim that must hold in every cell: supported if all are, contradicted if any is, else inconclusive."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if verdicts and all(v == "supported" for v in verdicts) else "inconclusive"
