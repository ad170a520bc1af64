"""What a table is about: its task and which column is what, each with the reason.

A guess is made from types, counts and names, never from a model; the user reads and mends it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sft_ray.errors import DataError
from sft_ray.screen import count
from sft_ray.training import columns as kinds

# Names by which people call things, best first.
TEXTS: tuple[str, ...] = (
    "text",
    "sentence",
    "review",
    "content",
    "body",
    "message",
    "comment",
    "utterance",
)
TEXTS += ("question", "query", "tweet", "title", "document", "文本", "内容", "句子")
LABELS: tuple[str, ...] = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "sentiment",
    "intent",
    "topic",
    "stars",
)
LABELS += ("rating", "score", "similarity", "relation", "type", "y", "gold", "标签", "类别", "情感")
PAIRS: tuple[tuple[str, str], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("question", "answer"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
)
NOT_LABELS = ("id", "idx", "index", "guid", "uid", "uuid", "date", "time", "timestamp", "url")
MOST_CLASSES = 20  # of whole numbers without regard to which
MOST_RUNNING_CLASSES = 300  # of whole numbers that run from 0 or 1 without a gap
ROWS_PER_CLASS = 4  # fewer on average: not a label, but something of its own for each row
SHOWN = 4  # labels in a reason


@dataclass(frozen=True)
class Guess:
    """A task and its columns.

    Attributes:
        columns: field of the task -> column, or [start, end] columns.
        reasons: "task" and the fields -> why, in words.
        unused: columns that nothing was found for.
        imbalance: share of the commonest class, 0 for tasks without classes.
    """

    task: str
    columns: dict[str, str | list[str]]
    reasons: dict[str, str]
    unused: list[str]
    imbalance: float = 0.0


def guess_task(table: pa.Table, where: str, task: str | None = None) -> Guess:
    """Look at all columns of a table.

    Args:
        where: how messages call the table.
        task: the task that is wanted; None to find it.

    Raises:
        DataError: nothing fits; says what every column holds.
    """
    if table.num_rows == 0:
        raise DataError(f"{where}: has no rows")
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise DataError(f"{where}: the column {name!r} stands twice; rename one of them")
    columns = [Column(name, table.column(name)) for name in table.column_names]
    foreign = [column.name for column in columns if pa.types.is_binary(column.values.type)]
    if foreign and where.lower().endswith((".csv", ".tsv")):
        raise DataError(f"{where}: the column {foreign[0]!r} is not UTF-8; save the file as UTF-8")
    for name, find in FINDERS.items():
        found = find(columns) if task in (None, name) else None
        if found is not None:
            used = set(_flat(found.columns.values()))
            unused = [column.name for column in columns if column.name not in used]
            return Guess(name, found.columns, found.reasons, unused, found.imbalance)
    seen = "; ".join(f"{column.name}: {column.described}" for column in columns)
    wanted = f"the columns of {task}" if task else "a text and something to learn"
    by_hand = "write the experiment by hand, docs/tasks.md shows what each task reads"
    mend = "save the file as UTF-8" if foreign else by_hand
    raise DataError(f"{where}: cannot tell {wanted} from the columns ({seen}); {mend}")


@dataclass(frozen=True)
class Column:
    """One column with what can be said of it."""

    name: str
    values: pa.ChunkedArray

    @property
    def plain_name(self) -> str:
        return self.name.strip().lower()

    @cached_property
    def is_text(self) -> bool:
        return kinds.is_text(self.values.type)

    @cached_property
    def is_whole(self) -> bool:
        return bool(pa.types.is_integer(self.values.type))

    @cached_property
    def is_fraction(self) -> bool:
        return bool(pa.types.is_floating(self.values.type) or pa.types.is_decimal(self.values.type))

    @cached_property
    def is_list(self) -> bool:
        return kinds.is_list(self.values.type)

    @cached_property
    def characters(self) -> float:
        """On average, of a text."""
        return float(pc.mean(pc.utf8_length(self.values.cast(pa.large_string()))).as_py() or 0)

    @cached_property
    def counts(self) -> dict[Any, int]:
        """How often each value occurs, commonest first; of lists, each value inside."""
        values = self.values.combine_chunks()
        values = pc.list_flatten(values) if self.is_list else values
        found = {row["values"].as_py(): row["counts"].as_py() for row in pc.value_counts(values)}
        found.pop(None, None)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @cached_property
    def lengths(self) -> list[int | None]:
        """Of lists."""
        found: list[int | None] = pc.list_value_length(self.values).to_pylist()
        return found

    @property
    def described(self) -> str:
        if self.is_text:
            return f"texts of {self.characters:.0f} characters on average, {self._distinct}"
        if self.is_whole or self.is_fraction:
            return f"{'whole numbers' if self.is_whole else 'numbers'}, {self._distinct}"
        return str(self.values.type)

    @property
    def _distinct(self) -> str:
        return f"{len(self.counts):,} different"

    def could_be_label(self) -> bool:
        """Whether values repeat as names of classes do."""
        if not kinds.is_name(self.values.type) or self.plain_name in NOT_LABELS:
            return False
        distinct, rows = len(self.counts), len(self.values)
        if distinct < 2 or rows < 2 * distinct:
            return False
        if self.is_whole:
            return distinct <= MOST_CLASSES or (
                distinct <= MOST_RUNNING_CLASSES
                and rows >= ROWS_PER_CLASS * distinct
                and max(self.counts) - min(self.counts) == distinct - 1
                and min(self.counts) in (0, 1)
            )
        return self.characters <= 60 if self.is_text else True

    def has(self, kind: kinds.Kind) -> bool:
        """Whether all values are of a kind that a task reads."""
        return not list(itertools.islice(kind(self.values), 1))


def labels_in_words(counts: dict[Any, int]) -> str:
    """`5 labels: good (40 %), bad (30 %), …`."""
    total = sum(counts.values())
    first = list(counts.items())[:SHOWN]
    shown = ", ".join(f"{str(name)[:30]} ({n / total:.0%})".replace("%", " %") for name, n in first)
    return f"{count(len(counts), 'label')}: {shown}{', …' if len(counts) > SHOWN else ''}"


def _flat(columns: Any) -> Iterator[str]:
    for column in columns:
        yield from column if isinstance(column, list) else [column]


def _ranked(columns: list[Column], names: tuple[str, ...]) -> list[Column]:
    """Columns with a usual name first, in the order of the names; a part of a name counts less."""

    def rank(column: Column) -> tuple[int, int]:
        if column.plain_name in names:
            return 0, names.index(column.plain_name)
        parts = column.plain_name.replace("-", "_").split("_")
        inside = [names.index(part) for part in parts if part in names]
        return (1, min(inside)) if inside else (2, 0)

    return sorted(columns, key=rank)


def _text_of(columns: list[Column]) -> Column | None:
    """The column of the texts: by its name, else the longest texts."""
    texts = [column for column in columns if column.is_text and column.characters > 0]
    named = [column for column in texts if column.plain_name in TEXTS]
    if named:
        return _ranked(named, TEXTS)[0]
    return max(texts, key=lambda column: column.characters, default=None)


def _text_reason(column: Column) -> str:
    by_name = ", by its name" if column.plain_name in TEXTS else ", the longest texts"
    return f"texts of {column.characters:.0f} characters on average{by_name}"


# -- one finder per task: columns to a guess, or None --------------------------------------------


def find_answers(columns: list[Column]) -> Guess | None:
    """A column of {text, answer_start}, and two of texts."""
    answers = next((c for c in columns if c.has(kinds.answers)), None)
    texts = sorted(
        (c for c in columns if c.is_text and c.plain_name not in NOT_LABELS),
        key=lambda c: -c.characters,
    )
    if answers is None or len(texts) < 2:
        return None
    context = next((c for c in texts if c.plain_name == "context"), texts[0])
    rest = [c for c in texts if c is not context]
    question = next((c for c in rest if c.plain_name == "question"), rest[0])
    return Guess(
        "question-answering",
        {"question": question.name, "context": context.name, "answers": answers.name},
        {
            "task": f"{answers.name} holds answers with their place in a text",
            "question": _text_reason(question),
            "context": f"texts of {context.characters:.0f} characters on average",
            "answers": "text and answer_start, as SQuAD has them",
        },
        [],
    )


def find_tags(columns: list[Column]) -> Guess | None:
    """Two columns of lists that are equally long in every row: words, and few different tags."""
    lists = [c for c in columns if c.is_list]
    for words in (c for c in lists if c.has(kinds.words)):
        for tags in (c for c in lists if c is not words and c.has(kinds.tags)):
            if words.lengths == tags.lengths and 2 <= len(tags.counts) < len(words.counts):
                found: dict[str, str | list[str]] = {"tokens": words.name, "tags": tags.name}
                reasons = {
                    "task": f"{words.name} and {tags.name} are equally long lists in every row",
                    "tokens": f"{len(words.counts):,} different words",
                    "tags": labels_in_words(tags.counts),
                }
                predicate = next((c for c in columns if c.plain_name == "predicate"), None)
                if predicate is not None and predicate.has(kinds.word_place):
                    found["predicate"] = predicate.name
                    reasons["predicate"] = "by its name; it is marked in the text"
                return Guess("token-classification", found, reasons, [])
    return None


def find_relations(columns: list[Column]) -> Guess | None:
    """A text, two pairs of columns X_start and X_end, and a label."""
    by_name = {c.plain_name: c for c in columns if c.is_whole}
    pairs = [
        [start.name, by_name[f"{stem}_end"].name]
        for stem, start in (
            (name.removesuffix("_start"), column)
            for name, column in by_name.items()
            if name.endswith("_start")
        )
        if f"{stem}_end" in by_name
    ]
    text = _text_of(columns)
    label = _label_of([c for c in columns if c is not text and not c.plain_name.endswith("_end")])
    if len(pairs) != 2 or text is None or label is None:
        return None
    first, second = pairs
    if first[0].lower().startswith(("object", "tail", "obj")):
        first, second = second, first
    found: dict[str, str | list[str]] = {
        "text": text.name,
        "subject": first,
        "object": second,
        "label": label.name,
    }
    reasons = {
        "task": "two pairs of columns say where two entities stand in the text",
        "text": _text_reason(text),
        "subject": "characters of the first entity",
        "object": "characters of the second entity",
        "label": labels_in_words(label.counts),
    }
    return Guess("relation-extraction", found, reasons, [], _imbalance(label))


def find_several_labels(columns: list[Column]) -> Guess | None:
    """A text and a list of names per row."""
    text = _text_of(columns)
    lists = [c for c in columns if c.is_list and c.has(kinds.class_labels) and c.counts]
    if text is None or not lists:
        return None
    labels = _ranked(lists, LABELS)[0]
    reasons = {
        "task": f"{labels.name} holds a list of labels per row",
        "text": _text_reason(text),
        "labels": labels_in_words(labels.counts),
    }
    return Guess("multi-label", {"text": text.name, "labels": labels.name}, reasons, [])


def find_classes(columns: list[Column]) -> Guess | None:
    """A text or two, and one label or list of probabilities per row."""
    texts, reasons = _texts(columns)
    rest = [c for c in columns if c.name not in texts.values()]
    label = _label_of(rest)
    if not texts or label is None:
        return None
    if label.is_list:
        reasons |= {"task": f"{label.name} holds probabilities", "label": "they sum to 1"}
        return Guess("text-classification", {**texts, "label": label.name}, reasons, [])
    what = "whole numbers" if label.is_whole else "values"
    why = f"{label.name} repeats {len(label.counts)} different {what}"
    if label.is_whole and len(label.counts) > 2:
        why += "; where their order matters, say --task regression"
    reasons |= {"task": why, "label": labels_in_words(label.counts)}
    columns_of: dict[str, str | list[str]] = {**texts, "label": label.name}
    return Guess("text-classification", columns_of, reasons, [], _imbalance(label))


def find_values(columns: list[Column]) -> Guess | None:
    """A text or two, and one number per row."""
    texts, reasons = _texts(columns)
    numbers = [
        c
        for c in columns
        if (c.is_whole or c.is_fraction) and c.plain_name not in NOT_LABELS and len(c.counts) > 1
    ]
    if not texts or not numbers:
        return None
    value = _ranked(numbers, LABELS)[0]
    low, high = min(value.counts), max(value.counts)
    reasons |= {
        "task": f"{value.name} holds numbers, {len(value.counts):,} different ones",
        "label": f"from {low:g} to {high:g}",
    }
    return Guess("regression", {**texts, "label": value.name}, reasons, [])


def _texts(columns: list[Column]) -> tuple[dict[str, str | list[str]], dict[str, str]]:
    """`text`, and `text_pair` where two columns are called as pairs are."""
    by_name = {c.plain_name: c for c in columns if c.is_text}
    for first, second in PAIRS:
        if first in by_name and second in by_name and not by_name[second].could_be_label():
            one, other = by_name[first], by_name[second]
            why = f"{one.name} and {other.name} are called as pairs of texts are"
            return {"text": one.name, "text_pair": other.name}, {"text": why, "text_pair": why}
    label = _label_of(columns)
    text = _text_of([c for c in columns if c is not label]) or _text_of(columns)
    if text is None:
        return {}, {}
    return {"text": text.name}, {"text": _text_reason(text)}


def _label_of(columns: list[Column]) -> Column | None:
    """The column of the labels: by its name, else the one with the fewest different values."""
    soft = [
        c
        for c in columns
        if c.is_list and pa.types.is_floating(c.values.type.value_type) and c.has(kinds.class_label)
    ]
    able = sorted((c for c in columns if c.could_be_label()), key=lambda c: len(c.counts))
    ranked = _ranked([*able, *soft], LABELS)
    return ranked[0] if ranked else None


def _imbalance(label: Column) -> float:
    return next(iter(label.counts.values())) / sum(label.counts.values())


FINDERS: dict[str, Callable[[list[Column]], Guess | None]] = {
    "question-answering": find_answers,
    "token-classification": find_tags,
    "relation-extraction": find_relations,
    "multi-label": find_several_labels,
    "text-classification": find_classes,
    "regression": find_values,
}
