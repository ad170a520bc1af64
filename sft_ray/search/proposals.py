"""Where configurations come from besides the sampler: what runs first, priors, untried points.

Every function answers with flat parameters, which the study enqueues.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from sft_ray import space as spaces
from sft_ray.config import Experiment, Search, apply_values
from sft_ray.recipes import YARDSTICK
from sft_ray.search.finite_space import FiniteSpace, key_of, key_of_point
from sft_ray.search.samplers import build_sampler, grid_points
from sft_ray.space import Choice, Numeric, Prior, Space
from sft_ray.training.seeds import derived_seed

PRIOR_STRENGTH = 10  # n0: trials after which half of the draws come from the sampler
# Draws to find a point that was not tried.  One of gp fits a model; a copy of the study would have
# qmc begin its sequence anew, so it takes any untried point.
ATTEMPTS = {"tpe": 20, "nsga2": 20, "random": 20, "gp": 2}
FROZEN_LAYERS = "train.frozen_layers"


def first_trials(
    experiment: Experiment, space: Space, recipe: Mapping[str, Any], warm: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], str]]:
    """What runs before the sampler is asked: parameters, and the role they have.

    Args:
        recipe: values of the default recipe by dotted path.
        warm: flat parameters that did well in other runs.
    """
    search, train, known = experiment.search, experiment.train, spaces.domains(space)
    params = spaces.parameters(recipe)
    yardstick = {n: v for n, v in params.items() if n in known and v in known[n]}
    first = []
    if search.default_recipe:
        first.append(yardstick)
        yield yardstick, YARDSTICK
    for values in search.enqueue:  # twice, if the user says so
        first.append(spaces.parameters(values))
        yield first[-1], "enqueued"
    for params in warm:
        if params not in first:
            first.append(params)
            yield params, "warm start"
    if search.sampler != "grid":
        return
    done = {key_of_point(space, train, params) for params in first if params != yardstick}
    if search.default_recipe:
        done.add(key_of(apply_values(train, dict(recipe)).model_dump()))
    for point in grid_points(space):
        if key_of_point(space, train, point) not in done:
            yield point, "grid"


def prior_draw(space: Space, seed: int, number: int) -> dict[str, Any]:
    """With the share n0 / (n0 + n) of all draws, the priors' word where there are some.

    The other parameters are left to the sampler; empty where it has all the say.
    """
    known = spaces.domains(space)
    priors = {
        name: (domain, domain.prior)
        for name, domain in known.items()
        if isinstance(domain, Numeric) and domain.prior is not None
    }
    rng = np.random.default_rng(derived_seed(seed, "prior", number))
    if rng.random() >= PRIOR_STRENGTH / (PRIOR_STRENGTH + number):
        return {}
    drawn: dict[str, Any] = {}
    frozen_share, depth = 0.0, known.get(FROZEN_LAYERS)
    if isinstance(depth, Numeric) and any(prior.frozen_factor != 1 for _, prior in priors.values()):
        drawn[FROZEN_LAYERS] = (
            int(rng.integers(int(depth.low), int(depth.high) + 1))
            if depth.prior is None
            else _draw_prior(depth, depth.prior, 0.0, rng)
        )
        frozen_share = drawn[FROZEN_LAYERS] / max(depth.high, 1)
    for name, (domain, prior) in priors.items():
        if name not in drawn:
            drawn[name] = _draw_prior(domain, prior, frozen_share, rng)
    return drawn


def _draw_prior(
    domain: Numeric, prior: Prior, frozen_share: float, rng: np.random.Generator
) -> float | int:
    """A normal draw around the prior's center (log-normal on a log scale), within the range.

    Args:
        frozen_share: frozen depth of the configuration, of the deepest in its range.
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


def propose_untried(
    study: optuna.Study, finite: FiniteSpace, search: Search, seed: int, number: int
) -> dict[str, Any]:
    """A point that no trial has trained, the sampler's own if it finds one; empty at the end."""
    untried = finite.untried(study.get_trials(deepcopy=False))
    if not untried:
        return {}
    fixed = prior_draw(finite.space, seed, number)
    attempts = ATTEMPTS.get(search.sampler, 0)
    if attempts:
        rehearsal = as_seen_now(study, search, seed, number)
    for _ in range(attempts):
        if fixed:
            rehearsal.enqueue_trial(fixed)
        drawn = ask(rehearsal, finite.space)
        if finite.key_of(drawn) in untried:
            return drawn
    rng = np.random.default_rng(derived_seed(seed, "untried", number))
    left = list(untried.values())
    return left[int(rng.integers(len(left)))]


def propose(
    study: optuna.Study, search: Search, space: Space, seed: int, number: int
) -> dict[str, Any]:
    """What the sampler would not draw by itself; empty where it has all the say."""
    fixed = prior_draw(space, seed, number)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    shown = any(trial.intermediate_values for trial in running)
    if fixed or search.sampler != "tpe" or not shown:
        return fixed
    return ask(as_seen_now(study, search, seed, number), space)


def as_seen_now(study: optuna.Study, search: Search, seed: int, number: int) -> optuna.Study:
    """A copy of the study for one draw, which the study need not hear of.

    TPE knows running trials as liars only: as bad as any, to keep suggestions apart.  With many
    slots that repels them from where most trials run, which is where the good ones are.  In its
    copy a running trial that has been evaluated counts for what it has shown so far.  Other
    samplers have no use for trials that did not finish.
    """
    seen = []
    for trial in study.get_trials(deepcopy=False):
        shown = trial.state == TrialState.RUNNING and bool(trial.intermediate_values)
        if shown and search.sampler == "tpe":
            trial = copy.copy(trial)
            trial.state, trial.datetime_complete = TrialState.PRUNED, datetime.now()
        if trial.state != TrialState.WAITING:
            seen.append(trial)
    return optuna.create_study(
        storage=BorrowedTrials(seen),
        directions=study.directions,
        sampler=build_sampler(search, seed, number),
    )


class BorrowedTrials(InMemoryStorage):
    """A study in memory that begins with another one's trials.

    They are read where they are: to add them would copy each one deeply for every draw, which for
    thousands of trials takes longer than the sampler.
    """

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._borrowed = list(trials)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self.get_trial(trial_id).number += len(self._borrowed)
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
