"""Where configurations come from besides the sampler: what runs first, priors, untried points.

Every function answers with flat parameters, which the study enqueues.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sft_ray import space as spaces
from sft_ray.analysis.outcome import is_yardstick
from sft_ray.config import Experiment, Search, Train, apply_values
from sft_ray.recipes import YARDSTICK
from sft_ray.search.finite_space import (
    FiniteSpace,
    key_of,
    key_of_point,
    keys_of_trained,
    num_points,
)
from sft_ray.search.samplers import build_sampler
from sft_ray.space import FROZEN_LAYERS, Choice, Numeric, Prior, Space
from sft_ray.training.seeds import derived_seed

PRIOR_STRENGTH = 10  # n0: known trials after which half of the draws come from the sampler
# Draws to find a point that was not tried.  One of gp fits a model.
ATTEMPTS = {"tpe": 20, "nsga2": 20, "random": 20, "qmc": 20, "gp": 2}
BLIND_ATTEMPTS = 1000
SAMPLERS_THAT_LOOK = ("tpe", "gp", "nsga2")  # at the trials before


def first_trials(
    experiment: Experiment,
    finite: FiniteSpace | None,
    recipe: Mapping[str, Any],
    warm: list[dict[str, Any]],
    trained: frozenset[str] = frozenset(),
) -> Iterator[tuple[dict[str, Any], str]]:
    """What runs before the sampler is asked: parameters, and the role they have.

    Args:
        finite: the space, if it is one.
        recipe: values of the default recipe by dotted path.
        warm: flat parameters that did well in other runs.
        trained: keys of configurations that ran before.
    """
    search, train, space = experiment.search, experiment.train, experiment.search.domains
    known = spaces.domains(space)
    params = spaces.parameters(recipe)
    yardstick = {n: v for n, v in params.items() if n in known and v in known[n]}
    first = []
    if search.default_recipe:
        first.append(yardstick)
        yield yardstick, YARDSTICK
    asked = [spaces.parameters(values) for values in search.enqueue]
    asked = [{n: v for n, v in params.items() if n in known} for params in asked]  # no constants
    done = {*trained, *(key_of_point(space, train, params) for params in asked)}
    if search.default_recipe:
        done.add(key_of(apply_values(train, dict(recipe)).model_dump()))
    rng = np.random.default_rng(derived_seed(experiment.seed, "completed"))

    def completed(params: dict[str, Any]) -> dict[str, Any]:
        """A point that is not in line yet, in a finite space; empty if there is none."""
        if finite is None:
            return params
        points = [
            point
            for key, point in finite.points.items()
            if key not in done and params.items() <= point.items()
        ]
        point = points[int(rng.integers(len(points)))] if points else {}
        done.add(finite.key_of(point))
        return point

    for params in asked:  # what leaves nothing open runs twice, if the user says so
        if finite is not None and key_of_point(space, train, params) is None:
            params = completed(params)
            if not params:
                continue
        first.append(params)
        yield params, "enqueued"
    for params in warm:
        params = completed(params)
        if params and params not in first:
            first.append(params)
            yield params, "warm start"


def prior_draw(
    space: Space, seed: int, number: int, known: int, train: Train, num_layers: int
) -> dict[str, Any]:
    """With the share n0 / (n0 + n) of all draws, the priors' word where there are some.

    The other parameters are left to the sampler; empty where it has all the say.

    Args:
        number: of the trial that it is for.
        known: n, trials that have shown something.
        train: what is not searched.
        num_layers: of the model.
    """
    priors = {
        name: (domain, domain.prior)
        for name, domain in spaces.domains(space).items()
        if isinstance(domain, Numeric) and domain.prior is not None
    }
    rng = np.random.default_rng(derived_seed(seed, "prior", number))
    if rng.random() >= PRIOR_STRENGTH / (PRIOR_STRENGTH + known):
        return {}
    drawn: dict[str, Any] = {}
    frozen_share = 0.0
    if any(prior.frozen_factor != 1 for _, prior in priors.values()):
        depth = space.get(FROZEN_LAYERS, train.frozen_layers)
        if isinstance(depth, Numeric):
            depth = drawn[FROZEN_LAYERS] = (
                int(rng.integers(int(depth.low), int(depth.high) + 1))
                if depth.prior is None
                else _draw_prior(depth, depth.prior, 0.0, rng)
            )
        elif isinstance(depth, Choice):
            depth = drawn[FROZEN_LAYERS] = depth.options[int(rng.integers(len(depth.options)))]
        frozen_share = 1.0 if depth == "all" else depth / num_layers
    for name, (domain, prior) in priors.items():
        if name not in drawn:
            drawn[name] = _draw_prior(domain, prior, frozen_share, rng)
    return drawn


def _draw_prior(
    domain: Numeric, prior: Prior, frozen_share: float, rng: np.random.Generator
) -> float | int:
    """A normal draw around the prior's center (log-normal on a log scale), within the range.

    Args:
        frozen_share: of the model's layers.
    """
    if domain.low == domain.high:  # never hit by chance
        return domain.low
    center = prior.center * prior.frozen_factor**frozen_share
    center = min(max(center, domain.low), domain.high)
    while True:
        z = rng.standard_normal()
        value = center * prior.spread**z if domain.log else center + prior.spread * z
        value = round(value) if domain.integer else float(value)
        if value in domain:
            return value


def propose(
    study: optuna.Study,
    experiment: Experiment,
    finite: FiniteSpace | None,
    number: int,
    num_layers: int,
) -> dict[str, Any]:
    """What the sampler would not draw by itself; empty where it has all the say.

    In a space of finitely many configurations one that no trial has trained, the sampler's own if
    it finds one; empty where there is none.

    Args:
        finite: the space, if its points are kept count of.
    """
    search, seed = experiment.search, experiment.seed
    begun, repeats = trials_begun(study), num_points(search.domains) < math.inf
    tried = keys_of_trained(begun) if repeats else frozenset[str]()
    untried = None if finite is None else finite.untried(tried)
    if untried is not None and (not untried or search.sampler == "grid"):
        return next(iter(untried.values()), {})
    known = sum(t.state.is_finished() or bool(t.intermediate_values) for t in begun)
    fixed = prior_draw(search.domains, seed, number, known, experiment.train, num_layers)
    seen = as_seen_now(begun, search, study.directions)
    if seen == begun and not repeats:
        return fixed

    def is_new(point: dict[str, Any]) -> bool:
        return key_of_point(search.domains, experiment.train, point) not in tried

    rehearsal = rehearsal_of(study, seen, search, seed, number)
    for _ in range(ATTEMPTS[search.sampler]):
        if fixed:
            rehearsal.enqueue_trial(fixed)
        drawn = ask(rehearsal, search.domains)
        if is_new(drawn):
            return drawn
    chance = derived_seed(seed, "untried", number)
    if untried is None:  # of so many points chance soon finds another
        blind = optuna.create_study(sampler=optuna.samplers.RandomSampler(chance))
        blindly = (ask(blind, search.domains) for _ in range(BLIND_ATTEMPTS))
        return next(filter(is_new, blindly), drawn)
    left = [p for p in untried.values() if fixed.items() <= p.items()] or list(untried.values())
    return left[int(np.random.default_rng(chance).integers(len(left)))]


def trials_begun(study: optuna.Study) -> list[FrozenTrial]:
    """All trials but those in line."""
    return [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]


def as_seen_now(
    trials: list[FrozenTrial], search: Search, directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """Trials as the sampler is to see them; copies stand in for those it is to see otherwise.

    TPE knows running trials as liars only: as bad as any, to keep suggestions apart.  With many
    slots that repels them from where most trials run, which is where the good ones are.  So a
    running trial that has been evaluated counts for what it has shown so far.

    Gaussian processes know finished trials only, and would ask for what was pruned again and again:
    a pruned trial counts for what it has shown, one at fault for the worst that any has.

    Where the default recipe lies outside the space, it lacks parameters.  Samplers that model what
    all trials have would never search those.
    """
    if search.sampler not in SAMPLERS_THAT_LOOK:
        return trials
    always = spaces.always_drawn(search.domains)
    trials = [t for t in trials if not is_yardstick(t) or always <= t.params.keys()]
    if search.sampler == "tpe":
        return [_shown_so_far(trial) for trial in trials]
    if search.sampler == "gp" and (worst := _worst_shown(trials, directions)):
        return [_taken_as_finished(trial, worst) for trial in trials]
    return trials


def _worst_shown(
    trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
) -> list[float]:
    """In every objective, of all trials; empty if none has shown any."""
    if len(directions) == 1:
        shown = [[value] for trial in trials for value in trial.intermediate_values.values()]
    else:  # Optuna takes only the last ones
        shown = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
    worst = {StudyDirection.MAXIMIZE: min, StudyDirection.MINIMIZE: max}
    return [worst[way](of[i] for of in shown) for i, way in enumerate(directions) if shown]


def _shown_so_far(trial: FrozenTrial) -> FrozenTrial:
    if trial.state != TrialState.RUNNING or not trial.intermediate_values:
        return trial
    seen = copy.copy(trial)
    seen.state, seen.datetime_complete = TrialState.PRUNED, datetime.now()
    return seen


def _taken_as_finished(trial: FrozenTrial, worst: list[float]) -> FrozenTrial:
    """
    Args:
        worst: what a fault counts for, in every objective.
    """
    is_pruned, shown = trial.state == TrialState.PRUNED, trial.intermediate_values
    if not (is_pruned or trial.constraints):
        return trial
    seen = copy.copy(trial)
    if is_pruned:
        is_fault = any(value > 0 for value in trial.constraints.values()) or not shown
        seen.state, seen.values = TrialState.COMPLETE, worst if is_fault else [shown[max(shown)]]
    # Gaussian processes take constraints of all trials or of none.
    seen.system_attrs = {
        name: v for name, v in trial.system_attrs.items() if not name.startswith("constraints")
    }
    return seen


def rehearsal_of(
    study: optuna.Study, trials: Sequence[FrozenTrial], search: Search, seed: int, number: int
) -> optuna.Study:
    """A copy of the study with these trials, for draws that the study need not hear of."""
    rehearsal = optuna.create_study(
        storage=BorrowedTrials(trials),
        directions=study.directions,
        sampler=build_sampler(search, seed, number),
    )
    if search.sampler == "qmc":  # the place in its sequence
        for name, value in study._storage.get_study_system_attrs(study._study_id).items():
            rehearsal._storage.set_study_system_attr(rehearsal._study_id, name, value)
    return rehearsal


class BorrowedTrials(InMemoryStorage):
    """A study in memory that begins with another one's trials.

    They are read where they are: to add them would copy each one deeply for every draw, which for
    thousands of trials takes longer than the sampler.
    """

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._borrowed = list(trials)
        self._first_number = max((trial.number for trial in trials), default=-1) + 1
        # nsga2 keeps its parents by their ids.
        self._max_trial_id = max((trial._trial_id for trial in trials), default=-1)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        # Samplers leave out whoever has the number of the trial they draw for.
        self.get_trial(trial_id).number += self._first_number
        return trial_id

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials = self._borrowed + super().get_all_trials(study_id, deepcopy=False)
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


def ask(study: optuna.Study, space: Space) -> dict[str, Any]:
    """Flat parameters of one more trial."""
    trial = study.ask()
    spaces.draw(space, lambda name, domain: suggest(trial, name, domain))
    return trial.params


def suggest(trial: optuna.Trial, name: str, domain: Numeric | Choice) -> Any:
    """Ask a trial for one value."""
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, domain.options)
    if domain.integer:
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log)
