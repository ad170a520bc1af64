"""Configurations that did well in other runs, to begin a search with (Feurer et al. 2015)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sft_ray import space as spaces
from sft_ray.analysis.results import check_row, reading
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, SftError
from sft_ray.recipes import SMALL_LAYER_PARAMETERS
from sft_ray.run_store import (
    ENVIRONMENT,
    RESULTS,
    RunStore,
    open_run,
    read_experiment,
    trial_records,
)
from sft_ray.space import Space
from sft_ray.training.tasks import find_task

MOST_PER_RUN = 5  # configurations taken from a run that is alike in everything


@dataclass(frozen=True)
class Likeness:
    """How alike two searches are; every part is a share, 1 where nothing differs."""

    model: float
    task: float

    @property
    def weight(self) -> float:
        return self.model * self.task


def warm_configurations(
    experiment: Experiment, model_facts: dict[str, Any], objective: str
) -> list[dict[str, Any]]:
    """Flat parameters within the space, the best of the most alike runs first.

    A run gives up to `MOST_PER_RUN` of its best finished configurations, times how alike model
    and task are, times the share of the space's parameters that its best one knows; all are put in
    order by the same product, each with its own share, and by rank.

    Args:
        experiment: with its space written out.
        model_facts: `task`, `model`, `model_type`, `layer_parameters`, `data_fingerprint`,
            as in environment.json.
        objective: the metric that is searched.

    Raises:
        ConfigError: a folder that is no run of ours, one line each.
    """
    space, problems = experiment.search.domains, []
    ranked: list[tuple[float, int, dict[str, Any]]] = []
    for i, location in enumerate(experiment.search.warm_start):
        try:
            run = _read(location)
            with reading(location):
                likeness = _likeness(run, model_facts, objective)
                best = run.best_rows(MOST_PER_RUN)
                found = [_within(space, _trained(row)) for row in best]
                weight = likeness.weight * _known(space, found[0])
                found = found[: round(MOST_PER_RUN * weight) or 1]
        except SftError as error:
            problems += [f"search.warm_start.{i}: {problem}" for problem in error.problems]
            continue
        for rank, params in enumerate(found):
            ranked.append((likeness.weight * _known(space, params) / (1 + rank), i, params))
    if problems:
        raise ConfigError(*problems)
    ranked.sort(key=lambda entry: -entry[0])
    first: list[dict[str, Any]] = []
    for _, _, params in ranked:
        if params and params not in first:
            first.append(params)
    return first


@dataclass(frozen=True)
class _Run:
    experiment: Experiment
    facts: dict[str, Any]
    metric: str
    rows: Sequence[dict[str, Any]]

    def best_rows(self, count: int) -> list[dict[str, Any]]:
        sign = find_task(self.experiment.task).sign(self.metric)
        finished = [row for row in self.rows if row["state"] == "COMPLETE"]
        return sorted(finished, key=lambda row: -sign * row["value"])[:count]


def _read(location: str) -> _Run:
    store = open_run(location)
    try:
        experiment = read_experiment(store)
        facts = store.read_json(ENVIRONMENT)
    except OSError as error:
        raise ConfigError(f"{location} cannot be read: {error}") from None
    if facts is None:
        raise ConfigError(f"{location} is no run folder; name one that a search has left")
    with reading(location):
        rows = list(_rows(store))
        for row in rows:
            check_row(row, location)
    if not any(row["state"] == "COMPLETE" for row in rows):
        raise ConfigError(f"{location} has no finished trial to begin with; leave it out")
    metric = experiment.search.score or find_task(experiment.task).default_objective
    return _Run(experiment, facts, metric, rows)


def _rows(store: RunStore) -> Iterator[dict[str, Any]]:
    """Of the trials that have ended; a search that was cut off left no results.json."""
    tree = store.read_json(RESULTS)
    if tree is not None:
        yield from tree["trials"]
        return
    for path in trial_records(store):
        row = store.read_json(path)
        if row is not None:
            yield row


def _likeness(run: _Run, facts: dict[str, Any], objective: str) -> Likeness:
    """By model and size, by task, metric and data."""
    theirs = run.facts
    are_small = [
        # A run of an earlier version did not count its layers alone.
        one.get("layer_parameters", one["num_parameters"]) < SMALL_LAYER_PARAMETERS
        for one in (theirs, facts)
    ]
    if theirs["model"] == facts["model"]:
        model = 1.0
    elif are_small[0] != are_small[1]:
        model = 0.2  # another learning rate altogether
    else:
        model = 0.8 if theirs["model_type"] == facts["model_type"] else 0.5
    if theirs["task"] != facts["task"]:
        task = 0.4
    elif theirs["data_fingerprint"] == facts["data_fingerprint"]:
        task = 1.0 if run.metric == objective else 0.9
    else:
        task = 0.7
    return Likeness(model, task)


def _trained(row: dict[str, Any]) -> dict[str, Any]:
    """What a trial was trained with, searched or not."""
    train = {f"train.{name}": value for name, value in row["train"].items()}
    return spaces.parameters(train) | dict(row["params"])


def _within(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """What of a trained configuration the space could draw; the sampler draws the rest."""
    known = spaces.domains(space)
    return {name: value for name, value in params.items() if name in known and value in known[name]}


def _known(space: Space, params: dict[str, Any]) -> float:
    """The share of a configuration's parameters that are told."""
    return len(params) / max(len(_asked(space, params)), 1)


def _asked(space: Space, params: dict[str, Any]) -> list[str]:
    """The parameters that a configuration of the space with these choices has."""
    asked: list[str] = []

    def note(name: str, domain: Any) -> Any:
        asked.append(name)
        is_choice = isinstance(domain, spaces.Choice)
        return params.get(name, domain.options[0] if is_choice else domain.low)

    spaces.draw(space, note)
    return asked
