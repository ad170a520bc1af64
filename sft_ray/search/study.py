"""The truth of a search: one persistent Optuna study.

Asks for configurations, reports marks, decides who goes on, and tells every trial its true state.
Knows nothing of Ray, so that a recorded search can be replayed through the same code.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from sft_ray import space as spaces
from sft_ray.analysis.outcome import Outcome
from sft_ray.config import Experiment, Train, apply_values
from sft_ray.search.pruners import build_pruner, prune_at
from sft_ray.search.samplers import build_sampler, grid_points
from sft_ray.space import Choice, Numeric
from sft_ray.training.seeds import derived_seed

STUDY_NAME = "search"
PRIOR_STRENGTH = 10  # n0: trials after which half of the draws come from the sampler
MAX_RESTARTS = 2
# Encoders below this size are fine-tuned at a higher learning rate.
SMALL_ENCODER_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class PlannedTrial:
    """One configuration to run.

    Attributes:
        save_above: the score a finished trial must beat to be among those kept on disk.
        save_unfinished: no trial has finished yet, so an unfinished one may have to stand in.
        is_yardstick: the default recipe, which is never ended early.
    """

    number: int
    train: Train
    params: dict[str, Any]
    save_above: float | None
    save_unfinished: bool
    is_yardstick: bool


class _HeldByTheRun(BaseJournalFileLock):
    """The run folder's own lock already keeps other drivers out."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def open_storage(journal: Path) -> BaseStorage:
    """The storage of a live study; the caller holds the run's lock."""
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=_HeldByTheRun()))


def default_recipe(num_parameters: int) -> dict[str, Any]:
    """The published recipe for encoders: the yardstick every search is measured against.

    Devlin et al. 2019 (2e-5, 3 epochs, batch 32, weight decay 0.01) with the warm-up of Liu et
    al. 2019 (0.06); small encoders use 1e-4, the upper end of Turc et al. 2019 rounded down.
    """
    return {
        "train.learning_rate": 1e-4 if num_parameters < SMALL_ENCODER_PARAMETERS else 2e-5,
        "train.epochs": 3,
        "train.batch_size": 32,
        "train.warmup": 0.06,
        "train.regularization": {"kind": "weight_decay", "strength": 0.01},
        "train.frozen_layers": 0,
    }


class SearchStudy:
    """A study and the rules of the search over it.

    Args:
        experiment: with its search space written out.
        storage: where the study lives; an existing study goes on.
        recipe: values of the default recipe by dotted path.
        direction: of the objective.
    """

    def __init__(
        self,
        experiment: Experiment,
        storage: BaseStorage,
        *,
        recipe: Mapping[str, Any],
        direction: Literal["maximize", "minimize"],
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = experiment.search
        self.experiment, self.recipe = experiment, dict(recipe)
        self.space = search.domains
        self.sign = 1 if direction == "maximize" else -1
        self.pruner = build_pruner(search)
        self.study = optuna.create_study(
            study_name=STUDY_NAME, storage=storage, direction=direction, load_if_exists=True
        )
        self._started = time.monotonic()
        self._wall_seconds_before = self.study.user_attrs.get("wall_seconds", 0.0)
        self._running_seconds: dict[int, float] = {}
        self._live: dict[int, optuna.Trial] = {}
        self.restarts: dict[int, int] = {}  # of slots that died under a trial, this session
        self._interrupted = [t.number for t in self.trials if t.state == TrialState.RUNNING]
        if not self.study.get_trials(deepcopy=False):
            self._enqueue_first_trials()

    @property
    def trials(self) -> list[FrozenTrial]:
        """Every trial that has started, by number."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state != TrialState.WAITING]

    def _enqueue_first_trials(self) -> None:
        if self.experiment.search.default_recipe:
            params, known = spaces.parameters(self.recipe), spaces.domains(self.space)
            inside = {n: v for n, v in params.items() if n in known and v in known[n]}
            self.study.enqueue_trial(inside, user_attrs={"role": "default recipe"})
        for values in self.experiment.search.enqueue:
            self.study.enqueue_trial(spaces.parameters(values), user_attrs={"role": "enqueued"})
        if self.experiment.search.sampler == "grid":
            for point in grid_points(self.space):
                self.study.enqueue_trial(point, user_attrs={"role": "grid"})

    def next_trial(self) -> PlannedTrial | None:
        """The next configuration: interrupted ones first, under their number; None at the end."""
        if self._interrupted:
            number = self._interrupted.pop(0)
            self.study.sampler = self._sampler(number)
            trial = optuna.Trial(self.study, self._frozen(number)._trial_id)
        else:
            asked = len(self.trials)
            if self._nothing_left() or self.budget_used_up() is not None:
                return None
            self.study.sampler = self._sampler(asked)
            self._maybe_enqueue_prior_draw(asked)
            trial = self.study.ask()
        self._live[trial.number] = trial
        values = self._values(trial)
        train = apply_values(self.experiment.train, values)
        params = spaces.parameters(values)
        trial.set_user_attr("params", params)
        trial.set_user_attr("train", train.model_dump(mode="json"))
        complete = sorted((self.sign * t.value for t in self._complete()), reverse=True)
        keep = self.experiment.checkpoint.keep
        return PlannedTrial(
            number=trial.number,
            train=train,
            params=params,
            save_above=self.sign * complete[keep - 1] if len(complete) >= keep else None,
            save_unfinished=not complete,
            is_yardstick=trial.user_attrs.get("role") == "default recipe",
        )

    def _values(self, trial: optuna.Trial) -> dict[str, Any]:
        if trial.user_attrs.get("role") != "default recipe":
            return spaces.draw(self.space, lambda name, domain: _suggest(trial, name, domain))
        known = spaces.domains(self.space)
        for name, value in spaces.parameters(self.recipe).items():
            if name in known and value in known[name]:
                _suggest(trial, name, known[name])
        return self.recipe

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        return build_sampler(self.experiment.search.sampler, self.experiment.seed, number)

    def _maybe_enqueue_prior_draw(self, number: int) -> None:
        """With the share n0 / (n0 + n) of all draws, take the priors' word where there are some."""
        priors = {
            name: domain
            for name, domain in spaces.domains(self.space).items()
            if isinstance(domain, Numeric) and domain.prior is not None
        }
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        rng = np.random.default_rng(derived_seed(self.experiment.seed, "prior", number))
        if waiting or not priors or rng.random() >= PRIOR_STRENGTH / (PRIOR_STRENGTH + number):
            return
        self.study.enqueue_trial({n: _draw_prior(domain, rng) for n, domain in priors.items()})

    def mark(self, number: int, percent: int, score: float, slot_seconds: float) -> str | None:
        """Report one evaluation; why the trial must end now, or None."""
        trial = self._live[number]
        if percent not in self._frozen(number).intermediate_values:
            trial.report(score, percent)
        self._running_seconds[number] = slot_seconds
        if percent >= 100:
            return None
        if budget := self.budget_used_up():
            return f"budget: {budget}"
        search = self.experiment.search
        if percent not in search.rungs or trial.user_attrs.get("role") == "default recipe":
            return None
        if prune_at(self.pruner, self.study, self._frozen(number), percent):
            return f"rung {percent}"
        return None

    def finish(self, number: int, state: TrialState, outcome: Outcome) -> None:
        """Tell the true end of a trial."""
        trial = self._live.pop(number)
        self._running_seconds.pop(number, None)
        if outcome.fault:  # teaches TPE to stay away; a FAIL teaches it nothing
            trial.set_constraint("fault", 1.0)
        trial.set_user_attr("outcome", outcome.to_tree())
        self.study.set_user_attr("wall_seconds", self.wall_seconds())
        value = outcome.score if state == TrialState.COMPLETE else None
        self.study.tell(number, value, state=state)

    def restart(self, number: int) -> bool:
        """Put a trial that lost its slot back in line; False once it has been too often."""
        if self.restarts.get(number, 0) >= MAX_RESTARTS:
            return False
        self.restarts[number] = self.restarts.get(number, 0) + 1
        del self._live[number]
        self._running_seconds.pop(number, None)
        self._interrupted.append(number)
        return True

    def budget_used_up(self) -> str | None:
        """Which limit has been reached, in words."""
        budget = self.experiment.search.budget
        if budget.wall_minutes is not None and self.wall_seconds() >= 60 * budget.wall_minutes:
            return f"wall time of {budget.wall_minutes:g} minutes"
        if budget.worker_hours is not None and self.worker_hours() >= budget.worker_hours:
            return f"{budget.worker_hours:g} worker hours"
        if budget.target is not None:
            best = self.best_score()
            if best is not None and self.sign * best >= self.sign * budget.target:
                return f"target {budget.target:g} reached"
        if budget.patience is not None and self._trials_since_best() >= budget.patience:
            return f"no better trial among the last {budget.patience}"
        return None

    def _trials_since_best(self) -> int:
        """Trials that have ended since the best one did."""
        complete = self._complete()
        if not complete:
            return 0
        best = max(complete, key=lambda t: (self.sign * t.value, -t.number))
        ended = [t.datetime_complete for t in self.trials if t.state.is_finished()]
        return sum(at > best.datetime_complete for at in ended if at is not None)

    def _nothing_left(self) -> bool:
        """As many trials as wanted have started, or all points of a grid have."""
        if len(self.trials) >= self.experiment.search.trials:
            return True
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return self.experiment.search.sampler == "grid" and not waiting

    def wall_seconds(self) -> float:
        """Of all sessions of this search."""
        return float(self._wall_seconds_before + time.monotonic() - self._started)

    def worker_hours(self) -> float:
        """Slot time of all trials, running ones included, times the workers of a slot."""
        finished = sum(Outcome.of(t).slot_seconds for t in self.trials if t.state.is_finished())
        workers = self.experiment.resources.workers_per_trial
        return (finished + sum(self._running_seconds.values())) * workers / 3600

    def is_over(self) -> bool:
        """Nothing is running, nothing is left to run."""
        if self._live or self._interrupted:
            return False
        if self.budget_used_up() is not None:
            return True
        return self._nothing_left()

    def kept(self) -> set[int]:
        """Numbers of the trials whose model folders stay on disk."""
        ranked = sorted(self._complete(), key=lambda t: (-self.sign * t.value, t.number))
        if not ranked:
            return {t.number for t in self.trials}
        return {t.number for t in ranked[: self.experiment.checkpoint.keep]} | set(self._live)

    def best_score(self) -> float | None:
        """The best value of the COMPLETE trials."""
        values = [t.value for t in self._complete()]
        return max(values, key=lambda value: self.sign * value, default=None)

    def _complete(self) -> list[Any]:
        return [t for t in self.trials if t.state == TrialState.COMPLETE]

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def _suggest(trial: optuna.Trial, name: str, domain: Numeric | Choice) -> Any:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, domain.options)
    if domain.integer:
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log)


def _draw_prior(domain: Numeric, rng: np.random.Generator) -> float | int:
    """A normal draw around the prior's center (log-normal on a log scale), within the range."""
    assert domain.prior is not None  # the caller chose domains with priors
    center, spread = domain.prior.center, domain.prior.spread
    while True:
        z = rng.standard_normal()
        value = center * spread**z if domain.log else center + spread * z
        value = round(value) if domain.integer else float(value)
        if value in domain:
            return value
