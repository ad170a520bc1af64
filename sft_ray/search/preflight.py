"""What can be wrong is found before anything heavy starts, and all of it is said at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_ray import space as spaces
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, SftError, did_you_mean
from sft_ray.search.cluster import plan_layout
from sft_ray.search.study import default_recipe
from sft_ray.training.data import Dataset, open_dataset, prepare
from sft_ray.training.model import ModelFacts, inspect_model, quiet_transformers
from sft_ray.training.tasks import TASKS, Direction
from sft_ray.training.world import resolve_precision


@dataclass(frozen=True)
class Prepared:
    """An experiment whose model, data and space have been looked at."""

    experiment: Experiment
    model: ModelFacts
    dataset: Dataset
    dataset_folder: Path
    objective: str
    direction: Direction

    def precision(self, device: str) -> str:
        """Number format and reason, in words."""
        kind = torch.device("cuda" if device == "GPU" else "cpu")
        if kind.type == "cuda" and not torch.cuda.is_available():
            return f"precision {self.experiment.train.precision}, settled on the workers"
        dtype, reason = resolve_precision(self.experiment.train.precision, kind)
        return f"{str(dtype).removeprefix('torch.')} ({reason})"


def prepare_experiment(experiment: Experiment, has: Mapping[str, float] | None = None) -> Prepared:
    """Check model, data, space and layout, encode the data, fill in the default space.

    Args:
        experiment: as it was read.
        has: what the cluster has, if that is known already.

    Raises:
        SftError: every problem found, one line each.
    """
    quiet_transformers()
    problems: list[str] = []
    model = _collect(problems, inspect_model, experiment.model, experiment.revision)
    objective = experiment.search.objective or TASKS[experiment.task].default_objective
    known = TASKS[experiment.task].metrics
    if objective not in known:
        problems.append(
            f"search.objective: {experiment.task} has no metric {objective!r}; "
            f"{did_you_mean(objective, known)}"
        )
    if experiment.search.space is None and model is not None:
        rate = default_recipe(model.num_parameters)["train.learning_rate"]
        experiment = experiment.with_space(spaces.default_space(model.num_layers, rate))
    if model is not None:
        problems += _depth_problems(experiment, model)
        problems += _length_problems(experiment, model)
    problems += _enqueue_problems(experiment)
    if has is not None:
        _collect(problems, plan_layout, experiment, has)
    folder = None
    if model is not None:
        folder = _collect(
            problems, prepare, experiment.data, model.folder, experiment.revision, experiment.seed
        )
    else:
        _collect(problems, check_data, experiment)
    if problems:
        raise ConfigError(*problems)
    assert model is not None  # no problems
    assert folder is not None
    return Prepared(
        experiment=experiment,
        model=model,
        dataset=open_dataset(folder),
        dataset_folder=folder,
        objective=objective,
        direction=TASKS[experiment.task].direction(objective),
    )


def find_problems(experiment: Experiment, has: Mapping[str, float] | None) -> list[str]:
    """Further problems of an experiment some of whose keys were already refused."""
    try:
        prepare_experiment(experiment, has)
    except SftError as error:
        return list(error.problems)
    return []


def check_data(experiment: Experiment) -> None:
    """Read and check the data without encoding it."""
    from sft_ray.training import sources

    tables = sources.read_splits(experiment.data, experiment.seed)
    sources.encode_labels(tables, experiment.data.columns.label)


def _collect(problems: list[str], check: Any, *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except SftError as error:
        problems.extend(error.problems)
        return None


def _depth_problems(experiment: Experiment, model: ModelFacts) -> list[str]:
    problems = []
    depths = [("train.frozen_layers", experiment.train.frozen_layers)]
    for path, value in spaces.boundary_values(experiment.search.domains):
        if path == "train.frozen_layers":
            depths.append((f"search.space.{path}", value))
    for where, depth in depths:
        if depth != "all" and depth > model.num_layers:
            problems.append(
                f"{where}: {experiment.model} has {model.num_layers} layers, got {depth}; "
                f"freeze 0 to {model.num_layers}"
            )
    return problems


def _length_problems(experiment: Experiment, model: ModelFacts) -> list[str]:
    if experiment.data.max_length <= model.max_length:
        return []
    return [
        f"data.max_length: {experiment.model} takes at most {model.max_length} tokens, got "
        f"{experiment.data.max_length}"
    ]


def _enqueue_problems(experiment: Experiment) -> list[str]:
    """Every enqueued value must be one the space could draw."""
    problems = []
    known = spaces.domains(experiment.search.domains)
    for i, values in enumerate(experiment.search.enqueue):
        for name, value in spaces.parameters(values).items():
            where = f"search.enqueue.{i}.{name}"
            if name not in known:
                problems.append(f"{where}: not in the search space; {did_you_mean(name, known)}")
            elif value not in known[name]:
                problems.append(
                    f"{where}: outside the search space, which is "
                    f"{spaces.describe(known[name])}, got {value!r}"
                )
    return problems
