"""The table of tasks: what a task reads, its loss, its metrics, and what it answers.

A task is one entry of `TASKS`; its parts are plain functions here and in `encoding`, `labels` and
`metrics`.  Shapes: outputs are [n, classes] for tasks that answer per item, [total, classes] for
tasks that answer per token, with the tokens of all items end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from scipy.special import expit, log_softmax, softmax

from sft_ray.errors import ConfigError, did_you_mean
from sft_ray.tags import with_prefixes
from sft_ray.training import columns as kinds
from sft_ray.training import encoding, labels, metrics
from sft_ray.training.columns import Fields, answer_pairs
from sft_ray.training.encoding import Encoded, Encoder
from sft_ray.training.examples import IGNORED, Examples, LabelSet
from sft_ray.training.metrics import Floats

Direction = Literal["maximize", "minimize"]
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class LossOptions:
    """What classification losses can be changed by; `class_weights` is [classes]."""

    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None


# Logits, labels and the mask of real tokens [n, length] to one loss per item, [n].
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LossOptions], torch.Tensor]


def none_missing(examples: Examples, label_set: LabelSet) -> set[str]:
    """Every metric of the task exists for all of its data."""
    return set()


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
    missing_metrics: Callable[[Examples, LabelSet], set[str]] = none_missing
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

    def example_line(self, has_pair: bool) -> str:
        """An input as `predict` reads it."""
        if not has_pair and list(self.fields.inputs) in (["text"], ["tokens"]):
            return "your text"
        if not has_pair and "subject_start" in self.fields.inputs:
            return '{"text": "…", "subject": [0, 5], "object": [9, 14]}'
        names = [*self.fields.inputs, *(["text_pair"] if has_pair else [])]
        return "{" + ", ".join(f'"{name}": "…"' for name in names) + "}"

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


# -- losses --------------------------------------------------------------------------------------


def cross_entropy(
    logits_NC: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Of class ids [n] or probabilities [n, classes]; [n].

    Label smoothing as in Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016.
    """
    return F.cross_entropy(
        logits_NC,
        labels if labels.ndim == 1 else labels.to(logits_NC.dtype),
        weight=_weights(options, logits_NC),
        label_smoothing=options.label_smoothing,
        reduction="none",
    )


def token_cross_entropy(
    logits_NLC: torch.Tensor, labels_NL: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Summed over the labelled tokens of each item, [n]."""
    losses_NL = F.cross_entropy(
        logits_NLC.transpose(1, 2),
        labels_NL,
        weight=_weights(options, logits_NLC),
        ignore_index=IGNORED,
        label_smoothing=options.label_smoothing,
        reduction="none",
    )
    return losses_NL.sum(dim=1)


def binary_cross_entropy(
    logits_NC: torch.Tensor, labels_NC: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Mean over the classes of each item, [n]."""
    targets = labels_NC.to(logits_NC.dtype)
    return F.binary_cross_entropy_with_logits(logits_NC, targets, reduction="none").mean(dim=1)


def squared_error(
    logits_N1: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """(output - value)^2, [n]."""
    return (logits_N1.squeeze(1) - labels.to(logits_N1.dtype)).square()


def span_cross_entropy(
    logits_NL2: torch.Tensor, labels_N2: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Mean of the cross-entropies of start and end over the real tokens, [n].

    Padding is left out, so that the loss does not depend on what an item is batched with.
    """
    logits_NL2 = logits_NL2.masked_fill(~mask[:, :, None], torch.finfo(logits_NL2.dtype).min)
    return F.cross_entropy(logits_NL2, labels_N2, reduction="none").mean(dim=1)


def _weights(options: LossOptions, logits: torch.Tensor) -> torch.Tensor | None:
    return None if options.class_weights is None else options.class_weights.to(logits)


# -- scores --------------------------------------------------------------------------------------


def score_classes(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """Accuracy and its kin; F1 where there are two classes; ranking where there are groups.

    Precision and recall are those of the second of two classes, else macro averages.  Within a
    group candidates rank by their expected class number, which is also what a candidate gains.
    """
    truth = examples.labels
    ids = truth.argmax(axis=1) if truth.ndim == 2 else truth
    binary = len(label_set.names) == 2
    precision, recall, f1 = metrics.precision_recall_f1(
        logits, ids, average="binary" if binary else "macro"
    )
    found = {
        "accuracy": metrics.accuracy(logits, ids),
        "macro_f1": metrics.macro_f1(logits, ids),
        **({"f1": f1} if binary else {}),
        "precision": precision,
        "recall": recall,
        "mcc": metrics.mcc(logits, ids),
        "loss": metrics.log_loss(logits, truth),
    }
    if examples.has("group"):
        groups, places = examples.column("group"), np.arange(logits.shape[1])
        scores = softmax(logits, axis=1) @ places
        gains = truth @ places if truth.ndim == 2 else truth.astype(float)
        found["mrr"] = metrics.mean_reciprocal_rank(scores, ids > 0, groups)
        found["ndcg"] = metrics.mean_ndcg(scores, gains, groups)
    return found


def missing_of_classes(examples: Examples, label_set: LabelSet) -> set[str]:
    """F1 needs two classes, ranking needs groups."""
    missing = {"f1"} if len(label_set.names) != 2 else set()
    return missing if examples.has("group") else missing | {"mrr", "ndcg"}


def score_labels(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    return metrics.multi_label(logits, examples.labels)


def score_values(outputs: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    found = metrics.regression(outputs[:, 0], examples.labels)
    return {**found, "loss": found["mse"]}


def score_tags(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """Against all words of a row; those that were cut off count as predicted to be outside."""
    labelled = examples.labels != IGNORED
    found = predicted_tags(logits, examples, label_set)
    return {
        **metrics.entities(examples.column("tags"), found, label_set.names),
        "loss": metrics.log_loss(logits[labelled], examples.labels[labelled]),
    }


def score_answers(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """SQuAD's F1 and exact match, and the mean loss of a window."""
    truths = [
        [text for text, _ in answer_pairs(value)] or [""] for value in examples.column("answers")
    ]
    found = [answer["answer"] for answer in answer_spans(logits, examples, label_set)]
    losses = [
        -log_softmax(logits[examples[item]].astype(np.float64), axis=0)[place, [0, 1]].mean()
        for item, place in enumerate(examples.labels)
    ]
    return {**metrics.question_answering(found, truths), "loss": float(np.mean(losses))}


def score_relations(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """F1 over the classes that are not the negative one; micro-F1 over all is accuracy."""
    ids = range(len(label_set.names))
    counted = [i for i in ids if label_set.names[i] != label_set.negative]
    truth = examples.labels
    return {
        "micro_f1": metrics.precision_recall_f1(logits, truth, average="micro", classes=counted)[2],
        "macro_f1": metrics.precision_recall_f1(logits, truth, average="macro", classes=counted)[2],
        "accuracy": metrics.accuracy(logits, truth),
        "loss": metrics.log_loss(logits, truth),
    }


# -- answers -------------------------------------------------------------------------------------


def answer_classes(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    probabilities = softmax(logits.astype(np.float64), axis=1)
    best = probabilities.argmax(axis=1)
    return [
        {"label": label_set.names[i], "probability": float(row[i])}
        for i, row in zip(best, probabilities, strict=True)
    ]


def answer_labels(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    return [
        {
            "labels": [label_set.names[i] for i in np.flatnonzero(row > 0.5)],
            "probabilities": dict(zip(label_set.names, map(float, row), strict=True)),
        }
        for row in expit(logits.astype(np.float64))
    ]


def answer_values(outputs: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    return [{"value": float(value)} for value in outputs[:, 0]]


def answer_tags(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    """The tag of every word, and the entities they make up, as word numbers [first, past last]."""
    from seqeval.metrics.sequence_labeling import get_entities

    found = predicted_tags(logits, examples, label_set)
    marked = with_prefixes(found, label_set.names)
    return [
        {
            "tags": tags,
            "entities": [
                {
                    "label": label,
                    "words": [first, last + 1],
                    "text": " ".join(words[first : last + 1]),
                }
                for label, first, last in get_entities(prefixed)
            ],
        }
        for words, tags, prefixed in zip(examples.column("tokens"), found, marked, strict=True)
    ]


def predicted_tags(logits: Floats, examples: Examples, label_set: LabelSet) -> list[list[str]]:
    """One tag per word of every row; for words that were cut off or have no token `O`, or `?`."""
    assert examples.words is not None  # encode_words says where words begin
    outside = "O" if "O" in label_set.names else "?"
    found = [[outside] * len(words) for words in examples.column("tokens")]
    best = logits.argmax(axis=1)
    for item, row in enumerate(examples.rows):
        where = examples[item]
        words = examples.words[where]
        for token in np.flatnonzero(words >= 0):
            found[row][words[token]] = label_set.names[best[where.start + token]]
    return found


def answer_spans(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    """The best span of each question over all its windows, at most `MAX_ANSWER_TOKENS` long.

    Where questions may lack an answer, the empty one wins if its score (first token, the smallest
    over the windows) is higher (Devlin et al. 2019 on SQuAD 2.0).
    """
    assert examples.spans is not None  # encode_windows says which characters a token covers
    contexts = examples.column("context")
    best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(contexts)
    empty = [float("inf")] * len(contexts)
    for item, row in enumerate(examples.rows):
        where = examples[item]
        start, end = logits[where].astype(np.float64).T
        empty[row] = min(empty[row], float(start[0] + end[0]))
        inside = examples.spans[where, 0] >= 0
        if not inside.any():
            continue
        # Sums of a start and each of the next ends, as far as an answer reaches.
        ends = np.where(inside, end, -np.inf)
        ahead = np.pad(ends, (0, MAX_ANSWER_TOKENS - 1), constant_values=-np.inf)
        reach = np.lib.stride_tricks.sliding_window_view(ahead, MAX_ANSWER_TOKENS)
        sums = np.where(inside, start, -np.inf)[:, None] + reach
        first, length = divmod(int(sums.argmax()), MAX_ANSWER_TOKENS)
        if sums[first, length] > best[row][0]:
            spans = examples.spans[where]
            ends_at = spans[first + length, 1]
            best[row] = (float(sums[first, length]), spans[first, 0], ends_at)
    found = []
    for context, (score, begin, past), none in zip(contexts, best, empty, strict=True):
        if score == -np.inf or (label_set.negative == "" and none > score):
            found.append({"answer": "", "start": 0, "end": 0, "score": none})
        else:
            place = {"start": int(begin), "end": int(past)}
            found.append({"answer": context[begin:past], **place, "score": score})
    return found


# -- constant outputs ----------------------------------------------------------------------------


def class_frequencies(train: Examples, label_set: LabelSet) -> Floats:
    """Log share of every class among the training labels; the commonest is always answered."""
    classes = len(label_set.names)
    truth = train.labels
    if truth.ndim == 2:
        shares = truth.mean(axis=0)
    else:
        counts = np.bincount(truth[truth != IGNORED], minlength=classes)
        shares = counts / counts.sum()
    return np.log(np.maximum(shares, 1e-9))


def label_frequencies(train: Examples, label_set: LabelSet) -> Floats:
    shares = train.labels.mean(axis=0).clip(1e-9, 1 - 1e-9)
    return np.log(shares / (1 - shares))


def mean_value(train: Examples, label_set: LabelSet) -> Floats:
    return np.array([train.labels.mean()])


def no_constant(train: Examples, label_set: LabelSet) -> None:
    """Nothing sensible can be answered without looking at the input."""


# -- checks across fields ------------------------------------------------------------------------


def nothing(table: pa.Table) -> Iterator[str]:
    yield from ()


def check_tags(table: pa.Table) -> Iterator[str]:
    """As many tags as words; a predicate that is one clear word."""
    fields = [name for name in ("tokens", "tags", "predicate") if name in table.column_names]
    for number, row in enumerate(table.select(fields).to_pylist(), start=1):
        words, tags = row["tokens"], row.get("tags")
        if tags is not None and len(words) != len(tags):
            yield f"row {number} has {len(words)} tokens and {len(tags)} tags; each needs one"
            return
        predicate = row.get("predicate")
        if "predicate" in row and encoding.predicate_position(words, predicate) is None:
            yield (
                f"row {number}: the predicate {predicate!r} is not one clear word of the row; "
                "give its number, from 0"
            )
            return


def check_spans(table: pa.Table) -> Iterator[str]:
    """Entities lie inside their text."""
    for number, row in enumerate(table.to_pylist(), start=1):
        for entity in ("subject", "object"):
            start, end = row[f"{entity}_start"], row[f"{entity}_end"]
            if not start < end <= len(row["text"]):
                yield (
                    f"row {number}: the {entity} [{start}, {end}) is no span of the text, which "
                    f"has {len(row['text'])} characters"
                )
                return


def check_answers(table: pa.Table) -> Iterator[str]:
    """Answers stand in their context where they say."""
    if "answers" not in table.column_names or table.column("answers").null_count:
        return
    for number, row in enumerate(table.select(["context", "answers"]).to_pylist(), start=1):
        for text, start in answer_pairs(row["answers"]):
            if start < 0 or row["context"][start : start + len(text)] != text:
                yield (
                    f"row {number}: the answer {text[:60]!r} does not stand at character {start} "
                    "of its context; mend answer_start"
                )
                return


TASKS = {
    task.name: task
    for task in (
        Task(
            name="text-classification",
            fields=Fields(
                inputs={"text": kinds.text},
                optional={"text_pair": kinds.text, "group": kinds.group_key},
                target={"label": kinds.class_label},
                together=nothing,
            ),
            encode=encoding.encode_texts,
            label=labels.class_ids,
            auto_model="AutoModelForSequenceClassification",
            problem_type="single_label_classification",
            loss=cross_entropy,
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
            missing_metrics=missing_of_classes,
            score=score_classes,
            answer=answer_classes,
            constant=class_frequencies,
        ),
        Task(
            name="multi-label",
            fields=Fields(
                inputs={"text": kinds.text},
                optional={"text_pair": kinds.text},
                target={"labels": kinds.class_labels},
                together=nothing,
            ),
            encode=encoding.encode_texts,
            label=labels.membership,
            auto_model="AutoModelForSequenceClassification",
            problem_type="multi_label_classification",
            loss=binary_cross_entropy,
            metrics={
                "micro_f1": "maximize",
                "macro_f1": "maximize",
                "subset_accuracy": "maximize",
                "map": "maximize",
                "loss": "minimize",
            },
            score=score_labels,
            answer=answer_labels,
            constant=label_frequencies,
            label_options=False,
        ),
        Task(
            name="regression",
            fields=Fields(
                inputs={"text": kinds.text},
                optional={"text_pair": kinds.text},
                target={"label": kinds.number},
                together=nothing,
            ),
            encode=encoding.encode_texts,
            label=labels.values,
            auto_model="AutoModelForSequenceClassification",
            problem_type="regression",
            loss=squared_error,
            metrics={
                "spearman": "maximize",
                "pearson": "maximize",
                "mse": "minimize",
                "mae": "minimize",
                "loss": "minimize",
            },
            score=score_values,
            answer=answer_values,
            constant=mean_value,
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
                together=check_tags,
            ),
            encode=encoding.encode_words,
            label=labels.tag_ids,
            auto_model="AutoModelForTokenClassification",
            loss=token_cross_entropy,
            metrics={
                "f1": "maximize",
                "precision": "maximize",
                "recall": "maximize",
                "accuracy": "maximize",
                "loss": "minimize",
            },
            score=score_tags,
            answer=answer_tags,
            constant=class_frequencies,
            per_token=True,
        ),
        Task(
            name="question-answering",
            fields=Fields(
                inputs={"question": kinds.text, "context": kinds.text},
                optional={},
                target={"answers": kinds.answers},
                together=check_answers,
            ),
            encode=encoding.encode_windows,
            label=labels.answer_positions,
            auto_model="AutoModelForQuestionAnswering",
            loss=span_cross_entropy,
            metrics={"f1": "maximize", "exact_match": "maximize", "loss": "minimize"},
            score=score_answers,
            answer=answer_spans,
            constant=no_constant,
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
                together=check_spans,
            ),
            encode=encoding.encode_marked,
            label=labels.class_ids,
            auto_model="AutoModelForSequenceClassification",
            problem_type="single_label_classification",
            loss=cross_entropy,
            metrics={
                "micro_f1": "maximize",
                "macro_f1": "maximize",
                "accuracy": "maximize",
                "loss": "minimize",
            },
            negative_label=True,
            score=score_relations,
            answer=answer_classes,
            constant=class_frequencies,
        ),
    )
}
