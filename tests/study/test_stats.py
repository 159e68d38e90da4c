"""Statistics against scipy, against a bootstrap with explicit indices, and against data whose variances are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from masksae.errors import DataError
from masksae.study.stats import (
    crossed_interval,
    holm,
    interpolate,
    paired_effect,
    paired_effect_by_item,
    variance_components,
)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12))
def test_interval_and_p_value_are_scipys(seed, n):
    a, b = np.random.default_rng(seed).normal(size=(2, n))
    found, expected = paired_effect(a, b), scipy_stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.size == pytest.approx((b - a).mean() / (b - a).std(ddof=1))


def test_crossed_interval_equals_drawing_rows_and_columns():
    values = np.random.default_rng(0).normal(size=(6, 9))
    generator = np.random.default_rng(1)
    means = [values[generator.integers(6, size=6)][:, generator.integers(9, size=9)].mean() for _ in range(20_000)]
    assert crossed_interval(values, draws=20_000) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert crossed_interval(values) == crossed_interval(values)
    assert crossed_interval(np.ones((3, 4))) == (1, 1) and crossed_interval(np.ones((1, 4))) == (None, None)


def test_crossed_interval_covers_the_truth_where_seeds_and_letters_vary():
    """Where the item effect is shared by all seeds, an interval over seeds alone is far too narrow for other items."""
    generator, both, seeds = np.random.default_rng(0), 0, 0
    for _ in range(200):
        values = (
            generator.normal(size=(8, 1)) * 0.2 + generator.normal(size=(1, 20)) + generator.normal(size=(8, 20)) * 0.2
        )
        low, high = crossed_interval(values, draws=400)
        both += low <= 0 <= high
        effect = paired_effect(np.zeros(8), values.mean(1))
        seeds += effect.low <= 0 <= effect.high
    assert both > 180 and seeds < 140


def test_a_verdict_needs_both_intervals():
    baseline, treated = np.zeros((5, 4)), np.full((5, 4), -0.1) + np.linspace(-0.01, 0.01, 5)[:, None]
    assert paired_effect_by_item(baseline, treated).verdict(-1) == "supported"
    treated[:, 0] += 0.35  # the same for all seeds: another letter could turn the mean around
    found = paired_effect_by_item(baseline, treated)
    assert found.low < found.high < 0 < found.items_high and found.verdict(-1) == "inconclusive"
    with pytest.raises(DataError, match="same items"):
        paired_effect_by_item([[1.0, 2.0]], [[1.0]])


def test_variance_components_by_hand():
    seed, draw = np.array([1.0, 2.0, 6.0]), np.array([0.0, 4.0])
    found = variance_components(seed[:, None] + draw[None, :], ["seed", "draw"])
    assert found == pytest.approx({"seed": seed.var(ddof=1), "draw": draw.var(ddof=1), "seed x draw": 0})


def test_variance_components_recover_what_was_put_in():
    generator, names = np.random.default_rng(0), ["seed", "draw", "split"]
    sizes, found = (6, 5, 4), []
    for _ in range(400):
        part = lambda *axes: generator.normal(size=[n if i in axes else 1 for i, n in enumerate(sizes)])
        values = 3 * part(0) + 2 * part(1) + 1 * part(2) + 1.5 * part(0, 1) + 0.5 * part(0, 1, 2)
        found.append(variance_components(values, names))
    means = {name: np.mean([f[name] for f in found]) for name in found[0]}
    assert means["seed"] == pytest.approx(9, rel=0.1) and means["draw"] == pytest.approx(4, rel=0.15)
    assert means["split"] == pytest.approx(1, rel=0.15) and means["seed x draw"] == pytest.approx(2.25, rel=0.1)
    assert means["seed x draw x split"] == pytest.approx(0.25, rel=0.05)
    assert means["seed x split"] < 0.05 and means["draw x split"] < 0.05
    with pytest.raises(DataError, match="two values"):
        variance_components([[1.0, 2.0]], ["seed", "draw"])


def test_holm_is_monotone_and_never_below_the_p_value():
    p = {"C1": 0.04, "C2": 0.01, "C3": 0.5, "C5": 0.0001}
    found = holm(p)
    assert found == pytest.approx({"C5": 0.0004, "C2": 0.03, "C1": 0.08, "C3": 0.5})


def test_nothing_is_extrapolated():
    assert interpolate([20, 80], [0.5, 0.9], at=19) is None and interpolate([20], [0.5], at=20) is None
    assert interpolate([80, 20], [0.9, 0.5], at=40) == 0.7 and interpolate([20, 80], [0.5, 0.9], at=20) == 0.5
