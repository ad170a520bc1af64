"""results.json: what a search returns and prints, computed from the study."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sft_ray.analysis.outcome import Outcome, curve_of, score_of
from sft_ray.recipes import YARDSTICK


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search; `tree` is results.json."""

    location: str
    tree: dict[str, Any]

    @property
    def best(self) -> dict[str, Any]:
        """The winner: trial, params, validation, gain_over_default, checkpoint."""
        best: dict[str, Any] = self.tree["best"]
        return best

    @property
    def trials(self) -> list[dict[str, Any]]:
        """One row per trial, by number."""
        trials: list[dict[str, Any]] = self.tree["trials"]
        return trials

    @property
    def checkpoint(self) -> Path:
        """Folder of the winner, for `from_pretrained`; a URI on object stores."""
        return Path(self.best["checkpoint"])


def trial_row(
    *,
    number: int,
    state: str,
    role: str,
    params: dict[str, Any],
    outcome: Outcome,
    curve: Mapping[int, float],
    seed: int,
) -> dict[str, Any]:
    """One trial as results.json and trial.json hold it.

    Args:
        role: why it ran: sampled, default recipe, enqueued, single.
        curve: percent of the schedule -> objective.
    """
    return {
        "number": number,
        "state": state,
        "role": role,
        "reason": outcome.reason,
        "params": params,
        "value": outcome.score,
        "metrics": outcome.metrics,
        "seed": seed,
        "restarts": outcome.restarts,
        "schedule_percent": outcome.schedule_percent,
        "epochs_run": round(outcome.epochs_run, 4),
        "curve": [[percent, value] for percent, value in sorted(curve.items())],
        "examples_per_second": outcome.examples_per_second,
        "micro_batch": outcome.micro_batch,
        "trained_parameters": outcome.trained_parameters,
        "memory_bytes": outcome.memory_bytes,
        "train_seconds": outcome.train_seconds,
        "eval_seconds": outcome.eval_seconds,
        "overhead_seconds": outcome.overhead_seconds,
    }


def row_of(trial: FrozenTrial, seed: int) -> dict[str, Any]:
    """The row of a trial of a study."""
    return trial_row(
        number=trial.number,
        state=trial.state.name,
        role=trial.user_attrs.get("role", "sampled"),
        params=trial.user_attrs["params"],
        outcome=Outcome.of(trial),
        curve=curve_of(trial),
        seed=seed,
    )


def winner(trials: Sequence[FrozenTrial], sign: int) -> FrozenTrial | None:
    """The best COMPLETE trial; with none, the one furthest along whose weights were kept."""

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
    return max(candidates, key=rank, default=None)


def gain_over_default(trials: Sequence[FrozenTrial], best: FrozenTrial, sign: int) -> float | None:
    """How much better the winner is than the default recipe; None if that did not finish."""
    for trial in trials:
        is_default = trial.user_attrs.get("role") == YARDSTICK
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
        "validation": row["metrics"],
        "gain_over_default": gain,
        "checkpoint": checkpoint,
    }
