"""The winner's answers on the validation split: what it confuses, and where it is most wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_ray.analysis.report.run import Run
from sft_ray.analysis.results import reading
from sft_ray.run_store import BEST, PREDICTIONS
from sft_ray.squad import normalize_answer
from sft_ray.tags import with_prefixes

MATRIX_UP_TO = 15  # classes; above, the commonest confusions are listed
COMMONEST = 20  # confusions listed
HARDEST = 20
MOST_POINTS = 5000  # of a scatter
MEASURES = {
    "text-classification": "probability",
    "relation-extraction": "probability",
    "multi-label": "loss",
    "regression": "error",
    "token-classification": "wrong words",
    "question-answering": "score",
}
TINY = 1e-12  # a probability of 0 would cost infinitely much

Row = Mapping[str, Any]
Items = Sequence[Set[tuple[str, Hashable]]]  # of every row: (name, place)


@dataclass(frozen=True)
class ClassScore:
    """How well one class, label or kind of entity is found.

    Attributes:
        support: how often it is true.
        precision, recall, f1: None where nothing was predicted or nothing is true.
    """

    name: str
    support: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Confusion:
    """Rows of one class that were taken for another."""

    truth: str
    predicted: str
    count: int


@dataclass(frozen=True)
class Hard:
    """One row that the winner gets wrong, or nearly so.

    Attributes:
        row: number in the split, from 1.
        shown: what the model read, by field.
        wrong: whether the answer is wrong; None where an answer is only near or far.
        note: how sure or how far off it was.
    """

    row: int
    shown: dict[str, str]
    truth: str
    predicted: str
    wrong: bool | None
    note: str


@dataclass(frozen=True)
class Answers:
    """What predictions.parquet tells; parts that a task does not have are empty.

    Attributes:
        rows, wrong: of the split; `wrong` is None for regression.
        measure: what the notes of `hardest` tell.
        labels: rows and columns of `matrix`, which counts truth by prediction.
        points: (true value, predicted value), at most `MOST_POINTS`, evenly over the rows.
    """

    rows: int
    wrong: int | None
    measure: str
    hardest: list[Hard]
    classes: list[ClassScore]
    labels: list[str]
    matrix: list[list[int]]
    confusions: list[Confusion]
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class _Judged:
    """A row's answer: how wrong, for ranking, and in words."""

    rank: tuple[float, ...]
    truth: str
    predicted: str
    wrong: bool | None
    note: str


def answers(run: Run) -> Answers | None:
    """Of a finished run's `predictions.parquet`; None if there is none, or for a task of your own.

    Raises:
        ConfigError: the file is damaged.
    """
    content = run.store.read_bytes(PREDICTIONS)
    if content is None or run.experiment.task not in MEASURES:
        return None
    config = run.store.read_json(f"{BEST}/config.json") or {}
    with reading(run.store.path_of(PREDICTIONS)):
        names = {int(place): name for place, name in config.get("id2label", {}).items()}
        table = pq.read_table(pa.BufferReader(content)).to_pylist()
        return judge(run.experiment.task, table, names)


def judge(task: str, rows: Sequence[Row], names: Mapping[int, str]) -> Answers:
    """What the answers to a split tell.

    Args:
        rows: the fields of the task, and `predicted_<name>` for each part of an answer.
        names: class number -> name, for labels that are probabilities over the classes.
    """
    truths, found = _items(task, rows, names)
    judges: dict[str, Callable[[Row], _Judged]] = {
        "text-classification": lambda row: _judge_class(row, names),
        "relation-extraction": lambda row: _judge_class(row, names),
        "multi-label": _judge_labels,
        "regression": _judge_value,
        "token-classification": lambda row: _judge_tags(row, names),
        "question-answering": _judge_answer,
    }
    judged = [judges[task](row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (judged[i].rank, i))[:HARDEST]
    hardest = [
        Hard(i + 1, _shown(rows[i]), one.truth, one.predicted, one.wrong, one.note)
        for i in order
        for one in [judged[i]]
    ]
    wrong = None if task == "regression" else sum(bool(one.wrong) for one in judged)
    classes = class_scores(truths, found)
    labels: list[str] = []
    matrix: list[list[int]] = []
    confusions: list[Confusion] = []
    if task in ("text-classification", "relation-extraction"):
        pairs = [(one.truth, one.predicted) for one in judged]
        confusions = commonest_confusions(pairs)
        labels = _in_order({name for pair in pairs for name in pair}, names)
        if len(labels) <= MATRIX_UP_TO:
            counts = Counter(pairs)
            matrix = [[counts[truth, found] for found in labels] for truth in labels]
    points = []
    if task == "regression":
        step = math.ceil(len(rows) / MOST_POINTS) or 1
        points = [(float(row["label"]), float(row["predicted_value"])) for row in rows[::step]]
    return Answers(
        len(rows), wrong, MEASURES[task], hardest, classes, labels, matrix, confusions, points
    )


def class_scores(truths: Items, found: Items) -> list[ClassScore]:
    """Precision, recall and F1 per name; the commonest first.

    Args:
        truths, found: of every row the (name, place) pairs that are true and that were predicted.
    """
    true, predicted, both = Counter[str](), Counter[str](), Counter[str]()
    for is_true, was_found in zip(truths, found, strict=True):
        true.update(name for name, _ in is_true)
        predicted.update(name for name, _ in was_found)
        both.update(name for name, _ in is_true & was_found)
    names = sorted({*true, *predicted}, key=lambda name: (-true[name], name))
    return [
        ClassScore(
            name,
            true[name],
            precision=both[name] / predicted[name] if predicted[name] else None,
            recall=both[name] / true[name] if true[name] else None,
            f1=2 * both[name] / (true[name] + predicted[name]),
        )
        for name in names
    ]


def commonest_confusions(pairs: Iterable[tuple[str, str]]) -> list[Confusion]:
    """Of (truth, predicted); the commonest first, at most `COMMONEST`."""
    counts = Counter(pair for pair in pairs if pair[0] != pair[1])
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Confusion(*pair, count) for pair, count in ordered[:COMMONEST]]


def entities(tags: Sequence[str], names: Collection[str]) -> list[tuple[str, tuple[int, int]]]:
    """Of a row of tags its (kind, (first word, past the last)), as the task's metrics read them.

    Args:
        names: of all tags there are.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    [row] = with_prefixes([[str(tag) for tag in tags]], names)
    return [(kind, (first, last + 1)) for kind, first, last in get_entities(row)]


# -- one row -------------------------------------------------------------------------------------


def _judge_class(row: Row, names: Mapping[int, str]) -> _Judged:
    """Wrong and sure of it first; then right and unsure."""
    truth, predicted = _class_of(row["label"], names), row["predicted_label"]
    probability, wrong = row["predicted_probability"], truth != predicted
    rank = (0.0, -probability) if wrong else (1.0, probability)
    return _Judged(rank, truth, predicted, wrong, f"{probability:.3f}")


def _judge_labels(row: Row) -> _Judged:
    """By the loss: the mean over the labels of -log of the probability of what is true."""
    truth, predicted = set(row["labels"]), set(row["predicted_labels"])
    probabilities: dict[str, float] = row["predicted_probabilities"]
    losses = [
        -math.log(max(p if name in truth else 1 - p, TINY)) for name, p in probabilities.items()
    ]
    loss = sum(losses) / len(losses)
    wrong = truth != predicted
    words = ", ".join(sorted(truth)) or "none", ", ".join(sorted(predicted)) or "none"
    return _Judged((0.0 if wrong else 1.0, -loss), *words, wrong, f"{loss:.3f}")


def _judge_value(row: Row) -> _Judged:
    truth, predicted = float(row["label"]), float(row["predicted_value"])
    error = predicted - truth
    return _Judged((-abs(error),), f"{truth:.4g}", f"{predicted:.4g}", None, f"{error:+.3g}")


def _judge_tags(row: Row, names: Mapping[int, str]) -> _Judged:
    """By the words that have the wrong tag."""
    words, truth, predicted = row["tokens"], row["tags"], row["predicted_tags"]
    wrong = sum(str(a) != b for a, b in zip(truth, predicted, strict=True))
    return _Judged(
        (-wrong, -wrong / max(len(words), 1)),
        _entity_words(words, entities(truth, names.values())),
        _entity_words(words, entities(predicted, names.values())),
        wrong > 0,
        f"{wrong} of {len(words)}",
    )


def _judge_answer(row: Row) -> _Judged:
    """Wrong and sure of it first."""
    truths, predicted = _answer_texts(row["answers"]), row["predicted_answer"]
    right = {normalize_answer(text) for text in truths or [""]}
    wrong = normalize_answer(predicted) not in right
    score = float(row["predicted_score"])
    words = " / ".join(dict.fromkeys(truths)) or "no answer", predicted or "no answer"
    rank = (0.0, -score) if wrong else (1.0, score)
    return _Judged(rank, *words, wrong, f"{score:.2f}")


def _items(task: str, rows: Sequence[Row], names: Mapping[int, str]) -> tuple[Items, Items]:
    """What is to be found in every row, and what was."""
    if task in ("text-classification", "relation-extraction"):
        truths = [{(_class_of(row["label"], names), 0)} for row in rows]
        return truths, [{(row["predicted_label"], 0)} for row in rows]
    if task == "multi-label":
        return (
            [{(name, 0) for name in row["labels"]} for row in rows],
            [{(name, 0) for name in row["predicted_labels"]} for row in rows],
        )
    if task == "token-classification":
        return (
            [{*entities(row["tags"], names.values())} for row in rows],
            [{*entities(row["predicted_tags"], names.values())} for row in rows],
        )
    return [], []


def _class_of(label: Any, names: Mapping[int, str]) -> str:
    """A name as it is; of probabilities the likeliest class."""
    if isinstance(label, list):
        place = max(range(len(label)), key=label.__getitem__)
        return names.get(place, str(place))
    return str(label)


def _in_order(found: set[str], names: Mapping[int, str]) -> list[str]:
    """The model's order where it is known."""
    places = {name: place for place, name in names.items()}
    return sorted(found, key=lambda name: (places.get(name, len(places)), name))


def _entity_words(words: Sequence[str], found: Iterable[tuple[str, tuple[int, int]]]) -> str:
    """`Marie Curie (PER), Paris (LOC)`."""
    named = [f"{' '.join(words[first:past])} ({kind})" for kind, (first, past) in found]
    return ", ".join(named) or "none"


def _answer_texts(value: Any) -> list[str]:
    """Of either of SQuAD's formats."""
    if isinstance(value, list):
        return [answer["text"] for answer in value]
    return list(value["text"])


def _shown(row: Row) -> dict[str, str]:
    """The inputs of a row in words; where a relation's entities stand, they themselves."""
    found = {}
    for name, value in row.items():
        if name.startswith("predicted_") or name in ("label", "labels", "tags", "answers"):
            continue
        if name.endswith("_start") and f"{name.removesuffix('_start')}_end" in row:
            entity = name.removesuffix("_start")
            found[entity] = row["text"][value : row[f"{entity}_end"]]
        elif not name.endswith("_end"):
            found[name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
