"""Statistics against scipy, against second derivations, against a simulation of what they promise, and against data
whose variances are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from masksae.errors import DataError
from masksae.study.stats import (
    combine,
    grand_mean,
    holm,
    interpolate,
    paired_effect,
    pairs_needed,
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


def test_fixed_items_are_a_t_test_of_the_pairs_means():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 7))
    found, expected = paired_effect(a, b, items="fixed"), paired_effect(a.mean(1), b.mean(1))
    assert found.to_dict() == pytest.approx(expected.to_dict()) and found.items is None and found.squares is None
    assert paired_effect(a[:, :1], b[:, :1]).items is None  # one item is no sample of items


def mean_squares(y):
    """Pairs, items and rest by projections onto the design's columns: another way than `stats._squares` takes."""
    pairs, items = y.shape
    ones = np.ones((pairs * items, 1))
    of_pairs, of_items = np.kron(np.eye(pairs), np.ones((items, 1))), np.kron(np.ones((pairs, 1)), np.eye(items))
    project = lambda x: x @ np.linalg.pinv(x)
    whole, nothing = project(np.hstack([of_pairs, of_items])), project(ones)
    flat = y.ravel()
    left = [flat @ (project(part) - nothing) @ flat for part in (of_pairs, of_items)]
    rest = flat @ (np.eye(pairs * items) - whole) @ flat
    return left[0] / (pairs - 1), left[1] / (items - 1), rest / ((pairs - 1) * (items - 1))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), pairs=st.integers(2, 6), items=st.integers(2, 8), by_pair=st.floats(0, 3))
def test_two_way_random_effects_by_a_second_derivation(seed, pairs, items, by_pair):
    generator = np.random.default_rng(seed)
    y = by_pair * generator.normal(size=(pairs, 1)) + generator.normal(size=(1, items))
    y = y + generator.normal(size=(pairs, items))
    A, B, R = mean_squares(y)
    a, b = pairs - 1, items - 1
    variance = max(A, B, A + B - R) / (pairs * items)
    A, B = A * (a + 2) / a, B * (b + 2) / b
    expected = max(A, B, A + B - R) ** 2 / (A**2 / a + B**2 / b + R**2 / (a * b))
    mean, error, degrees = grand_mean(y)
    assert (mean, error) == pytest.approx((y.mean(), variance**0.5))
    assert degrees == pytest.approx(max(expected, min(a, b)))
    assert np.allclose(np.ravel(grand_mean(y[None])), [mean, error, degrees])


def test_two_way_by_hand():
    """Pairs 0 and 2, items -1 and 1, no rest: A = 4, B = 4, R = 0, squared error (4 + 4) / 4 = 2 and one degree for
    each."""
    found = paired_effect([[0.0, 0.0], [0.0, 0.0]], [[-1.0, 1.0], [1.0, 3.0]])
    assert (found.difference, found.error, found.degrees) == pytest.approx((1.0, 2**0.5, 2.0))
    assert found.high - 1 == pytest.approx(scipy_stats.t.ppf(0.975, 2) * 2**0.5)
    assert found.squares == pytest.approx((4.0, 4.0, 0.0))
    assert found.p_value == pytest.approx(2 * scipy_stats.t.sf(1 / 2**0.5, 2))


SCENARIOS = {  # standard deviations of pairs, items and the rest
    "pairs": lambda i, j: (1.0, 0.1, 0.3),
    "items": lambda i, j: (0.1, 1.0, 0.3),
    "both": lambda i, j: (1.0, 1.0, 1.0),
    "worst": lambda i, j: ((0.9 * i) ** 0.5, (0.1 * j) ** 0.5, 0.01),
    "mixed": lambda i, j: (0.3, 0.6, 1.0),
    "weak": lambda i, j: (0.3, 0.2, 1.0),
    "rest": lambda i, j: (0.0, 0.0, 1.0),
}
DOMINATED = ("pairs", "items", "both", "worst")
"""worst: pairs make nine tenths of the squared error, where the degrees of freedom are guessed worst; rest: no
component at all, where the interval must be wide, since it cannot know that."""


def covered(pairs, n_items, scenario, **options):
    draws = 15_000 // pairs  # more where few pairs make an interval doubtful
    generator = np.random.default_rng([pairs, n_items, *scenario.encode()])
    normal = lambda *shape: generator.standard_normal((draws, *shape), dtype=np.float32)
    of_pairs, of_items, rest = SCENARIOS[scenario](pairs, n_items)
    values = of_pairs * normal(pairs, 1) + of_items * normal(1, n_items) + rest * normal(pairs, n_items)
    mean, error, degrees = grand_mean(values, **options)
    return float(np.mean(np.abs(mean) <= scipy_stats.t.ppf(0.975, degrees) * error))


def test_intervals_cover_the_truth(capsys):
    """At the numbers of pairs and items that the profiles have: 93 % at least everywhere, 97.5 % at most where pairs or
    items dominate; with two pairs 90 %."""
    found = {
        (pairs, items, scenario): covered(pairs, items, scenario)
        for pairs in (2, 3, 4, 5, 8, 12)
        for items in (5, 8, 26, 113)
        for scenario in SCENARIOS
    }
    with capsys.disabled():
        print(
            "\ncoverage of 95 % intervals over pairs and items\npairs items " + " ".join(f"{s:>6}" for s in SCENARIOS)
        )
        for pairs, items in dict.fromkeys(key[:2] for key in found):
            print(f"{pairs:5} {items:5} " + " ".join(f"{found[pairs, items, s]:6.1%}" for s in SCENARIOS))
    assert min(share for (pairs, *_), share in found.items() if pairs > 2) >= 0.93
    assert min(found.values()) >= 0.9
    assert max(share for (_, _, scenario), share in found.items() if scenario in DOMINATED) <= 0.975


def test_pairs_alone_are_not_enough_where_items_vary():
    """Where the item effect is shared by all pairs, an interval over pairs is far too narrow for other items."""
    assert covered(8, 26, "mixed", items="fixed") < 0.9 and covered(8, 26, "items", items="fixed") < 0.5
    assert covered(8, 26, "pairs", items="fixed") == pytest.approx(0.95, abs=0.015)


def test_detectable_differences_are_detected():
    """By the rule that decides, items drawn anew: found four times out of five."""
    generator = np.random.default_rng(0)
    draw = lambda: generator.normal(size=(8, 1)) + generator.normal(size=(1, 20)) * 2 + generator.normal(size=(8, 20))
    typical = np.median([paired_effect(np.zeros((8, 20)), draw()).detectable for _ in range(300)])
    found = np.mean([paired_effect(np.zeros((8, 20)), typical + draw()).low > 0 for _ in range(300)])
    assert 0.7 < found < 0.9
    effect = paired_effect(np.zeros((8, 20)), draw())
    assert effect.finds(0.05) == pytest.approx(effect.detectable) and effect.finds(0.01) > effect.detectable


@pytest.mark.parametrize("pairs, level", [(2, 0.05), (3, 0.05), (3, 0.05 / 28), (12, 0.05 / 6)])
def test_detectable_by_few_pairs(pairs, level):
    """Four times out of five, as drawn: pairs that differ by what is said to be found."""
    unit = paired_effect(np.zeros(pairs), np.linspace(-1, 1, pairs), items="fixed")
    true = unit.finds(level) / unit.error / pairs**0.5  # in standard deviations of the pairs
    drawn = np.random.default_rng(pairs).normal(true, 1, size=(40_000, pairs, 1))
    mean, error, degrees = grand_mean(drawn, items="fixed")
    assert np.mean(mean > scipy_stats.t.isf(level / 2, degrees) * error) == pytest.approx(0.8, abs=0.01)


def test_equivalence_is_two_one_sided_tests():
    """scipy's one-sample t tests against the two ends of the margin."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        d, margin = generator.normal(size=6) * 0.02 + 0.01, 0.03
        low = scipy_stats.ttest_1samp(d, -margin, alternative="greater").pvalue
        high = scipy_stats.ttest_1samp(d, margin, alternative="less").pvalue
        found = paired_effect(np.zeros(6), d).p_equivalent(margin)
        assert found == pytest.approx(max(low, high))
        inside = abs(d.mean()) + scipy_stats.t.ppf(0.95, 5) * scipy_stats.sem(d) < margin  # the 90 % interval
        assert inside == (found < 0.05)


def test_equivalence_is_claimed_wrongly_one_time_in_twenty():
    """A true difference at the margin itself."""
    d = np.random.default_rng(0).normal(size=(1000, 6)) + 5
    wrong = np.mean([paired_effect(np.zeros(6), row).p_equivalent(5.0) < 0.05 for row in d])
    assert wrong == pytest.approx(0.05, abs=0.02)


def test_verdicts():
    down, up, wide = [0.10, 0.11, 0.09], [0.30, 0.31, 0.32], [0.0, 0.5, 0.1]
    assert paired_effect(up, down).verdict(-1) == "supported" and paired_effect(up, down).verdict(+1) == "contradicted"
    assert paired_effect(up, down).verdict(-1, p_value=0.06) == "inconclusive"  # the corrected p-value decides
    assert paired_effect(up, wide).verdict(-1) == "inconclusive"
    assert paired_effect(up, [0.301, 0.309, 0.32]).verdict(-1, margin=0.01) == "equivalent"
    assert paired_effect(up, [0.301, 0.309, 0.32]).verdict(-1, margin=0.001) == "inconclusive"
    assert paired_effect([0.3], [0.1]).verdict(-1, margin=1.0) == "inconclusive"  # one pair shows nothing
    exact = paired_effect([0.1, 0.1], [0.1, 0.1])  # no scatter at all
    assert (exact.p_value, exact.verdict(-1, margin=0.01), exact.verdict(-1)) == (1.0, "equivalent", "inconclusive")
    assert paired_effect([0.0, 0.0], [0.5, 0.5]).verdict(1) == "supported"


def test_an_item_that_moves_the_mean_for_all_pairs_widens_the_verdict():
    baseline, treated = np.zeros((5, 4)), np.full((5, 4), -0.1) + np.linspace(-0.01, 0.01, 5)[:, None]
    assert paired_effect(baseline, treated).verdict(-1) == "supported"
    treated[:, 0] += 0.35  # the same for all pairs: another item could turn the mean around
    assert paired_effect(baseline, treated).verdict(-1) == "inconclusive"
    assert paired_effect(baseline, treated, items="fixed").verdict(-1) == "supported"


@pytest.mark.parametrize(
    "a, b, what",
    [
        ([1.0], [1.0, 2.0], "found 1 of the baseline and 2"),
        ([], [], "found 0"),
        ([float("nan")], [1.0], "NaN"),
        ([[1.0, 2.0], [1.0]], [[1.0, 2.0], [1.0, 2.0]], "same items"),
    ],
)
def test_bad_pairs(a, b, what):
    with pytest.raises(DataError, match=what):
        paired_effect(a, b)


def test_a_claim_over_cells():
    assert combine(["supported", "supported"]) == "supported" and combine([]) == "not measured"
    assert combine(["supported", "inconclusive"]) == combine(["equivalent", "supported"]) == "inconclusive"
    assert combine(["supported", "inconclusive", "contradicted"]) == "contradicted"
    assert combine(["equivalent", "not measurable"]) == "equivalent" and combine(["not measurable"]) == "not measurable"


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


def stepped(p_values, level):
    """Holm's procedure as he tells it: reject the smallest while it is below level / (those left)."""
    rejected, left = set(), sorted(p_values, key=p_values.get)
    while left and p_values[left[0]] < level / len(left):
        rejected.add(left.pop(0))
    return rejected


@settings(max_examples=60, deadline=None)
@given(p=st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), level=st.floats(0.001, 0.2))
def test_holm_rejects_what_its_steps_reject(p, level):
    p_values = dict(enumerate(p))
    adjusted = holm(p_values)
    assert {name for name, value in adjusted.items() if value < level} == stepped(p_values, level)
    assert all(adjusted[name] >= p_values[name] for name in p_values)


def test_holm_by_hand():
    p = {"C1": 0.04, "C2": 0.01, "C3": 0.5, "C5": 0.0001}
    assert holm(p) == pytest.approx({"C5": 0.0004, "C2": 0.03, "C1": 0.08, "C3": 0.5})


@pytest.mark.parametrize("size", [0.4, 0.8, 2.0])
def test_pairs_needed_is_where_the_detectable_difference_is_the_effect(size):
    alternating = lambda n: [size + (1 if i % 2 else -1) * ((n - 1) / n) ** 0.5 for i in range(n)]
    few = paired_effect([0.0] * 4, alternating(4))
    n = pairs_needed(few)
    even = n + n % 2
    assert paired_effect([0.0] * even, alternating(even)).detectable <= size * 1.001
    fewer = even - 2
    assert fewer < 2 or paired_effect([0.0] * fewer, alternating(fewer)).detectable > size


def test_no_number_of_pairs_makes_up_for_other_items():
    treated = np.array([[-1.0, 1.2]] * 4) + np.linspace(-0.01, 0.01, 4)[:, None]
    assert pairs_needed(paired_effect(np.zeros((4, 2)), treated)) is None
    assert pairs_needed(paired_effect(np.zeros((4, 2)), treated, items="fixed")) == 2


def from_squares(difference, squares, pairs, items):
    """Differences [pairs, items] with this mean and these mean squares of pairs, items and the rest."""
    i, j = (np.cos(np.pi * np.arange(n) / (n - 1)) if n > 2 else np.array([-1.0, 1.0]) for n in (pairs, items))
    i, j = i - i.mean(), j - j.mean()
    A, B, R = squares
    parts = (
        (A / items * (pairs - 1) / (i**2).sum()) ** 0.5 * i[:, None] + 0 * j,
        (B / pairs * (items - 1) / (j**2).sum()) ** 0.5 * j + 0 * i[:, None],
        (R * (pairs - 1) * (items - 1) / ((i**2).sum() * (j**2).sum())) ** 0.5 * i[:, None] * j,
    )
    return difference + sum(parts)


@pytest.mark.parametrize(
    "difference, squares, pairs, items, level, needed",
    [  # of results/: what n - 1 degrees said is 12, 34, 23, 119
        pytest.param(-0.0451318, (0.0053063, 0.0177068, 0.0090072), 3, 31, 0.05 / 6, 7, id="laptop contexts"),
        pytest.param(0.0140591, (7.55434e-5, 1.579913e-3, 9.66845e-4), 3, 16, 0.05 / 6, None, id="laptop probing"),
        pytest.param(-0.0310398, (5.89798e-3, 2.63392e-3, 6.10919e-3), 4, 5, 0.05 / 18, 38, id="overnight matryoshka"),
        pytest.param(0.0154190, (9.25737e-3, 8.05245e-4, 0.01820941), 3, 5, 0.05 / 18, 126, id="overnight topk160"),
    ],
)
def test_pairs_needed_has_the_degrees_of_the_rule_at_so_many_pairs(difference, squares, pairs, items, level, needed):
    values = from_squares(difference, squares, pairs, items)
    effect = paired_effect(np.zeros_like(values), values)
    assert effect.squares == pytest.approx(squares) and effect.difference == pytest.approx(difference)
    assert pairs_needed(effect, level) == needed


def test_pairs_needed_find_what_was_found():
    """By simulation: variances as they were estimated, the run's items or others, so many new pairs, the same rule."""
    generator = np.random.default_rng(0)
    pairs, items, level, difference = 3, 31, 0.05 / 6, -0.0451318
    A, B, R = 0.0053063, 0.0177068, 0.0090072
    values = from_squares(difference, (A, B, R), pairs, items)
    n = pairs_needed(paired_effect(np.zeros_like(values), values), level)
    draws, of_items = 4000, ((B - R) / pairs) ** 0.5
    y = (
        difference
        + of_items * generator.normal(size=(draws, 1, items))
        + R**0.5 * generator.normal(size=(draws, n, items))
    )
    mean, error, degrees = grand_mean(y)
    found = np.mean(mean < -scipy_stats.t.isf(level / 2, degrees) * error)
    assert 0.7 < found < 0.95


def test_nothing_is_extrapolated():
    assert interpolate([20, 80], [0.5, 0.9], at=19) is None and interpolate([20], [0.5], at=20) is None
    assert interpolate([80, 20], [0.9, 0.5], at=40) == 0.7 and interpolate([20, 80], [0.5, 0.9], at=20) == 0.5
