"""What a search would run before it learns anything: the same draws, each with its weight."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from sft_ray import space as spaces
from sft_ray.config import Experiment, Train, apply_values
from sft_ray.recipes import YARDSTICK
from sft_ray.search.finite_space import FiniteSpace, key_of
from sft_ray.search.proposals import ask, first_trials, prior_draw
from sft_ray.training.seeds import derived_seed

DRAWS = 400  # configurations that stand for the sampled trials


@dataclass(frozen=True)
class DrawnTrial:
    """A configuration a search would run.

    Attributes:
        weight: how many trials of the search it stands for.
        prunable: the default recipe is not.
    """

    train: Train
    weight: float = 1.0
    prunable: bool = True


def drawn_trials(
    experiment: Experiment,
    recipe: Mapping[str, Any],
    num_layers: int,
    warm: Sequence[dict[str, Any]] = (),
) -> list[DrawnTrial]:
    """What runs first stands for itself; draws stand for the sampled trials.

    The weights add up to the trials that will run: a small space has fewer than `search.trials`.

    Args:
        experiment: with its search space written out.
        recipe: values of the default recipe by dotted path.
        num_layers: of the model.
        warm: flat parameters of other runs.
    """
    search, train, space = experiment.search, experiment.train, experiment.search.domains
    seed = derived_seed(experiment.seed, "plan")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))

    def configured(params: Mapping[str, Any]) -> Train:
        """With these flat parameters; the others are drawn."""
        study.enqueue_trial(dict(params))
        flat = ask(study, space)
        return apply_values(train, spaces.draw(space, lambda name, _: flat[name]))

    finite = FiniteSpace.of(search, train)
    first = first_trials(experiment, finite, recipe, list(warm))
    found = [
        DrawnTrial(apply_values(train, dict(recipe)), prunable=False)
        if role == YARDSTICK
        else DrawnTrial(configured(params))
        for params, role in itertools.islice(first, search.trials)
    ]
    left = search.trials - len(found)
    if finite is None or not left:
        # The priors' share falls with the number of known trials: with one slot, all before.
        numbers = [len(found) + i * left // DRAWS for i in range(DRAWS if left else 0)]
        draws = [
            configured(prior_draw(space, derived_seed(seed, i), known, known, train, num_layers))
            for i, known in enumerate(numbers)
        ]
    else:
        tried = {key_of(trial.train.model_dump()) for trial in found}
        untried = [point for key, point in finite.points.items() if key not in tried]
        if search.sampler == "grid":  # in the order of its points
            untried = untried[:left]
        draws = [configured(point) for point in untried]
        left = min(left, len(draws))
    return found + [DrawnTrial(drawn, left / len(draws)) for drawn in draws]
