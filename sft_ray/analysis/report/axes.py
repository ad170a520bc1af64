"""Axes of charts: from values to places between 0 and 1, with ticks; numbers and words only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from sft_ray.analysis.report.facts import is_number

LOG_FROM = 30  # largest over smallest value

MOST_CATEGORIES = 12
TICKS = 5
CLOSEST_TICKS = 0.06  # share of the axis
MARGIN = 0.04  # share of the axis that is left free at each end
OUTLIERS_FROM = 20  # values
OUTLYING = 5.0  # times as wide as the middle 96 %


@dataclass(frozen=True)
class NumberAxis:
    """Numbers from `low` to `high`, which differ; both positive where `is_log`.

    Attributes:
        marked: where ticks stand; none: at round numbers.
    """

    label: str
    low: float
    high: float
    is_log: bool = False
    marked: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """Between 0 and 1 for values of the axis, outside for others."""
        low, high = self._plain(self.low), self._plain(self.high)
        return (self._plain(value) - low) / (high - low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and words."""
        round_numbers = log_ticks if self.is_log else ticks
        values = self.marked or round_numbers(self.low, self.high)
        return [(self.place(value), short(value)) for value in values]

    def _plain(self, value: float) -> float:
        return math.log10(max(value, self.low / 10)) if self.is_log else value


@dataclass(frozen=True)
class WordAxis:
    """Categories side by side."""

    label: str
    words: tuple[str, ...]

    def place(self, value: Any) -> float:
        return (self.words.index(word(value)) + 0.5) / len(self.words)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        return [(self.place(name), name) for name in self.words]


Axis = NumberAxis | WordAxis


def axis_of(label: str, values: Sequence[Any]) -> Axis | None:
    """The axis that shows these values; None where words are too many to tell apart."""
    if not values:
        return None
    if all(is_number(value) for value in values):
        axis = number_axis(label, values)
        tried = tuple(sorted(set(values)))
        apart = (axis.place(b) - axis.place(a) >= CLOSEST_TICKS for a, b in pairwise(tried))
        is_few = len(tried) <= MOST_CATEGORIES and all(apart)
        return replace(axis, marked=tried) if is_few and _are_whole(tried) else axis
    words = tuple(dict.fromkeys(word(value) for value in sorted(values, key=_order)))
    return WordAxis(label, words) if len(words) <= MOST_CATEGORIES else None


def within(axis: Axis, value: Any) -> float:
    """The place of a value, of one that lies outside the nearest end."""
    return min(max(axis.place(value), 0.0), 1.0)


def number_axis(label: str, values: Sequence[float], *, from_zero: bool = False) -> NumberAxis:
    """Wide enough for all values, or for most if a few lie far away; logarithmic over a wide span.

    Args:
        from_zero: linear, beginning at 0.
    """
    low, high = (0.0, max(values)) if from_zero else central_range(values)
    if not from_zero and low > 0 and high > LOG_FROM * low:
        reach = (high / low) ** MARGIN
        return NumberAxis(label, low / reach, high * reach, is_log=True)
    reach = (high - low) * MARGIN or abs(low) * 0.1 or 1.0
    return NumberAxis(label, low if from_zero else low - reach, high + reach)


def central_range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, unless a few of many would squeeze the others together."""
    found = np.asarray(values, dtype=float)
    low, high = float(found.min()), float(found.max())
    if len(found) >= OUTLIERS_FROM:
        inner_low, inner_high = map(float, np.quantile(found, [0.02, 0.98]))
        is_log = low > 0 and high > LOG_FROM * low and inner_high > LOG_FROM * inner_low
        if not is_log and high - low > OUTLYING * (inner_high - inner_low) > 0:
            return inner_low, inner_high
    return low, high


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers within the range."""
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them over a short range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    factors = (1,) if span > 3 else (1, 3) if span > 1.5 else (1, 2, 5)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in found if low <= value <= high]


def short(value: float) -> str:
    """A tick's words: `0.85`, `20,000`, `1e-5`."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}"


def word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _are_whole(values: Iterable[float]) -> bool:
    return all(float(value).is_integer() for value in values)


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers before words."""
    return not is_number(value), value if is_number(value) else 0.0, str(value)
