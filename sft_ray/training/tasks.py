"""The table of tasks: what a task reads, its loss, its metrics, and what it answers.

A task is one entry of `TASKS`; its parts are plain functions in the modules imported here.
Shapes: outputs are [n, classes] for tasks that answer per item, [total, classes] for tasks that
answer per token, with the tokens of all items end to end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sft_ray.errors import ConfigError, did_you_mean
from sft_ray.training import answers, checks, encoding, labels, losses, scores
from sft_ray.training import columns as kinds
from sft_ray.training.columns import Fields
from sft_ray.training.encoding import Encoded, Encoder
from sft_ray.training.examples import Examples, LabelSet
from sft_ray.training.losses import Loss
from sft_ray.training.metrics import Floats

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Task:
    """One kind of supervised fine-tuning.

    Attributes:
        fields: what the data must hold.
        encode: checked rows to tokens.
        label: rows and their encoding to the labels of `Examples`.
        auto_model: name of the `transformers` auto class that carries the head.
        loss: one loss per item; per-token tasks sum over an item's tokens.
        metrics: name -> better direction; the first is the default objective.
        missing_metrics: those of `metrics` that some data does not have.
        score: outputs of a whole split to its metrics.
        answer: outputs to one answer per row, as `predict` writes it.
        constant: the constant output [classes] with the smallest training loss, or None.
        classes: whether labels are names to choose from; else `num_outputs` is fixed.
        negative_label: whether one label can mean that there is none.
        label_options: whether label smoothing and class weights apply.
        per_token: whether outputs are per token.
        problem_type: what `transformers` calls the kind of label, for its pipelines.
    """

    name: str
    fields: Fields
    encode: Callable[[pa.Table, Encoder], Encoded]
    label: Callable[[pa.Table, Encoded, LabelSet], Any]
    auto_model: str
    loss: Loss
    metrics: dict[str, Direction]
    score: Callable[[Floats, Examples, LabelSet], dict[str, float]]
    answer: Callable[[Floats, Examples, LabelSet], list[dict[str, Any]]]
    constant: Callable[[Examples, LabelSet], Floats | None]
    missing_metrics: Callable[[Examples, LabelSet], set[str]] = scores.none_missing
    classes: bool = True
    negative_label: bool = False
    num_outputs: int = 0
    label_options: bool = True
    per_token: bool = False
    problem_type: str | None = None

    @property
    def default_objective(self) -> str:
        return next(iter(self.metrics))

    def direction(self, objective: str) -> Direction:
        return self.metrics[objective]

    def sign(self, objective: str) -> int:
        """1 where a larger value is better, else -1."""
        return 1 if self.direction(objective) == "maximize" else -1

    @property
    def optional_inputs(self) -> list[str]:
        """Fields that a model reads if its training had them; a group is for scoring alone."""
        return [name for name in self.fields.optional if name != "group"]

    def example_line(self, optional: Collection[str]) -> str:
        """An input as `predict` reads it, for a model that was trained with these of the fields."""
        is_plain = not optional and list(self.fields.inputs) in (["text"], ["tokens"])
        return "your text" if is_plain else self.example_row(optional)

    def example_row(self, optional: Collection[str]) -> str:
        """The same as JSON."""
        if "subject_start" in self.fields.inputs:
            return '{"text": "…", "subject": [0, 5], "object": [9, 14]}'
        row: dict[str, Any] = dict.fromkeys((*self.fields.inputs, *optional), "…")
        special = {"tokens": ["…"], "predicate": 0}
        return json.dumps(row | {n: special[n] for n in row if n in special}, ensure_ascii=False)

    def available_metrics(self, examples: Examples, label_set: LabelSet) -> list[str]:
        """The metrics that `score` finds for these examples."""
        missing = self.missing_metrics(examples, label_set)
        return [name for name in self.metrics if name not in missing]

    def outputs_of(self, label_set: LabelSet) -> int:
        """Numbers per item or token."""
        return len(label_set.names) if self.classes else self.num_outputs

    def constant_scores(self, train: Examples, judged: Examples, labels: LabelSet) -> Any:
        """Metrics of the best constant output; empty if the task has none."""
        constant = self.constant(train, labels)
        if constant is None:
            return {}
        rows = len(judged.tokens) if self.per_token else len(judged)
        return self.score(np.tile(constant, (rows, 1)), judged, labels)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"task: no task {name!r}; {did_you_mean(name, TASKS)}")
    return TASKS[name]


TASKS = {
    task.name: task
    for task in (
        Task(
            name="text-classification",
            fields=Fields(
                inputs={"text": kinds.text},
                optional={"text_pair": kinds.text, "group": kinds.group_key},
                target={"label": kinds.class_label},
                together=checks.nothing,
            ),
            encode=encoding.encode_texts,
            label=labels.class_ids,
            auto_model="AutoModelForSequenceClassification",
            problem_type="single_label_classification",
            loss=losses.cross_entropy,
            metrics={
                "accuracy": "maximize",
                "macro_f1": "maximize",
                "f1": "maximize",
                "precision": "maximize",
                "recall": "maximize",
                "mcc": "maximize",
                "mrr": "maximize",
                "ndcg": "maximize",
                "loss": "minimize",
            },
            missing_metrics=scores.missing_of_classes,
            score=scores.score_classes,
            answer=answers.answer_classes,
            constant=scores.class_frequencies,
        ),
        Task(
            name="multi-label",
            fields=Fields(
                inputs={"text": kinds.text},
                optional={"text_pair": kinds.text},
                target={"labels": kinds.class_labels},
                together=checks.nothing,
            ),
            encode=encoding.encode_texts,
            label=labels.membership,
            auto_model="AutoModelForSequenceClassification",
            problem_type="multi_label_classification",
            loss=losses.binary_cross_entropy,
            metrics={
                "micro_f1": "maximize",
                "macro_f1": "maximize",
                "subset_accuracy": "maximize",
                "map": "maximize",
                "loss": "minimize",
            },
            score=scores.score_labels,
            answer=answers.answer_labels,
            constant=scores.label_frequencies,
            label_options=False,
        ),
        Task(
            name="regression",
            fields=Fields(
                inputs={"text": kinds.text},
                optional={"text_pair": kinds.text},
                target={"label": kinds.number},
                together=checks.nothing,
            ),
            encode=encoding.encode_texts,
            label=labels.values,
            auto_model="AutoModelForSequenceClassification",
            problem_type="regression",
            loss=losses.squared_error,
            metrics={
                "spearman": "maximize",
                "pearson": "maximize",
                "mse": "minimize",
                "mae": "minimize",
                "loss": "minimize",
            },
            score=scores.score_values,
            answer=answers.answer_values,
            constant=scores.mean_value,
            classes=False,
            num_outputs=1,
            label_options=False,
        ),
        Task(
            name="token-classification",
            fields=Fields(
                inputs={"tokens": kinds.words},
                optional={"predicate": kinds.word_place},
                target={"tags": kinds.tags},
                together=checks.check_tags,
            ),
            encode=encoding.encode_words,
            label=labels.tag_ids,
            auto_model="AutoModelForTokenClassification",
            loss=losses.token_cross_entropy,
            metrics={
                "f1": "maximize",
                "precision": "maximize",
                "recall": "maximize",
                "accuracy": "maximize",
                "loss": "minimize",
            },
            score=scores.score_tags,
            answer=answers.answer_tags,
            constant=scores.class_frequencies,
            per_token=True,
        ),
        Task(
            name="question-answering",
            fields=Fields(
                inputs={"question": kinds.text, "context": kinds.text},
                optional={},
                target={"answers": kinds.answers},
                together=checks.check_answers,
            ),
            encode=encoding.encode_windows,
            label=labels.answer_positions,
            auto_model="AutoModelForQuestionAnswering",
            loss=losses.span_cross_entropy,
            metrics={"f1": "maximize", "exact_match": "maximize", "loss": "minimize"},
            score=scores.score_answers,
            answer=answers.answer_spans,
            constant=scores.no_constant,
            classes=False,
            num_outputs=2,
            label_options=False,
            per_token=True,
        ),
        Task(
            name="relation-extraction",
            fields=Fields(
                inputs={
                    "text": kinds.text,
                    "subject_start": kinds.position,
                    "subject_end": kinds.position,
                    "object_start": kinds.position,
                    "object_end": kinds.position,
                },
                optional={},
                target={"label": kinds.class_name},
                together=checks.check_spans,
            ),
            encode=encoding.encode_marked,
            label=labels.class_ids,
            auto_model="AutoModelForSequenceClassification",
            problem_type="single_label_classification",
            loss=losses.cross_entropy,
            metrics={
                "micro_f1": "maximize",
                "macro_f1": "maximize",
                "accuracy": "maximize",
                "loss": "minimize",
            },
            negative_label=True,
            score=scores.score_relations,
            answer=answers.answer_classes,
            constant=scores.class_frequencies,
        ),
    )
}
