"""`sft-ray evaluate`: a trained model's scores on one split of an experiment's data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, DataError
from sft_ray.run_store import EXPERIMENT, TEST_ACCESS, RunStore, scorings_of_test
from sft_ray.serving.predict import Predictor, load_predictor
from sft_ray.training import labels, sources
from sft_ray.training.columns import is_unlabelled
from sft_ray.training.data import limited
from sft_ray.training.examples import Examples
from sft_ray.training.hub import is_missing_among_others


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split of `num_examples` rows."""

    model: str
    split: str
    num_examples: int
    metrics: dict[str, float]
    recorded_in: str | None


def run_evaluation(place: str, split: str, experiment_file: str | None = None) -> Evaluation:
    """Score a model on `validation` or `test`; a scoring of the test split is recorded.

    Args:
        place: a run folder, whose winner is scored, or a model folder or hub id.
        split: of the experiment's data.
        experiment_file: says what data; default: the run's own experiment.

    Raises:
        SftError: no such run, model, split or labels.
    """
    if split not in ("validation", "test"):
        raise ConfigError(f"--split: validation or test, got {split!r}")
    experiment, store = _find_run(place, experiment_file)
    predictor = load_predictor(place)
    if predictor.task.name != experiment.task:
        raise ConfigError(
            f"{place}: the model answers {predictor.task.name}, the experiment is about "
            f"{experiment.task}"
        )
    metrics, num_examples = score_split(predictor, experiment, split)
    recorded_in = None
    if split == "test":
        record_test(store, place, metrics, num_examples)
        recorded_in = store.path_of(TEST_ACCESS)
    return Evaluation(place, split, num_examples, metrics, recorded_in)


def record_test(
    store: RunStore, model: str, metrics: dict[str, float], num_examples: int
) -> dict[str, Any]:
    """Write down that the test split was scored; every time weakens it a little."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "num_examples": num_examples,
        "metrics": metrics,
    }
    store.append_text(TEST_ACCESS, json.dumps(record) + "\n")
    return record


def recorded_test(store: RunStore, path: str) -> dict[str, Any] | None:
    """The record of a model of the run, wherever that lay then; None if it was not scored."""
    for record in scorings_of_test(store):
        model = str(record.get("model"))
        if model.partition("?")[0].endswith(f"/{path}"):  # behind the ? are a store's options
            return record
    return None


def score_split(
    predictor: Predictor, experiment: Experiment, split: str
) -> tuple[dict[str, float], int]:
    """Metrics and number of rows; raises as `examples_of` does."""
    examples = examples_of(predictor, experiment, split)
    found = predictor.task.score(predictor.outputs(examples), examples, predictor.label_set)
    return found, len(np.unique(examples.rows))


def examples_of(predictor: Predictor, experiment: Experiment, split: str) -> Examples:
    """A split of the experiment's data as the model reads it.

    Raises:
        DataError: the data has no such split, or no labels for it that the model knows.
    """
    task, data, seed = predictor.task, experiment.data, experiment.seed
    source = sources.read_splits(data, task.fields, seed)
    if split == "test" and split not in source.tables and data.splits is not None:
        # The experiment names other splits; a hub data set may have this one all the same.
        named = data.splits.model_copy(update={"test": "test"})
        source = sources.read_splits(data.model_copy(update={"splits": named}), task.fields, seed)
    if split not in source.tables:
        raise DataError(
            f"data: the experiment names no {split} split; set data.{split}, data.splits.{split} "
            f"or data.split.{split}"
        )
    table, target = source.tables[split], task.fields.target_name
    if is_unlabelled(table, target):
        raise DataError(f"data: the {split} split is unlabelled; it cannot be scored")
    if task.classes:
        table = labels.with_names(table, target, source.names, source.where[split])
        labels.check_names(table, target, predictor.label_set.names, source.where[split])
    if split == "validation":
        table = limited(table, data.limit.validation, seed, split)
    return predictor.encode(table)


def _find_run(place: str, experiment_file: str | None) -> tuple[Experiment, RunStore]:
    """The experiment that says what data, and the run folder that keeps the record."""
    if not place:
        raise ConfigError("the name of the model is empty; name a run folder or a model folder")
    if experiment_file is not None:
        experiment = Experiment.load(experiment_file)
        return experiment, RunStore(experiment.storage, experiment.name)
    # Of `.` inside of best/, too, the folder above is the run's; best/ itself may be a link.
    here = Path(os.path.abspath(place))  # noqa: PTH100
    for folder in (here, here.parent):
        if (folder / EXPERIMENT).is_file():
            experiment = Experiment.load(folder / EXPERIMENT)
            return experiment, RunStore(str(folder.parent), folder.name)
    if is_missing_among_others(str(here)):
        raise ConfigError(f"{place}: no such folder; name a run folder, or say --experiment FILE")
    raise ConfigError(
        f"{place}: neither a run folder nor a model inside one; say with --experiment FILE what "
        "data to score it on"
    )
