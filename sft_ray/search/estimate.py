"""What a search takes: configurations it would run, times what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_ray.config import Experiment, Train
from sft_ray.search.draws import DrawnTrial
from sft_ray.search.layout import Layout
from sft_ray.search.speed import Speed
from sft_ray.training.batches import steps_per_epoch
from sft_ray.training.preparation import Prepared
from sft_ray.training.progress import Mark, schedule_marks
from sft_ray.training.trunk_cache import room_bytes

STARTUP_SECONDS = 20.0  # assumed: Ray, processes, model and data, once per search
RESUME_STATE_MODELS = 4  # weights, two moments of Adam, best weights


class Range(NamedTuple):
    """Least and most; of what a search takes: with as much pruned as can be, and with nothing."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> Range:
        found = list(values)
        return cls(min(found), max(found))


@dataclass(frozen=True)
class Plan:
    """What a search will do and what that takes.

    Attributes:
        trials: that would run without a budget.
        trials_in_budget: of these, what a budget lets begin.
        confirm_runs: at most so many unpruned runs on fresh seeds after the search.
        steps: optimiser steps of a trial that is not pruned.
        marks: evaluations of a trial that is not pruned.
        worker_hours: slot time times the workers of a slot, confirmation included.
        wall_seconds: with `STARTUP_SECONDS`.
        dollars: None without a price.
        disk_bytes: most that lies in run folder and cache at once.
    """

    layout: Layout
    speed: Speed
    trials: int
    trials_in_budget: Range
    confirm_runs: int
    steps: Range
    marks: Range
    worker_hours: Range
    wall_seconds: Range
    dollars: Range | None
    disk_bytes: int


def estimate(
    prepared: Prepared,
    layout: Layout,
    speed: Speed,
    drawn: Sequence[DrawnTrial],
    price_per_hour: float | None = None,
) -> Plan:
    """What the drawn trials and the confirmation take, as far as the budget lets them come.

    Args:
        price_per_hour: dollars for one worker and hour.
    """
    search, confirm = prepared.experiment.search, prepared.experiment.confirm

    def total(goes_on: float) -> float:
        shares = ((one, goes_on if one.prunable else 1.0) for one in drawn)
        return sum(
            one.weight * _slot_seconds(prepared, layout, speed, one.train, share)
            for one, share in shares
        )

    trials = round(sum(one.weight for one in drawn))
    # At a rung no fewer go on than the pruner is set to leave.
    factor = 2 if search.pruner == "median" else search.reduction_factor
    search_seconds = Range(total(1.0 if search.pruner == "none" else 1 / factor), total(1.0))
    # The best configurations and the default recipe, each to its end.
    confirm_runs = 0 if confirm is None else (confirm.top + 1) * confirm.seeds
    confirm_seconds = confirm_runs * search_seconds.high / trials
    limit = _slot_seconds_in_budget(prepared.experiment, layout)
    # A search keeps up to half of its budget for the confirmation.
    kept = min(confirm_seconds, limit / 2)
    slot_seconds = [min(some + confirm_seconds, limit) for some in search_seconds]
    hours = Range(*(some * layout.workers_per_trial / 3600 for some in slot_seconds))
    marks = [_marks(prepared, one.train) for one in drawn]
    longest = max(_slot_seconds(prepared, layout, speed, one.train) for one in drawn)
    return Plan(
        layout=layout,
        speed=speed,
        trials=trials,
        trials_in_budget=Range.over(
            trials * min(1.0, (limit - kept) / some) for some in search_seconds
        ),
        confirm_runs=confirm_runs,
        steps=Range.over(found[-1].step for found in marks),
        marks=Range.over(len(found) for found in marks),
        worker_hours=hours,
        wall_seconds=Range(*(STARTUP_SECONDS + some / layout.slots for some in slot_seconds)),
        dollars=None
        if price_per_hour is None
        else Range(*(price_per_hour * some for some in hours)),
        disk_bytes=_disk_bytes(prepared, layout, trials, longest)
        + _trunk_bytes(prepared, speed, drawn),
    )


def _marks(prepared: Prepared, train: Train) -> list[Mark]:
    per_epoch = steps_per_epoch(len(prepared.dataset.train), train.batch_size)
    return schedule_marks(prepared.experiment.search.rungs, train.epochs, per_epoch)


def _slot_seconds(
    prepared: Prepared, layout: Layout, speed: Speed, train: Train, goes_on: float = 1.0
) -> float:
    """Of one trial, without what its workers say to each other.

    Args:
        goes_on: share of the trials at a rung that do.
    """
    marks, dataset = _marks(prepared, train), prepared.dataset
    examples = train.epochs * len(dataset.train)
    uses = speed.trunk_uses
    train_seconds = speed.of_training(train) - speed.spared(train, train.epochs * uses)
    eval_seconds = speed.eval_seconds - speed.spared(train, len(marks) * uses)
    step_seconds = max(train_seconds, 0.0) * examples / marks[-1].step
    mark_seconds = max(eval_seconds, 0.0) * len(dataset.validation)
    total, reached, step = 0.0, 1.0, 0
    for mark in marks:
        total += reached * ((mark.step - step) * step_seconds + mark_seconds)
        if mark.percent in prepared.experiment.search.rungs:
            reached *= goes_on
        step = mark.step
    return total / layout.workers_per_trial


def _slot_seconds_in_budget(experiment: Experiment, layout: Layout) -> float:
    """Of search and confirmation; infinite without a limit of time."""
    budget, limit = experiment.search.budget, math.inf
    if budget.wall_minutes is not None:
        limit = max(0.0, 60 * budget.wall_minutes - STARTUP_SECONDS) * layout.slots
    if budget.worker_hours is not None:
        limit = min(limit, 3600 * budget.worker_hours / layout.workers_per_trial)
    return limit


def _trunk_bytes(prepared: Prepared, speed: Speed, drawn: Sequence[DrawnTrial]) -> int:
    """The outputs of frozen layers, of every depth that may be kept."""
    room = room_bytes(prepared.experiment.resources.trunk_cache_bytes)
    depths = {trial.train.frozen_depth(prepared.model.num_layers) for trial in drawn} - {0}
    return min(len(depths) * speed.trunk_bytes, room)


def _disk_bytes(prepared: Prepared, layout: Layout, trials: int, longest_seconds: float) -> int:
    """Models that are kept, running and best, and the data as it was encoded."""
    experiment = prepared.experiment
    # With several objectives any number of trials can be worth keeping.
    models = trials if experiment.search.costs else min(trials, experiment.checkpoint.keep)
    models += layout.slots + 1
    if longest_seconds > 60 * experiment.checkpoint.every_minutes:
        models += RESUME_STATE_MODELS * layout.slots
    if experiment.confirm is not None:
        models += experiment.confirm.top + 1
    files = prepared.dataset_folder.rglob("*")
    data = sum(file.stat().st_size for file in files if file.is_file())
    return models * 4 * prepared.model.num_parameters + data  # models are written in fp32
