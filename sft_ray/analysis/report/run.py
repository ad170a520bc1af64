"""A run as a report reads it: the folder's files as plain values, nothing computed yet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from sft_ray.analysis.outcome import PARTS, curve_of, role_of, slot_seconds_of
from sft_ray.analysis.results import SearchResult, check_row, reading
from sft_ray.config import COSTS, Experiment
from sft_ray.run_store import ENVIRONMENT, TRIAL, RunStore, open_run, read_experiment

STATES = {
    None: "It has not finished.",
    True: "It is running now.",
    False: "It stopped before its end; the same command goes on.",
}


@dataclass(frozen=True)
class Trial:
    """One trial, ended or running.

    Attributes:
        state: COMPLETE, PRUNED, FAIL or RUNNING.
        role: why it ran: sampled, default recipe, enqueued, single.
        train: the whole configuration; empty if it was not kept.
        curve: (percent of the schedule, score), by percent.
        train_seconds, eval_seconds, overhead_seconds: of one slot.
        ended_seconds: from the start of the first trial; None if no study says.
    """

    number: int
    state: str
    role: str
    reason: str | None
    params: dict[str, Any]
    train: dict[str, Any]
    value: float | None
    metrics: dict[str, float]
    curve: tuple[tuple[float, float], ...]
    schedule_percent: float
    restarts: int
    examples_per_second: float | None
    train_seconds: float
    eval_seconds: float
    overhead_seconds: float
    costs: dict[str, float | None]
    ended_seconds: float | None = None

    @property
    def slot_seconds(self) -> float:
        return slot_seconds_of(vars(self))

    @property
    def is_complete(self) -> bool:
        return self.state == "COMPLETE" and self.value is not None

    @classmethod
    def of_row(cls, row: dict[str, Any], ended_seconds: float | None = None) -> Self:
        """From a row of results.json or a trial.json."""
        return cls(
            number=row["number"],
            state=row["state"],
            role=row["role"],
            reason=row.get("reason"),
            params=row["params"],
            train=row.get("train") or {},
            value=row.get("value"),
            metrics=row["metrics"],
            curve=tuple((percent, score) for percent, score in row.get("curve", [])),
            schedule_percent=row.get("schedule_percent") or 0,
            restarts=row.get("restarts") or 0,
            examples_per_second=row.get("examples_per_second"),
            **{part: row.get(part) or 0.0 for part in PARTS},
            costs={name: row.get(name) for name in COSTS},
            ended_seconds=ended_seconds,
        )


@dataclass(frozen=True)
class Run:
    """Everything a report needs; files that only some reports show are read when asked for."""

    store: RunStore
    experiment: Experiment
    result: SearchResult

    @classmethod
    def load(cls, location: str) -> Self:
        """Open a run folder, finished or not.

        Raises:
            SftError: there is no run, or a file of it is damaged.
        """
        store, result = open_run(location), SearchResult.load(location)
        experiment = read_experiment(store)
        return cls(store, experiment, result)

    @property
    def metric(self) -> str:
        return self.result.tree.get("metric") or "score"

    @property
    def sign(self) -> int:
        """1 where a higher score is better, else -1."""
        return -1 if self.result.tree.get("direction") == "minimize" else 1

    @property
    def costs(self) -> list[str]:
        """The objectives beside the score, each to be kept small."""
        return list(self.experiment.search.costs)

    @property
    def is_search(self) -> bool:
        """Whether a search left the folder, and not a single training."""
        return self.study is not None or any(t.role != "single" for t in self.trials)

    @property
    def unfinished(self) -> str | None:
        """Why the run has no result yet; None if it has."""
        return None if self.result.is_finished else STATES[self.store.is_locked()]

    @property
    def best(self) -> dict[str, Any] | None:
        """`best` of results.json; None before the end."""
        return self.result.best if self.result.is_finished else None

    @property
    def environment(self) -> dict[str, Any]:
        found = self.result.tree.get("environment") or self.store.read_json(ENVIRONMENT)
        return found if isinstance(found, dict) else {}

    @property
    def workers(self) -> int:
        """Workers of one slot."""
        return int(self.environment.get("workers_per_trial") or 1)

    @cached_property
    def study(self) -> optuna.Study | None:
        """Of a search."""
        return self.result.study if self.store.read_journal() else None

    @cached_property
    def trials(self) -> list[Trial]:
        """All that have ended, and those that are running, by number."""
        with reading(self.store.path_of("trials")):
            frozen = [] if self.study is None else self.study.get_trials(deepcopy=False)
            ended = _ends(frozen)
            rows = [Trial.of_row(row, ended.get(row["number"])) for row in self.result.trials]
            known = {trial.number for trial in rows}
            rows += [
                _running(trial)
                for trial in frozen
                if trial.state == TrialState.RUNNING and trial.number not in known
            ]
        return sorted(rows, key=lambda trial: trial.number)

    @property
    def winner(self) -> Trial | None:
        """The trial that `best` names, or the best COMPLETE one so far."""
        if self.best is not None:
            number = self.best["trial"]
            return next((trial for trial in self.trials if trial.number == number), None)
        complete = [trial for trial in self.trials if trial.is_complete]
        return max(complete, key=lambda t: self.sign * (t.value or 0.0), default=None)

    def runs_below(self, folder: str) -> list[Trial]:
        """The further runs that a confirmation or ablations have left."""
        found = []
        for path in self.store.files_below(folder):
            if path.endswith(f"/{TRIAL}"):
                row = self.store.read_json(path)
                check_row(row, self.store.path_of(path))
                found.append(Trial.of_row(row))
        return found


def _ends(trials: list[FrozenTrial]) -> dict[int, float]:
    """Trial -> seconds from the start of the first one to its end; pauses count."""
    starts = [t.datetime_start for t in trials if t.datetime_start is not None]
    return {
        t.number: (t.datetime_complete - min(starts)).total_seconds()
        for t in trials
        if t.datetime_complete is not None and starts
    }


def _running(trial: FrozenTrial) -> Trial:
    curve = sorted(curve_of(trial).items())
    params, role = trial.user_attrs.get("params", {}), role_of(trial)
    row = {"number": trial.number, "state": "RUNNING", "role": role, "params": params}
    percent = curve[-1][0] if curve else 0
    return Trial.of_row({**row, "metrics": {}, "curve": curve, "schedule_percent": percent})
