"""What repeated runs tell: intervals over seeds, differences over shared seeds, their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL = 0.95  # of every interval
ALPHA, POWER = 0.05, 0.8  # the field's convention for planning a comparison (Cohen 1988)
# Differences of equal scores differ in their last bits; this share of the scores is rounding.
ROUNDING = 1e-12
# Above the noncentrality that reaches POWER with a single degree of freedom, which is the largest.
HIGHEST_NONCENTRALITY = 50.0


@dataclass(frozen=True)
class Interval:
    """A mean over runs.

    Attributes:
        sd: standard deviation of the runs, n - 1 in its denominator.
        low, high: of the mean's interval; None, as is `sd`, for a single run.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """A mean difference over pairs of runs.

    Attributes:
        difference: values minus base.
        low, high: of the difference's interval; None for a single pair, and where all pairs differ
            alike.
        p_value: two-sided; None for a single pair.
        n: pairs.
        detectable: the true difference that so many pairs of this spread tell from 0 with a
            probability of 80 %, by a two-sided test at 5 %; None where there is no interval.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    detectable: float | None


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and Student's t interval: runs are independent, their scores roughly normal."""
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value, but got none")
    scores = np.asarray(values, dtype=float)
    mean = float(scores.mean())
    if n == 1:
        return Interval(mean, None, None, None, n)
    if _spread_is_rounding(scores, scores):
        return Interval(mean, 0.0, mean, mean, n)
    sd = float(scores.std(ddof=1))
    low, high = stats.t.interval(level, n - 1, loc=mean, scale=sd / math.sqrt(n))
    return Interval(mean, sd, float(low), float(high), n)


def paired_difference(values: Sequence[float], base: Sequence[float]) -> Paired:
    """Paired t interval and test of `values` minus `base`, entry by entry of the same seed.

    Pairing takes out what a seed does to both arms, so it tells apart more than two intervals
    side by side do.  Where all differences are equal there is no spread to judge by: scores that
    count examples do so by chance, and the sign test has the word.
    """
    n = len(values)
    if n == 0 or n != len(base):
        raise ValueError(f"as many values as base values, and some, but got {n} and {len(base)}")
    scores = np.asarray([values, base], dtype=float)
    differences = scores[0] - scores[1]
    difference = float(differences.mean())
    if n == 1:
        return Paired(difference, None, None, None, n, None)
    if _spread_is_rounding(differences, scores):
        if abs(difference) <= ROUNDING * np.abs(scores).max():
            return Paired(0.0, None, None, 1.0, n, None)
        return Paired(difference, None, None, 2 * 0.5**n, n, None)
    test = stats.ttest_rel(scores[0], scores[1])
    low, high = test.confidence_interval(LEVEL)
    standard_error = float(differences.std(ddof=1)) / math.sqrt(n)
    detectable = _detectable_noncentrality(n - 1) * standard_error
    return Paired(difference, float(low), float(high), float(test.pvalue), n, detectable)


def probability_of_improvement(values: Sequence[float], base: Sequence[float]) -> float:
    """P(a run of `values` beats one of `base`), ties half, over all n * m comparisons.

    Higher is better: where it is not, the caller negates both.  Agarwal et al. 2021, "Deep
    reinforcement learning at the edge of the statistical precipice"; it is the Mann-Whitney U
    statistic over n * m.
    """
    # The statistic is the same by every method; the exact p-value beside it would be wasted work.
    found = stats.mannwhitneyu(values, base, method="asymptotic")
    return float(found.statistic) / (len(values) * len(base))


def corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Benjamini and Hochberg 1995: keeps the expected share of false discoveries at the level.

    An entry without a p-value stays None and does not count as a comparison.
    """
    known = [p for p in p_values if p is not None]
    if not known:
        return list(p_values)
    adjusted = iter(stats.false_discovery_control(known, method="bh"))
    return [None if p is None else float(next(adjusted)) for p in p_values]


def _spread_is_rounding(values: NDArray[np.float64], scores: NDArray[np.float64]) -> bool:
    return float(np.ptp(values)) <= ROUNDING * float(np.abs(scores).max())


@lru_cache
def _detectable_noncentrality(degrees: int) -> float:
    """In standard errors; power of the t-test by the noncentral t distribution (Cohen 1988, ch. 2).

    It takes the observed spread for the true one, so with few pairs it is itself a rough number.
    """
    critical = stats.t.isf(ALPHA / 2, degrees)

    def lacking(noncentrality: float) -> float:
        # The far tail adds less than 1e-6 near the answer, and SciPy's is NaN in places.
        return float(stats.nct.sf(critical, degrees, noncentrality)) - POWER

    return float(optimize.brentq(lacking, 0.0, HIGHEST_NONCENTRALITY))
