"""The rows of results.json: every trial, the best one and the Pareto set, from the study."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sft_ray.analysis.outcome import FIGURES, Outcome, curve_of, is_yardstick, role_of, score_of
from sft_ray.recipes import YARDSTICK


def trial_row(
    *,
    number: int,
    state: str,
    role: str,
    params: dict[str, Any],
    train: dict[str, Any],
    outcome: Outcome,
    curve: Mapping[int, float],
    seed: int,
) -> dict[str, Any]:
    """One trial as results.json and trial.json hold it.

    Args:
        role: why it ran: sampled, default recipe, enqueued, single.
        train: the whole configuration.
        curve: percent of the schedule -> objective.
    """
    return {
        "number": number,
        "state": state,
        "role": role,
        "reason": outcome.reason,
        "params": params,
        "train": train,
        "value": outcome.score,
        "metrics": outcome.metrics,
        "seed": seed,
        "restarts": outcome.restarts,
        "schedule_percent": outcome.schedule_percent,
        "epochs_run": round(outcome.epochs_run, 4),
        "curve": [[percent, value] for percent, value in sorted(curve.items())],
        "examples_per_second": outcome.examples_per_second,
        **{name: getattr(outcome, name) for name in FIGURES},
        "padding_share": round(outcome.padding_share, 4),  # in its place among these
    }


def row_of(trial: FrozenTrial, seed: int) -> dict[str, Any]:
    """The row of a trial of a study."""
    return trial_row(
        number=trial.number,
        state=trial.state.name,
        role=role_of(trial),
        params=trial.user_attrs["params"],
        train=trial.user_attrs["train"],
        outcome=Outcome.of(trial),
        curve=curve_of(trial),
        seed=seed,
    )


def ranking(trials: Sequence[FrozenTrial], sign: int) -> list[FrozenTrial]:
    """Trials whose weights were kept: COMPLETE ones from the best, then those furthest along."""

    def rank(trial: FrozenTrial) -> tuple[bool, int, float, int]:
        outcome = Outcome.of(trial)
        complete = trial.state == TrialState.COMPLETE
        assert outcome.score is not None  # a checkpoint has a score
        progress = 0 if complete else outcome.schedule_percent
        return complete, progress, sign * outcome.score, -trial.number

    candidates = [
        trial
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        and Outcome.of(trial).has_checkpoint
    ]
    return sorted(candidates, key=rank, reverse=True)


def why_no_gain(rows: Sequence[Mapping[str, Any]]) -> str:
    """What became of the default recipe that nothing can be measured against."""
    was_run = any(row["role"] == YARDSTICK for row in rows)
    return "which did not finish" if was_run else "which was not run"


def gain_over_default(trials: Sequence[FrozenTrial], best: FrozenTrial, sign: int) -> float | None:
    """How much better the winner is than the default recipe; None if that did not finish."""
    for trial in trials:
        is_default = is_yardstick(trial)
        if is_default and trial.state == TrialState.COMPLETE and best.state == TrialState.COMPLETE:
            return sign * (score_of(best) - score_of(trial))
    return None


def pareto_rows(
    trials: Sequence[FrozenTrial], members: Collection[int], costs: Sequence[str]
) -> list[dict[str, Any]]:
    """The trials that none beats in every objective, dearest first: score, costs, model folder."""
    rows = []
    for trial in trials:
        if trial.number in members:
            values = dict(zip(["score", *costs], trial.values, strict=True))
            rows.append({"trial": trial.number, **values, "path": trial.user_attrs["path"]})
    return sorted(rows, key=lambda row: -row[costs[0]] if costs else 0)


def best_row(row: dict[str, Any], gain: float | None, checkpoint: str) -> dict[str, Any]:
    """The `best` entry of results.json, from the winner's row."""
    return {
        "trial": row["number"],
        "complete": row["state"] == TrialState.COMPLETE.name,
        "params": row["params"],
        "train": row["train"],
        "validation": row["metrics"],
        "gain_over_default": gain,
        "checkpoint": checkpoint,
    }
