"""What each change costs: from the finished runs of an ablation to a summary of every arm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from sft_ray.analysis.statistics import (
    ALPHA,
    LEVEL,
    Interval,
    Paired,
    corrected,
    mean_interval,
    paired_difference,
    probability_of_improvement,
)

BASE = "base"
# Cost -> its heading, and what it is divided by there.
COST_HEADINGS = {
    "train_seconds": ("training (s)", 1.0),
    "eval_seconds": ("evaluation (s)", 1.0),
    "trained_parameters": ("trained parameters (M)", 1e6),
    "memory_bytes": ("memory (MB)", 1e6),
}


@dataclass(frozen=True)
class Arm:
    """One configuration of an ablation.

    Attributes:
        name: unique; `base` is the one the others are compared with.
        changes: dotted path -> value, where it departs from the base.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`frozen_layers 3`, `l2_sp 0.01`; an arm without changes goes by its name."""
        return ", ".join(_told(path, value) for path, value in self.changes.items()) or self.name


@dataclass(frozen=True)
class ArmSummary:
    """What the finished runs of one arm say.

    Attributes:
        sign: 1 where a higher score is better, else -1.
        values: seed -> score of the runs that finished.
        failed: runs that did not.
        score: None if no run finished.
        versus_base: over the seeds that both finished; None for the base and without such seeds.
        p_corrected: over all arms but the base.
        improvement: P(a run of this arm is better than one of the base).
        train_seconds, eval_seconds, trained_parameters, memory_bytes: mean of the finished runs.
    """

    arm: Arm
    sign: int
    values: dict[int, float]
    failed: int
    score: Interval | None = None
    versus_base: Paired | None = None
    p_corrected: float | None = None
    improvement: float | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    trained_parameters: float | None = None
    memory_bytes: float | None = None

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def is_base(self) -> bool:
        return self.arm.name == BASE

    @property
    def is_told_apart(self) -> bool:
        return self.p_corrected is not None and self.p_corrected < ALPHA


def summarize(
    arms: Sequence[Arm], runs: Sequence[Mapping[str, Any]], *, sign: int
) -> list[ArmSummary]:
    """One summary per arm, in the order of `arms`, one of which is the base.

    Args:
        runs: arm, seed, state, value, train_seconds, eval_seconds, trained_parameters,
            memory_bytes; a later run of the same arm and seed replaces an earlier one.
        sign: 1 where a higher score is better, else -1.
    """
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {arm.name: {} for arm in arms}
    for run in runs:
        by_arm[run["arm"]][run["seed"]] = run
    finished = {
        name: {seed: run for seed, run in sorted(of_arm.items()) if _is_finished(run)}
        for name, of_arm in by_arm.items()
    }
    scores = {
        name: {seed: float(run["value"]) for seed, run in of_arm.items()}
        for name, of_arm in finished.items()
    }
    others = [arm.name for arm in arms if arm.name != BASE]
    paired = {name: _against(scores[name], scores[BASE]) for name in others}
    p_values = corrected([None if p is None else p.p_value for p in paired.values()])
    p_corrected = dict(zip(others, p_values, strict=True))

    summaries = []
    for arm in arms:
        values, base_values = scores[arm.name], scores[BASE]
        is_compared = arm.name != BASE and values and base_values
        summaries.append(
            ArmSummary(
                arm=arm,
                sign=sign,
                values=values,
                failed=len(by_arm[arm.name]) - len(values),
                score=mean_interval(list(values.values())) if values else None,
                versus_base=paired.get(arm.name),
                p_corrected=p_corrected.get(arm.name),
                improvement=probability_of_improvement(
                    [sign * value for value in values.values()],
                    [sign * value for value in base_values.values()],
                )
                if is_compared
                else None,
                **{cost: _mean_of(cost, finished[arm.name].values()) for cost in COST_HEADINGS},
            )
        )
    return summaries


def to_tree(summaries: Sequence[ArmSummary]) -> dict[str, Any]:
    """The summaries as ablation.json holds them; `values` are pairs of seed and score."""
    rows = [
        {
            "name": summary.arm.name,
            "label": summary.arm.label,
            "changes": summary.arm.changes,
            "values": [[seed, value] for seed, value in summary.values.items()],
            "failed": summary.failed,
            "score": asdict(summary.score) if summary.score else None,
            "versus_base": asdict(summary.versus_base) if summary.versus_base else None,
            "p_corrected": summary.p_corrected,
            "improvement": summary.improvement,
            **{cost: getattr(summary, cost) for cost in COST_HEADINGS},
        }
        for summary in summaries
    ]
    is_higher_better = all(summary.sign > 0 for summary in summaries)
    direction = "maximize" if is_higher_better else "minimize"
    return {"direction": direction, "level": LEVEL, "arms": rows}


def from_tree(tree: Mapping[str, Any]) -> list[ArmSummary]:
    """What `to_tree` was made from.

    Raises:
        KeyError, TypeError: the tree lacks a part.
    """
    sign = -1 if tree["direction"] == "minimize" else 1
    return [
        ArmSummary(
            arm=Arm(row["name"], row["changes"]),
            sign=sign,
            values=dict(row["values"]),
            failed=row["failed"],
            score=Interval(**row["score"]) if row["score"] else None,
            versus_base=Paired(**row["versus_base"]) if row["versus_base"] else None,
            p_corrected=row["p_corrected"],
            improvement=row["improvement"],
            **{cost: row[cost] for cost in COST_HEADINGS},
        )
        for row in tree["arms"]
    ]


def _told(path: str, value: Any) -> str:
    name = path.removeprefix("train.")
    if isinstance(value, Mapping) and "kind" in value:
        strength = value.get("strength")
        if strength is not None:
            return f"{value['kind']} {strength:g}"  # the kind's name says what it is a strength of
        return f"{name} {value['kind']}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _is_finished(run: Mapping[str, Any]) -> bool:
    return run["state"] == "COMPLETE" and run["value"] is not None


def _against(values: Mapping[int, float], base: Mapping[int, float]) -> Paired | None:
    seeds = [seed for seed in values if seed in base]
    if not seeds:
        return None
    return paired_difference([values[seed] for seed in seeds], [base[seed] for seed in seeds])


def _mean_of(cost: str, runs: Iterable[Mapping[str, Any]]) -> float | None:
    known = [float(run[cost]) for run in runs if run[cost] is not None]
    return fmean(known) if known else None
