"""What can be wrong is found before anything heavy starts, and all of it is said at once."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sft_ray.config import Experiment, Train
from sft_ray.errors import ConfigError, SftError, did_you_mean
from sft_ray.screen import Screen
from sft_ray.training import sources
from sft_ray.training.data import open_dataset, prepare, with_classes
from sft_ray.training.examples import Dataset
from sft_ray.training.model_facts import ModelFacts, inspect_model
from sft_ray.training.tasks import Direction, Task, find_task
from sft_ray.training.world import resolve_precision

LABEL_OPTIONS = ("label_smoothing", "class_weights")


@dataclass(frozen=True)
class Prepared:
    """An experiment whose model, data and settings have been looked at."""

    experiment: Experiment  # a hub model's `revision` is the commit that was found
    task: Task
    model: ModelFacts
    dataset: Dataset
    dataset_folder: Path
    objective: str

    @property
    def direction(self) -> Direction:
        return self.task.direction(self.objective)

    def precision(self, device: str) -> str:
        """Number format and reason, in words; `device` is CPU or GPU."""
        kind = torch.device("cuda" if device == "GPU" else "cpu")
        if kind.type == "cuda" and not torch.cuda.is_available():
            return f"precision {self.experiment.train.precision}, settled on the workers"
        dtype, reason = resolve_precision(self.experiment.train.precision, kind)
        return f"{str(dtype).removeprefix('torch.')} ({reason})"

    def facts(self) -> dict[str, Any]:
        """For environment.json."""
        return {
            "task": self.task.name,
            "model": self.experiment.model,
            "model_type": self.model.model_type,
            "num_parameters": self.model.num_parameters,
            "layer_parameters": self.model.layer_parameters,
            "model_fingerprint": self.model.fingerprint,
            "model_commit": self.model.commit,
            "data_fingerprint": self.dataset.fingerprint,
        }

    def described(self) -> dict[str, str]:
        """Model and data in words, with what is worth knowing before trusting a score."""
        experiment, model, dataset = self.experiment, self.model, self.dataset
        notes = [
            f"{len(dataset.train)} training and {len(dataset.validation)} validation examples",
            f"{dataset.train.lengths.mean():.1f} tokens on average",
        ]
        if self.task.classes:
            notes.insert(1, f"{len(dataset.label_names)} labels")
        if cut := sum(dataset.num_truncated.values()):
            notes.append(f"{cut} cut at {dataset.max_length} tokens")
        if dataset.num_left_out:
            notes.append(f"{dataset.num_left_out} rows without a label left out")
        notes += [
            f"{count} of the inputs in {where.replace(' in ', ' also in ')}"
            for where, count in dataset.num_duplicates.items()
        ]
        if dataset.test_split == "unlabelled":
            notes.append("the test split is unlabelled and will not be scored")
        constant = self.task.constant_scores(dataset.train, dataset.validation, dataset.label_set)
        described = {
            "model": f"{experiment.model} ({model.model_type}, {model.num_layers} layers, "
            f"{model.num_parameters / 1e6:.1f} M parameters)",
            "data": f"{self.task.name}: {', '.join(notes)}",
        }
        if self.objective in constant:
            described["constant"] = (
                f"always the same answer scores {self.objective} {constant[self.objective]:.4f}"
            )
        return described

    def say_next(self, screen: Screen, checkpoint: str, *others: str) -> None:
        """The commands to type once there is a model; `others` come behind the first."""
        has = self.dataset.validation.has
        line = self.task.example_line([n for n in self.task.optional_inputs if has(n)])
        screen.say("next:")
        for command in (f"echo '{line}' | sft-ray predict {shlex.quote(checkpoint)}", *others):
            screen.say(f"  {command}")


def prepare_training(experiment: Experiment) -> Prepared:
    """Check task, model, data and settings; read and encode the data.

    Raises:
        SftError: every problem found, one line each.
    """
    problems: list[str] = []
    model = collect(problems, inspect_model, experiment.model, experiment.revision)
    if model is not None:
        collect(problems, lambda: model.num_parameters)
    return prepare_with_model(experiment, model, problems)


def check_origin(prepared: Prepared, environment: Any, location: str) -> None:
    """Whether a run's model and data are still those it was made from: its numbers are of no other.

    A hub model has no fingerprint: its commit is the `revision` that the folder rule compares.

    Args:
        environment: what environment.json of the run says, if it can be read.

    Raises:
        ConfigError: they are not.
    """
    before = environment if isinstance(environment, dict) else {}
    today = {"model": prepared.model.fingerprint, "data": prepared.dataset.fingerprint}
    problems = []
    for what, now in today.items():
        then = before.get(f"{what}_fingerprint")
        if then not in (None, now):
            whose = "another model" if what == "model" else "other data"
            problems.append(
                f"{what}: {location} was made from {whose} (fingerprint {then}, now {now}); bring "
                "that back, or choose another name=…"
            )
    if problems:
        raise ConfigError(*problems)


def prepare_with_model(
    experiment: Experiment, model: ModelFacts | None, found: Sequence[str]
) -> Prepared:
    """`prepare_training` behind a look at the model.

    Args:
        experiment: as it was read, or with more filled in.
        model: None if it could not be looked at; why is among the problems then.
        found: problems the caller knows of already; they are reported with the others.

    Raises:
        SftError: every problem found, one line each.
    """
    problems = list(found)
    task = collect(problems, find_task, experiment.task)
    objective = experiment.search.score
    if task is not None:
        objective = objective or task.default_objective
        problems += [*_objective_problems(task, objective), *_option_problems(task, experiment)]
    if model is not None:
        problems += _model_problems(experiment, model)
        if model.commit is not None:  # from here on it may move on the hub
            experiment = experiment.model_copy(update={"revision": model.commit})
    folder = None
    if task is not None and model is not None:
        data, seed = experiment.data, experiment.seed
        revision = experiment.revision
        folder = collect(problems, prepare, data, task, model.folder, revision, seed, objective)
    elif task is not None:
        collect(problems, _check_data, experiment, task)
    if not problems:
        assert task is not None  # no problems
        assert model is not None
        assert folder is not None
        assert objective is not None
        prepared = Prepared(experiment, task, model, open_dataset(folder), folder, objective)
        problems += _data_problems(prepared)
    if problems:
        raise ConfigError(*problems)
    return prepared


def arm_problems(prepared: Prepared, train: Train) -> list[str]:
    """Why another `train` section could not run on the same model and data."""
    other = prepared.experiment.model_copy(update={"train": train})
    return [
        *_option_problems(prepared.task, other),
        *_model_problems(other, prepared.model),
        *_data_problems(replace(prepared, experiment=other)),
    ]


def collect(problems: list[str], check: Any, *arguments: Any) -> Any:
    """The result of a check, or None and its problems added to the others."""
    try:
        return check(*arguments)
    except SftError as error:
        problems.extend(error.problems)
        return None


def _check_data(experiment: Experiment, task: Task) -> None:
    """Read and check the data without encoding it."""
    source = sources.read_splits(experiment.data, task.fields, experiment.seed)
    with_classes(source, experiment.data, task)


def _objective_problems(task: Task, objective: str) -> Iterator[str]:
    if objective not in task.metrics:
        yield (
            f"search.objective: {task.name} has no metric {objective!r}; "
            f"{did_you_mean(objective, task.metrics)}"
        )


def _option_problems(task: Task, experiment: Experiment) -> Iterator[str]:
    """Settings that the task would not look at."""
    data, train = experiment.data, experiment.train
    searched = [path.removeprefix("train.") for path in experiment.search.space or {}]
    if not task.label_options:
        for option in LABEL_OPTIONS:
            if getattr(train, option) or option in searched:
                yield f"train.{option}: {task.name} has no use for it; remove it"
    if data.label_names is not None and not task.classes:
        yield f"data.label_names: {task.name} has no classes to name; remove it"
    if data.negative_label is not None and not task.negative_label:
        yield f"data.negative_label: only relation-extraction has one, got task {task.name}"


def _model_problems(experiment: Experiment, model: ModelFacts) -> Iterator[str]:
    train, layers = experiment.train, model.num_layers
    depth = train.frozen_depth(layers)
    if depth > layers:
        yield (
            f"train.frozen_layers: {experiment.model} has {layers} layers, got {depth}; freeze 0 "
            f"to {layers}"
        )
    elif depth + train.reinit_layers > layers:
        yield (
            f"train.reinit_layers: {experiment.model} has {layers} layers, of which {depth} are "
            f"frozen, got {train.reinit_layers}"
        )
    if experiment.data.max_length > model.max_length:
        yield (
            f"data.max_length: {experiment.model} takes at most {model.max_length} tokens, got "
            f"{experiment.data.max_length}"
        )


def _data_problems(prepared: Prepared) -> Iterator[str]:
    """What only the data can tell."""
    task, dataset, train = prepared.task, prepared.dataset, prepared.experiment.train
    known = task.available_metrics(dataset.validation, dataset.label_set)
    if prepared.objective not in known:
        yield (
            f"search.objective: this data has no {prepared.objective} (f1 needs two labels, mrr "
            f"and ndcg a group column); it has {', '.join(known)}"
        )
    if isinstance(train.class_weights, dict):
        missing = [name for name in dataset.label_names if name not in train.class_weights]
        unknown = [name for name in train.class_weights if name not in dataset.label_names]
        if missing:
            yield f"train.class_weights: every label needs one, none given for {missing[0]!r}"
        if unknown:
            hint = did_you_mean(unknown[0], dataset.label_names)
            yield f"train.class_weights: no label {unknown[0]!r}; {hint}"
