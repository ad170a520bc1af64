"""Intervals, differences and their limits: against SciPy, by hand, and by simulated experiments."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from sft_ray.analysis.statistics import (
    Interval,
    Paired,
    corrected,
    mean_interval,
    paired_difference,
    probability_of_improvement,
)

EXPERIMENTS = 2000
SEEDS = 5
# Three standard errors of a share of EXPERIMENTS: the seeded simulations stay well within.
NOMINAL_WITHIN = 3 * math.sqrt(0.95 * 0.05 / EXPERIMENTS)
POWER_WITHIN = 3 * math.sqrt(0.8 * 0.2 / EXPERIMENTS)


def holds(found: Interval | Paired, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


def p_value_of(values: Sequence[float], base: Sequence[float]) -> float:
    p = paired_difference(values, base).p_value
    assert p is not None
    return p


def detectable_of(differences: Sequence[float]) -> float:
    found = paired_difference(differences, [0.0] * len(differences)).detectable
    assert found is not None
    return found


def test_a_mean_interval_is_students() -> None:
    found = mean_interval([0.90, 0.92, 0.94])
    assert (found.mean, found.sd, found.n) == (pytest.approx(0.92), pytest.approx(0.02), 3)
    reach = 4.302653 * 0.02 / math.sqrt(3)  # the 97.5 % point of t with 2 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(0.92 - reach), pytest.approx(0.92 + reach))


def test_a_higher_level_gives_a_wider_interval() -> None:
    found = mean_interval([1.0, 2.0, 4.0], level=0.99)
    expected = stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval(0.99)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_one_run_has_a_mean_and_nothing_around_it() -> None:
    assert mean_interval([0.9]) == Interval(0.9, None, None, None, 1)


def test_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value, but got none"):
        mean_interval([])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.9, -3.0])
def test_equal_runs_have_an_interval_of_one_point(value: float) -> None:
    found = mean_interval([value] * 3)
    assert found.sd == 0
    assert found.low == found.high == found.mean == pytest.approx(value)


def test_a_paired_difference_is_the_interval_and_test_of_the_differences() -> None:
    values, base = [0.90, 0.93, 0.91, 0.95], [0.89, 0.90, 0.91, 0.92]
    found = paired_difference(values, base)
    differences = [0.01, 0.03, 0.00, 0.03]
    alone = mean_interval(differences)
    assert found.n == 4
    assert found.difference == pytest.approx(0.0175)
    assert (found.low, found.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert found.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_exchanging_the_arms_turns_the_sign_only() -> None:
    values, base = [1.0, 2.5, 2.0], [0.5, 1.0, 2.0]
    there, back = paired_difference(values, base), paired_difference(base, values)
    assert there.difference == -back.difference
    assert there.low == pytest.approx(-back.high)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.detectable == pytest.approx(back.detectable)


def test_arms_that_agree_everywhere_do_not_differ() -> None:
    assert paired_difference([0.9, 0.8], [0.9, 0.8]) == Paired(0.0, None, None, 1.0, 2, None)
    assert paired_difference([0.0, 0.0], [0.0, 0.0]) == Paired(0.0, None, None, 1.0, 2, None)


def test_a_difference_without_spread_is_judged_by_its_sign_despite_rounding() -> None:
    values, base = [0.9, 0.8, 0.7], [0.8, 0.7, 0.6]
    assert len({v - b for v, b in zip(values, base, strict=True)}) > 1
    found = paired_difference(values, base)
    assert found == Paired(pytest.approx(0.1), None, None, 0.25, 3, None)


def test_scores_that_count_examples_are_told_apart_as_rarely_as_others() -> None:
    """Twelve arms that do not differ, three seeds, 100 validation rows: equal differences occur."""
    rng, told = np.random.default_rng(4), 0
    for _ in range(200):
        scores = rng.binomial(100, 0.85, size=(13, 3)) / 100
        p_values = corrected([p_value_of(list(arm), list(scores[0])) for arm in scores[1:]])
        told += any(p is not None and p < 0.05 for p in p_values)
    assert told / 200 < 0.09


def test_a_small_but_true_spread_is_not_taken_for_rounding() -> None:
    found = paired_difference([0.5 + 1e-9, 0.5, 0.5 + 3e-9], [0.5, 0.5, 0.5])
    assert found.p_value is not None
    assert 0.1 < found.p_value < 0.5


def test_one_pair_has_a_difference_only() -> None:
    found = paired_difference([0.75], [0.5])
    assert found == Paired(0.25, None, None, None, 1, None)


@pytest.mark.parametrize(("values", "base"), [([], []), ([1.0], [1.0, 2.0])])
def test_values_without_partners_are_refused(values: list[float], base: list[float]) -> None:
    with pytest.raises(ValueError, match="as many values as base values"):
        paired_difference(values, base)


@pytest.mark.parametrize(
    ("values", "base", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0, 1.0], [2.0, 3.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0, 1.0], 0.5),
        ([1.0], [1.0], 0.5),
        ([1.0, 3.0], [2.0, 3.0], 1.5 / 4),  # 3 > 2, 3 = 3
        ([1.0, 4.0, 5.0], [2.0, 3.0], 4 / 6),
    ],
)
def test_probability_of_improvement_counts_comparisons(
    values: list[float], base: list[float], expected: float
) -> None:
    assert probability_of_improvement(values, base) == pytest.approx(expected)


def test_correction_is_benjamini_and_hochbergs() -> None:
    # p * m / rank, and never above that of a larger p.
    assert corrected([0.01, 0.04, 0.03, 0.50]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.50])


def test_correction_passes_by_what_has_no_p_value() -> None:
    assert corrected([None, 0.01, None, 0.02]) == [
        None,
        pytest.approx(0.02),
        None,
        pytest.approx(0.02),
    ]
    assert corrected([None, None]) == [None, None]
    assert corrected([]) == []
    assert corrected([0.0, 1.0]) == [0.0, 1.0]


# Sample sizes for which Cohen's and G*Power's tables give 80 % power at 5 %, two-sided.
@pytest.mark.parametrize(("effect", "n"), [(0.5, 34), (0.8, 15), (0.2, 199), (1.0, 10)])
def test_the_detectable_effect_is_that_of_power_tables(effect: float, n: int) -> None:
    def detectable_effect(count: int) -> float:
        differences = np.random.default_rng(0).normal(size=count)
        return detectable_of(list(differences)) / float(differences.std(ddof=1))

    assert detectable_effect(n) <= effect < detectable_effect(n - 1)


def test_more_pairs_detect_less_from_two_to_very_many() -> None:
    found = [detectable_of([-1.0, 1.0] * half) for half in (1, 2, 5, 50, 5000)]
    assert found == sorted(found, reverse=True)
    assert all(math.isfinite(value) for value in found)


def test_intervals_over_normal_seeds_hold_the_truth_in_95_percent() -> None:
    rng = np.random.default_rng(1)
    runs = rng.normal(0.9, 0.01, size=(EXPERIMENTS, SEEDS))
    share = np.mean([holds(mean_interval(list(scores)), 0.9) for scores in runs])
    assert share == pytest.approx(0.95, abs=NOMINAL_WITHIN)


def test_intervals_of_correlated_arms_hold_the_difference_in_95_percent() -> None:
    """What a seed does to both arms is three times what it does to each alone."""
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.03, size=(EXPERIMENTS, SEEDS))
    base = 0.90 + shared + rng.normal(0, 0.01, size=shared.shape)
    values = 0.91 + shared + rng.normal(0, 0.01, size=shared.shape)
    found = [paired_difference(list(v), list(b)) for v, b in zip(values, base, strict=True)]
    assert np.mean([holds(f, 0.01) for f in found]) == pytest.approx(0.95, abs=NOMINAL_WITHIN)
    # Pairing is worth it: the interval is less than half of that without shared seeds.
    unpaired = 2 * stats.t.isf(0.025, 2 * SEEDS - 2) * math.sqrt(2 * (0.03**2 + 0.01**2) / SEEDS)
    widths = [f.high - f.low for f in found if f.high is not None and f.low is not None]
    assert np.mean(widths) < unpaired / 2


def test_intervals_over_a_bounded_skewed_score_come_close() -> None:
    """Accuracy of 500 examples near the ceiling, where every seed has a true rate of its own."""
    rng = np.random.default_rng(3)
    many = 1 / (1 + np.exp(-rng.normal(3.5, 0.4, size=1_000_000)))
    rates = 1 / (1 + np.exp(-rng.normal(3.5, 0.4, size=(EXPERIMENTS, SEEDS))))
    runs = rng.binomial(500, rates) / 500
    assert stats.skew(runs.ravel()) < -0.3
    share = np.mean([holds(mean_interval(list(scores)), float(many.mean())) for scores in runs])
    assert 0.92 <= share <= 0.97


@pytest.mark.parametrize("n", [3, 8])
def test_the_detectable_difference_is_found_in_80_percent(n: int) -> None:
    rng = np.random.default_rng(n)
    scale = rng.normal(size=n)
    scale = (scale - scale.mean()) / scale.std(ddof=1)  # exactly the spread of the draws below
    difference = detectable_of(list(scale))
    draws = rng.normal(difference, 1.0, size=(EXPERIMENTS, n))
    found = np.mean([p_value_of(list(drawn), [0.0] * n) < 0.05 for drawn in draws])
    assert found == pytest.approx(0.8, abs=POWER_WITHIN)


def drawn_ablation(rng: np.random.Generator, effects: Sequence[float]) -> list[float | None]:
    """p-values of arms against one base, which they share as real ones do."""
    shared = rng.normal(0, 0.01, size=SEEDS)
    base = shared + rng.normal(0, 0.01, size=SEEDS)
    arms = [effect + shared + rng.normal(0, 0.01, size=SEEDS) for effect in effects]
    return [p_value_of(list(arm), list(base)) for arm in arms]


def test_where_nothing_differs_a_discovery_is_rare_after_correction_only() -> None:
    rng = np.random.default_rng(4)
    ablations = [drawn_ablation(rng, [0.0] * 10) for _ in range(200)]
    bare = np.mean([any(p is not None and p < 0.05 for p in ps) for ps in ablations])
    after = np.mean([any(p is not None and p < 0.05 for p in corrected(ps)) for ps in ablations])
    assert bare > 0.2
    assert after <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(ablations))


def test_false_discoveries_are_a_small_share_where_half_of_the_arms_differ() -> None:
    rng = np.random.default_rng(5)
    shares, found = [], 0
    for _ in range(100):
        p_values = corrected(drawn_ablation(rng, [0.0] * 5 + [0.08] * 5))
        told = [p is not None and p < 0.05 for p in p_values]
        shares.append(sum(told[:5]) / max(sum(told), 1))
        found += sum(told[5:])
    assert np.mean(shares) < 0.05
    assert found / (100 * 5) > 0.8
