"""How values are put in words on a page."""

from __future__ import annotations

import json
from typing import Any

from sft_ray.analysis.report.run import Trial
from sft_ray.screen import short_params

LEVEL = "95\N{NO-BREAK SPACE}% interval"


def told(trial: Trial, metric: str) -> str:
    """What a mark says when pointed at."""
    value = "" if trial.value is None else f", {metric} {trial.value:.4f}"
    return f"trial {trial.number}, {trial.state}{value}: {short_params(trial.params)}"


def time_unit(seconds: float) -> tuple[float, str]:
    """What to divide seconds by, and the name of that."""
    if seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def short_name(path: str) -> str:
    """`learning_rate`, `regularization`; the strength of a penalty goes by the penalty's name."""
    plain = path.removeprefix("train.").removesuffix(".kind")
    return plain.removeprefix("regularization.").removesuffix(".strength")


def setting_words(value: Any) -> str:
    """A setting's value; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figure(value: float | None, form: str = ".4f") -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:{form}}"


def interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    """`, 95 % interval 0.8679 to 0.8793`, or nothing."""
    if low is None or high is None:
        return ""
    return f", {LEVEL} {low:{form}} to {high:{form}}"


def bounds(found: dict[str, Any] | None, form: str = ".4f") -> str:
    """Low and high of an interval over seeds, or nothing."""
    if not found or found["low"] is None:
        return ""
    return f"{found['low']:{form}} to {found['high']:{form}}"
