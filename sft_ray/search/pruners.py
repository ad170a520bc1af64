"""Who goes on at a rung.

Every pruner is asked at the experiment's rungs only, which are percents of a trial's own schedule,
and never at the end of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from sft_ray.config import Search


class RungPruner(optuna.pruners.BasePruner):
    """Asynchronous successive halving at rungs of each trial's own schedule (Li et al. 2020).

    At a rung a trial goes on if it is among the best 1/reduction_factor of all trials that have
    reached it so far, itself included; equals of the last of them go on too, and so does the first
    trial at a rung.
    """

    def __init__(self, rungs: Sequence[int], reduction_factor: int) -> None:
        self.rungs, self.reduction_factor = tuple(rungs), reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step not in self.rungs:
            return False
        sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
        trials = study.get_trials(deepcopy=False)
        values = [t.intermediate_values[step] for t in trials if step in t.intermediate_values]
        ranked = sorted((sign * value for value in values), reverse=True)
        last = ranked[max(1, len(ranked) // self.reduction_factor) - 1]
        return bool(sign * trial.intermediate_values[step] < last)


def build_pruner(search: Search) -> optuna.pruners.BasePruner:
    """The experiment's pruner; all but the first are Optuna's own."""
    ours = RungPruner(search.rungs, search.reduction_factor)
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=min(search.rungs, default=10),
            max_resource=100,
            reduction_factor=search.reduction_factor,
        )
    if search.pruner == "patient":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.pruners.PatientPruner(ours, patience=1)
    if search.pruner == "none":
        return optuna.pruners.NopPruner()
    return ours


def prune_at(
    pruner: optuna.pruners.BasePruner, study: optuna.Study, trial: FrozenTrial, step: int
) -> bool:
    """The decision at one step, whatever the trial has reported beyond it."""
    seen = copy.copy(trial)
    seen.intermediate_values = {s: v for s, v in trial.intermediate_values.items() if s <= step}
    return bool(pruner.prune(study, seen))
