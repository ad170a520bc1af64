"""The truth of a search: one persistent Optuna study.

Asks for configurations, reports marks, decides who goes on, and tells every trial its true state.
Knows nothing of Ray, so that a recorded search can be replayed through the same code.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from sft_ray import space as spaces
from sft_ray.analysis.outcome import Outcome, is_yardstick, score_of
from sft_ray.analysis.rows import ranking, row_of
from sft_ray.config import Experiment, apply_values
from sft_ray.folder_rule import BUDGET, ENQUEUED, SPACE, TRIALS
from sft_ray.run_store import trial_folder
from sft_ray.screen import short_params
from sft_ray.search.board import Board, EndedTrial
from sft_ray.search.finite_space import FiniteSpace, keys_of_trained
from sft_ray.search.proposals import first_trials, propose, suggest
from sft_ray.search.pruners import build_pruner, prune_at
from sft_ray.search.samplers import build_sampler
from sft_ray.search.trials import PlannedTrial

STUDY_NAME = "search"
GRACE = 0.05  # of a search's wall time: what running trials have for their next marks at its end


class _HeldByTheRun(BaseJournalFileLock):
    """The run folder's own lock already keeps other drivers out."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class _JournalFile(JournalFileBackend):
    """Optuna's journal, whose records are on the platter when `Journal.push` says so.

    Optuna waits for the disk at every attribute, thirty times for a trial.  What a process has
    handed to the system outlives it.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal), lock_obj=_HeldByTheRun())
        self._journal = journal

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._journal.open("ab") as file:
            file.write("".join(f"{json.dumps(log)}\n" for log in logs).encode())


def open_storage(journal: Path) -> BaseStorage:
    """The storage of a live study; the caller holds the run's lock."""
    return JournalStorage(_JournalFile(journal))


@dataclass
class _Live:
    """A trial that is under way.

    Attributes:
        settled: marks that were decided on before it was interrupted.
        curve: percent of the schedule -> score, of this session.
        slot_seconds: that it has taken so far.
    """

    trial: optuna.Trial
    settled: frozenset[int]
    curve: dict[int, float] = field(default_factory=dict)
    slot_seconds: float = 0.0


class SearchStudy:
    """A study and the rules of the search over it.

    Args:
        experiment: with its search space written out.
        storage: where the study lives; an existing study goes on.
        recipe: values of the default recipe by dotted path.
        num_layers: of the model.
        direction: of the objective.
        slots: trials that run at a time.
        warm: flat parameters to begin with, from other runs.
    """

    def __init__(
        self,
        experiment: Experiment,
        storage: BaseStorage,
        *,
        recipe: Mapping[str, Any],
        num_layers: int,
        direction: Literal["maximize", "minimize"],
        slots: int = 1,
        warm: Sequence[dict[str, Any]] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = experiment.search
        self.experiment, self.recipe, self.costs = experiment, dict(recipe), tuple(search.costs)
        self.space, self.slots, self.num_layers = search.domains, slots, num_layers
        self.finite = FiniteSpace.of(search, experiment.train)
        self.sign = 1 if direction == "maximize" else -1
        self.pruner = build_pruner(search)
        self.study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=storage,
            directions=[direction] + ["minimize"] * len(self.costs),
            load_if_exists=True,
        )
        self._started = time.monotonic()
        self._wall_seconds_before = self.study.user_attrs.get("wall_seconds", 0.0)
        self._reached_at: float | None = None  # in wall seconds, a limit, as far as was seen
        self._overdue: tuple[str, str] | None = None  # for good: running trials are told to pause
        self._live: dict[int, _Live] = {}
        self._interrupted = [t.number for t in self.trials if t.state == TrialState.RUNNING]
        # Trials that a lost head had begun behind the last copy of the journal: they get the same
        # numbers again, mostly with the same configurations.
        self.left_behind: frozenset[int] = frozenset()
        # Ended trials without a model: their scores keep no other one from being kept.
        self.without_model: frozenset[int] = frozenset()
        self._line_up(list(warm))

    def _line_up(self, warm: list[dict[str, Any]]) -> None:
        """Put in line what runs first, and later what has been added to `search.enqueue` since."""
        experiment, trained = self.experiment, frozenset[str]()
        asked = experiment.search.enqueue
        if self.study.get_trials(deepcopy=False):
            before = self.study.user_attrs.get(ENQUEUED, len(asked))
            if before >= len(asked):
                return
            later = {"enqueue": asked[before:], "default_recipe": False}
            search = experiment.search.model_copy(update=later)
            experiment = experiment.model_copy(update={"search": search})
            trained, warm = keys_of_trained(self.trials), []
        for params, role in first_trials(experiment, self.finite, self.recipe, warm, trained):
            self.study.enqueue_trial(params, user_attrs={"role": role})
        self.study.set_user_attr(ENQUEUED, len(asked))

    @property
    def trials(self) -> list[FrozenTrial]:
        """Every trial that has started, by number."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state != TrialState.WAITING]

    def next_trial(self) -> PlannedTrial | None:
        """The next configuration: interrupted ones first, under their number; None at the end."""
        resumes = bool(self._interrupted)
        if resumes:
            number = self._interrupted.pop(0)
            self.study.sampler = self._sampler(number)
            trial = optuna.Trial(self.study, self._frozen(number)._trial_id)
            if trial.constraints:  # a kill came before its end was told, which may be another now
                self._mark_fault(trial, 0.0)
        else:
            asked = len(self.trials)
            if self.ended_by() is not None:
                return None
            self.study.sampler = self._sampler(asked)
            self._propose(asked)
            trial = self.study.ask()
            if isinstance(self.study.sampler, optuna.samplers.NSGAIISampler):
                # Whose every value was proposed, it has not asked for its generation.
                self.study.sampler.get_trial_generation(self.study, self._frozen(trial.number))
        settled = frozenset(self._frozen(trial.number).intermediate_values)
        self._live[trial.number] = _Live(trial, settled)
        values = self._values(trial)
        train = apply_values(self.experiment.train, values)
        params = spaces.parameters(values)
        trial.set_user_attr("params", params)
        trial.set_user_attr("train", train.model_dump(mode="json"))
        trial.set_user_attr("path", trial_folder(trial.number))
        finished = self._ranked()
        ranked = [t for t in finished if t.number not in self.without_model]
        # With several objectives a low score may belong to the Pareto set.
        keep = len(ranked) + 1 if self.costs else self.experiment.checkpoint.keep
        return PlannedTrial(
            number=trial.number,
            label=f"trial {trial.number}",
            said=short_params(params),
            folder=trial_folder(trial.number),
            train=train,
            params=params,
            seed=self.experiment.seed,
            save_above=self.sign * score_of(ranked[keep - 1]) if len(ranked) >= keep else None,
            save_unfinished=not finished,
            end_diverged=not is_yardstick(trial),
            resumes=resumes or trial.number in self.left_behind,
        )

    def _values(self, trial: optuna.Trial) -> dict[str, Any]:
        if not is_yardstick(trial):
            return spaces.draw(self.space, lambda name, domain: suggest(trial, name, domain))
        known = spaces.domains(self.space)
        for name, value in spaces.parameters(self.recipe).items():
            if name in known and value in known[name]:
                suggest(trial, name, known[name])
        return self.recipe

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        return build_sampler(self.experiment.search, self.experiment.seed, number)

    def _propose(self, number: int) -> None:
        """Put a configuration in line that the sampler would not draw by itself, if one is due."""
        if self._waiting():
            return
        proposed = propose(self.study, self.experiment, self.finite, number, self.num_layers)
        if proposed:
            role = {"role": "grid"} if self.experiment.search.sampler == "grid" else None
            self.study.enqueue_trial(proposed, user_attrs=role)

    def _waiting(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def mark(self, number: int, percent: int, score: float, slot_seconds: float) -> str | None:
        """Report one evaluation; why the trial must end now, or None."""
        live = self._live[number]
        live.curve.setdefault(percent, score)
        live.slot_seconds = slot_seconds
        is_settled = percent in live.settled
        if not (is_settled or self.costs):  # of several objectives Optuna takes only the last
            live.trial.report(score, percent)
        if percent >= 100:
            return None
        if budget := self.budget_used_up():
            return f"budget: {budget}"
        search, stopped = self.experiment.search, self._frozen(number).user_attrs.get("stopped")
        if stopped is not None and percent >= stopped:  # a kill came before its end was told
            return f"rung {stopped}"
        if is_settled or self.costs or percent not in search.rungs or is_yardstick(live.trial):
            return None
        if prune_at(self.pruner, self.study, self._frozen(number), percent):
            live.trial.set_user_attr("stopped", percent)
            return f"rung {percent}"
        return None

    def finish(self, number: int, state: TrialState, outcome: Outcome) -> None:
        """Tell the true end of a trial."""
        live = self._live.pop(number)
        if outcome.fault:  # teaches TPE to stay away; a FAIL teaches it nothing
            self._mark_fault(live.trial, 1.0)
        for name, value in outcome.to_attributes().items():
            live.trial.set_user_attr(name, value)
        # Clocks go back now and then.
        live.trial.set_user_attr("ended_as", sum(t.state.is_finished() for t in self.trials))
        if self.costs:
            live.trial.set_user_attr("curve", sorted(live.curve.items()))
        self.note_wall_seconds()
        values = None
        if state == TrialState.COMPLETE:
            assert outcome.score is not None  # a finished trial was evaluated
            values = [outcome.score, *(float(getattr(outcome, cost)) for cost in self.costs)]
        self.study.tell(number, values, state=state)

    def _mark_fault(self, trial: optuna.Trial, value: float) -> None:
        """`set_constraint`, which does not change a value that is there; above 0 it is violated."""
        self.study._storage.set_trial_system_attr(trial._trial_id, "constraints:fault", value)

    def set_slots(self, slots: int) -> None:
        """There is room for more, or for fewer."""
        self.slots = slots

    def put_back(self, number: int) -> None:
        """Take back a trial that has not ended; it is next in line."""
        del self._live[number]
        self._interrupted.append(number)
        self.note_wall_seconds()

    def budget_used_up(self) -> str | None:
        """Which limit has been reached, in words."""
        reached = self._limit_reached()
        return None if reached is None else reached[1]

    def overdue(self) -> str | None:
        """Which limit was reached so long ago that running trials are not waited for.

        Until a trial has finished they are, because any may have to be the winner.  Patience has
        no such end: who is running may still be better.
        """
        reached = self._limit_reached()
        if reached is None or reached[0] == "patience" or self.best_score() is None:
            self._reached_at = None  # a reserve that shrinks leaves time again
            return None
        now = self.wall_seconds()
        self._reached_at = self._reached_at or now
        if now > (1 + GRACE) * self._reached_at:
            self._overdue = reached
        return None if self._overdue is None else reached[1]

    def ended_by(self) -> tuple[str, str] | None:
        """What no other trial starts for: its key in the experiment, and in words."""
        if self._is_space_used_up():  # first: no budget or number of trials that grows would help
            return SPACE, f"all of its {len(self.trials)} configurations have run"
        if (reached := self._limit_reached()) is not None:
            return f"{BUDGET}{reached[0]}", reached[1]
        if len(self.trials) >= self.experiment.search.trials:
            return TRIALS, f"all of {len(self.trials)} trials have run"
        return None

    def _limit_reached(self) -> tuple[str, str] | None:
        """The budget that is used up: its name, and in words."""
        if self._overdue is not None:
            return self._overdue
        budget, reserve = self.experiment.search.budget, self.reserved_seconds()
        if budget.wall_minutes is not None:
            limit = 60 * budget.wall_minutes
            if self.wall_seconds() >= limit - min(reserve / self.slots, limit / 2):
                return "wall_minutes", f"wall time of {budget.wall_minutes:g} minutes"
        if budget.worker_hours is not None:
            limit = budget.worker_hours
            workers = self.experiment.resources.workers_per_trial
            if self.worker_hours() >= limit - min(reserve * workers / 3600, limit / 2):
                return "worker_hours", f"{budget.worker_hours:g} worker hours"
        if budget.target is not None:
            best = self.best_score()
            if best is not None and self.sign * best >= self.sign * budget.target:
                return "target", f"target {budget.target:g} reached"
        if budget.patience is not None and self._trials_since_best() >= budget.patience:
            better = "trial of the Pareto set" if self.costs else "better trial"
            return "patience", f"no {better} among the last {budget.patience}"
        return None

    def reserved_seconds(self) -> float:
        """Slot time that the confirmation will want, judged by the trials that have finished.

        At most half of a budget is kept for it.
        """
        confirm, complete = self.experiment.confirm, self._ranked()
        if confirm is None or not complete:
            return 0.0
        mean = sum(Outcome.of(trial).slot_seconds for trial in complete) / len(complete)
        return (confirm.top + 1) * confirm.seeds * mean

    def _trials_since_best(self) -> int:
        """Trials that have ended since the best one did, or the last of the Pareto set."""
        best = self.study.best_trials if self.costs else self._ranked()[:1]
        if not best:
            return 0
        last = max(_ended_as(trial) for trial in best)
        return sum(t.state.is_finished() and _ended_as(t) > last for t in self.trials)

    def _is_space_used_up(self) -> bool:
        """Every point of a finite space has started, and what was first in line."""
        if self._waiting() or self.finite is None:
            return False
        return not self.finite.untried(keys_of_trained(self.trials))

    def wall_seconds(self) -> float:
        """Of all sessions of this search."""
        return float(self._wall_seconds_before + time.monotonic() - self._started)

    def note_wall_seconds(self) -> None:
        """For the next session; what a kill cuts off behind the last note is not counted."""
        self.study.set_user_attr("wall_seconds", self.wall_seconds())

    def worker_hours(self) -> float:
        """Slot time of all trials, running ones included, times the workers of a slot."""
        finished = sum(Outcome.of(t).slot_seconds for t in self.trials if t.state.is_finished())
        workers = self.experiment.resources.workers_per_trial
        return (finished + sum(t.slot_seconds for t in self._live.values())) * workers / 3600

    def is_over(self) -> bool:
        """Nothing is running, nothing is left to run."""
        return not (self._live or self._interrupted) and self.ended_by() is not None

    def open_board(self, objective: str, slots: int) -> Board:
        """What a live view shows at first: what is planned, and what has ended before."""
        search, workers = self.experiment.search, self.experiment.resources.workers_per_trial
        minutes, hours = search.budget.wall_minutes, search.budget.worker_hours
        there = (
            math.inf
            if self.finite is None
            else len(self.finite.untried(keys_of_trained(self.trials)))
        )
        board = Board(
            objective,
            int(min(search.trials, len(self.trials) + there)),
            slots,
            sign=self.sign,
            wall_seconds=None if minutes is None else 60 * minutes - self.wall_seconds(),
            slot_seconds=None if hours is None else 3600 * (hours - self.worker_hours()) / workers,
        )
        for trial in self.trials:
            if trial.state.is_finished():
                outcome, said = Outcome.of(trial), short_params(trial.user_attrs["params"])
                board.add(
                    EndedTrial(
                        trial.number,
                        f"trial {trial.number}",
                        trial.state.name,
                        outcome.score,
                        None,
                        outcome.slot_seconds,
                        said,
                    )
                )
        return board

    def row(self, number: int) -> dict[str, Any]:
        """A trial as results.json and trial.json hold it."""
        return row_of(self._frozen(number), self.experiment.seed)

    def improves(self, score: float) -> bool:
        """Whether a finished trial of this score would be the best so far."""
        best = self.best_score()
        return best is None or self.sign * score > self.sign * best

    def outdated(self) -> list[str]:
        """Folders of trials whose models are not to be kept."""
        kept = self.kept()
        return [trial_folder(t.number) for t in self.trials if t.number not in kept]

    def kept(self) -> set[int]:
        """Numbers of the trials whose model folders stay on disk."""
        ranked = self._ranked() or ranking(self.trials, self.sign)
        there = [t.number for t in ranked if t.number not in self.without_model]
        kept = set(there[: self.experiment.checkpoint.keep])
        return kept | self.pareto_set() | set(self._live) | set(self._interrupted)

    def pareto_set(self) -> set[int]:
        """Numbers of the COMPLETE trials that no other beats in every objective; one objective
        has none."""
        return {t.number for t in self.study.best_trials} if self.costs else set()

    def best_score(self) -> float | None:
        """The best score of the COMPLETE trials."""
        ranked = self._ranked()
        return score_of(ranked[0]) if ranked else None

    def _ranked(self) -> list[Any]:
        """The COMPLETE trials, the best first; of equal ones, the one that began first."""
        complete = [t for t in self.trials if t.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda t: (-self.sign * score_of(t), t.number))

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def _ended_as(trial: FrozenTrial) -> int:
    """How many trials had ended before this one did; runs that did not keep it say its number."""
    return int(trial.user_attrs.get("ended_as", trial.number))
