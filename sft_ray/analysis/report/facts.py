"""What a report tells of the search itself, as plain values: no drawing, no words but names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_ray.analysis.importance import importances
from sft_ray.analysis.outcome import PARTS
from sft_ray.analysis.report.run import Run, Trial
from sft_ray.analysis.results import reading
from sft_ray.analysis.rows import pareto_rows
from sft_ray.recipes import YARDSTICK

BANDS = 5  # shades of the score, from worst to best
RARE = 1000  # characters of a reason that are worth showing


@dataclass(frozen=True)
class Outcome:
    """What came out, and how sure that is.

    Attributes:
        trial: of the winner; None where the default recipe won without having been a trial.
        search_value: what the search scored it at.
        gain: over the default recipe, positive if better; of means where there are any.
        gain_low, gain_high: its interval, over seeds.
        expected: mean, sd, low, high, n over fresh seeds; None before a confirmation.
        flattered: how much better the search's score was than that mean.
        test: `metrics` and `num_examples` of the test split, if it was scored for the winner.
        states: state -> trials.
    """

    trial: int | None
    is_complete: bool
    params: dict[str, Any]
    search_value: float | None
    validation: dict[str, float]
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    expected: dict[str, Any] | None
    flattered: float | None
    test: dict[str, Any] | None
    states: dict[str, int]


@dataclass(frozen=True)
class Step:
    """The end of one trial on the way of the search.

    Attributes:
        seconds: from the start of the first trial; None if no study says.
        worker_seconds: what all trials up to this one took, all workers of a slot counted.
        best: best score of the COMPLETE trials so far.
    """

    trial: int
    state: str
    value: float | None
    seconds: float | None
    worker_seconds: float
    best: float | None


@dataclass(frozen=True)
class Rung:
    """What happened at one rung: trials that came to it, and those that ended there."""

    percent: int
    reached: int
    stopped: int


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter and what every trial had there.

    Attributes:
        values: trial -> value; trials without the parameter are left out.
    """

    name: str
    values: dict[int, Any]

    @property
    def is_number(self) -> bool:
        return all(is_number(value) for value in self.values.values())


@dataclass(frozen=True)
class Importance:
    """A hyperparameter's share of the score's variance, and the trials it was judged among."""

    name: str
    share: float
    trials: int


@dataclass(frozen=True)
class Judged:
    """Importances by one measure: of final scores, or at the first rung."""

    trials: int
    is_reliable: bool
    parameters: list[Importance]


@dataclass(frozen=True)
class Cause:
    """Why trials ended before 100 % of their schedule."""

    state: str
    reason: str
    trials: list[int]


@dataclass(frozen=True)
class Spent:
    """Worker-seconds of one kind of run."""

    name: str
    runs: int
    train_seconds: float
    eval_seconds: float
    overhead_seconds: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.eval_seconds + self.overhead_seconds

    def dollars(self, price: float) -> float:
        """At so many dollars per worker and hour."""
        return self.seconds / 3600 * price


def outcome(run: Run) -> Outcome | None:
    """The winner of a finished run, or the best of an unfinished one; None without either."""
    best, trial = run.best, run.winner
    states = dict(Counter(t.state for t in run.trials))
    if best is None:
        if trial is None:
            return None
        return Outcome(
            trial=trial.number,
            is_complete=True,
            params=trial.params,
            search_value=trial.value,
            validation=trial.metrics,
            gain=_gain_so_far(run, trial),
            gain_low=None,
            gain_high=None,
            expected=None,
            flattered=None,
            test=None,
            states=states,
        )
    with reading(run.store.path_of("results.json")):
        interval = best.get("gain_interval") or {}
        return Outcome(
            trial=best["trial"],
            is_complete=best.get("complete", True),
            params=best["params"],
            search_value=trial.value if trial else None,
            validation=best["validation"],
            gain=best.get("gain_over_default"),
            gain_low=interval.get("low"),
            gain_high=interval.get("high"),
            expected=best.get("expected"),
            flattered=best.get("flattered"),
            test=best.get("test"),
            states=states,
        )


def progress(run: Run) -> list[Step]:
    """The trials in the order of their ends, or of their numbers where no study says."""
    ended = [trial for trial in run.trials if trial.state != "RUNNING"]
    if all(trial.ended_seconds is not None for trial in ended):
        ended.sort(key=lambda trial: (trial.ended_seconds or 0.0, trial.number))
    steps: list[Step] = []
    spent, best = 0.0, None
    for trial in ended:
        spent += trial.slot_seconds * run.workers
        if trial.is_complete and (
            best is None or run.sign * (trial.value or 0.0) > run.sign * best
        ):
            best = trial.value
        steps.append(Step(trial.number, trial.state, trial.value, trial.ended_seconds, spent, best))
    return steps


def rungs(run: Run) -> list[Rung]:
    """Of a search that prunes at them."""
    search = run.experiment.search
    if search.pruner == "none" or not run.is_search:
        return []
    return [
        Rung(
            percent,
            reached=sum(any(p >= percent for p, _ in trial.curve) for trial in run.trials),
            stopped=sum(trial.reason == f"rung {percent}" for trial in run.trials),
        )
        for percent in search.rungs
    ]


def parameters(trials: Sequence[Trial]) -> list[Parameter]:
    """The hyperparameters that differ between trials, or that only some have."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    found = []
    for name in names:
        values = {t.number: t.params[name] for t in trials if name in t.params}
        given = {number: value for number, value in values.items() if value is not None}
        if len(set(map(str, given.values()))) > 1 and all(map(is_number, given.values())):
            values = given  # null has no place on an axis of numbers
        values = {number: "null" if v is None else v for number, v in values.items()}
        if len(set(map(str, values.values()))) > 1:
            found.append(Parameter(name, values))
    return found


def bands(run: Run) -> dict[int, int]:
    """COMPLETE trial -> its fifth by score, from 0, the worst, to 4, the best."""
    complete = [trial for trial in run.trials if trial.is_complete]
    ordered = sorted(complete, key=lambda t: (run.sign * (t.value or 0.0), -t.number))
    few = len(ordered) < BANDS  # which spread from the worst to the best; a single one is the best
    return {
        trial.number: round((place + 1) / len(ordered) * BANDS) - 1
        if few
        else place * BANDS // len(ordered)
        for place, trial in enumerate(ordered)
    }


def importance(run: Run) -> dict[str, Judged]:
    """`finished` and `first_rung`; computed here for a search that has not ended."""
    tree = run.result.tree.get("importance")
    if tree is None and run.study is not None:
        ended = [t for t in run.study.get_trials(deepcopy=False) if t.state.is_finished()]
        tree = importances(ended, run.experiment.search.rungs)
    found = {}
    with reading(run.store.path_of("results.json")):
        for measure, judged in (tree or {}).items():
            shares = [
                Importance(name, entry["importance"], entry["trials"])
                for name, entry in judged["parameters"].items()
            ]
            found[measure] = Judged(judged["trials"], judged["reliable"], shares)
    return found


def pareto(run: Run) -> list[dict[str, Any]]:
    """`trial`, `score` and each cost of the trials that none beats in all of them."""
    if not run.costs:
        return []
    rows = run.result.tree.get("pareto")
    if rows is None and run.study is not None:
        trials = run.study.get_trials(deepcopy=False)
        members = {trial.number for trial in run.study.best_trials}
        rows = pareto_rows(trials, members, run.costs)
    with reading(run.store.path_of("results.json")):
        names = ("trial", "score", *run.costs)
        return [{name: row[name] for name in names} for row in rows or []]


def causes(run: Run) -> list[Cause]:
    """What ended trials early, the commonest first; faults before plain pruning."""
    found: dict[tuple[str, str], list[int]] = {}
    for trial in run.trials:
        if trial.state not in ("COMPLETE", "RUNNING"):
            reason = (trial.reason or "no reason was kept")[:RARE]
            found.setdefault((trial.state, reason), []).append(trial.number)
    listed = [Cause(state, reason, numbers) for (state, reason), numbers in found.items()]
    return sorted(listed, key=lambda cause: (cause.state != "FAIL", -len(cause.trials)))


def spending(run: Run) -> list[Spent]:
    """Worker-seconds of the search, its confirmation and its ablations."""
    kinds = {
        "search" if run.is_search else "training": run.trials,
        "confirmation": run.runs_below("confirm"),
        "ablations": run.runs_below("ablations/runs"),
    }
    return [
        Spent(
            name,
            len(trials),
            *(run.workers * sum(getattr(trial, part) for trial in trials) for part in PARTS),
        )
        for name, trials in kinds.items()
        if trials
    ]


def best_first(run: Run) -> list[Trial]:
    """COMPLETE trials by score, then the others by how far they got and their score there."""

    def rank(trial: Trial) -> tuple[bool, float, bool, float, int]:
        progress = 0 if trial.is_complete else -trial.schedule_percent
        score = -run.sign * (trial.value or 0.0)
        return not trial.is_complete, progress, trial.value is None, score, trial.number

    return sorted(run.trials, key=rank)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _gain_so_far(run: Run, best: Trial) -> float | None:
    for trial in run.trials:
        if trial.role == YARDSTICK and trial.is_complete:
            assert trial.value is not None  # complete
            assert best.value is not None
            return run.sign * (best.value - trial.value)
    return None
