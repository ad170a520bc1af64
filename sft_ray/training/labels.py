"""From label columns to names and numbers; the training split defines the classes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_ray.config import label_name
from sft_ray.errors import DataError
from sft_ray.training.columns import answer_pairs, is_list, is_text
from sft_ray.training.encoding import Encoded
from sft_ray.training.examples import IGNORED, LabelSet

RANKING = ("mrr", "ndcg")  # metrics that look at the order of the classes


def choose_classes(
    train: pa.Table, field: str, known: tuple[str, ...] | None, column: str
) -> tuple[str, ...]:
    """The classes in their order: `known`, else the sorted labels of the training split.

    Args:
        column: how the data calls the field.

    Raises:
        DataError: fewer than two classes, tags without names, or labels that can be none.
    """
    values = train.column(field)
    if _are_probabilities(values.type):
        width = len(values[0])
        if known is not None and len(known) != width:
            raise DataError(
                f"data.label_names: {width} names are needed, one per probability, got {len(known)}"
            )
        return known or tuple(str(i) for i in range(width))
    found = _one_by_one(values)
    if known is None and are_nameless(train, field):
        raise DataError(
            f"data.label_names: the tags in {column!r} are whole numbers; name them in the order "
            "of their numbers, O included"
        )
    present = sorted(set(found.to_pylist()))
    if len(present) < 2:
        got = f"only {str(present[0])[:60]!r}" if present else "none"
        raise DataError(
            f"data: at least two labels are needed in the training split, got {got} in {column!r}"
        )
    if len(present) == len(found) > 20:
        raise DataError(
            f"data: all {len(present)} labels in {column!r} differ; is it the column of the labels?"
        )
    return known or tuple(label_name(value) for value in present)


def check_values(train: pa.Table, field: str, column: str) -> None:
    """Numbers that are all the same cannot be learned.

    Raises:
        DataError: they are.
    """
    values = train.column(field)
    if pc.count_distinct(values).as_py() < 2:
        raise DataError(
            "data: at least two different values are needed in the training split, got only "
            f"{values[0].as_py()} in {column!r}"
        )


def are_nameless(train: pa.Table, field: str) -> bool:
    """Whether labels are tags in numbers, of which no order says which is O."""
    return field == "tags" and pa.types.is_integer(_one_by_one(train.column(field)).type)


def are_grades(classes: tuple[str, ...]) -> bool:
    """Whether names are whole numbers, which have an order of their own."""
    return all(name.removeprefix("-").isdecimal() for name in classes)


def check_order(
    train: pa.Table, classes: tuple[str, ...], known: tuple[str, ...] | None, objective: str
) -> None:
    """Ranking takes every class but the first for relevant; texts have no order of their own.

    Raises:
        DataError: the alphabet would decide.
    """
    if "group" not in train.column_names:  # nor a metric that ranks
        return
    is_ordered = known is not None or are_grades(classes) or not is_text(train["label"].type)
    if not is_ordered and [name.lower() for name in classes] != ["false", "true"]:
        raise DataError(
            f"search.objective: {objective} takes all labels but the first for relevant, and texts "
            f"stand in alphabetical order, {', '.join(map(repr, classes[:10]))}; list them in "
            "data.label_names, from irrelevant to most relevant"
        )


def with_names(table: pa.Table, field: str, known: tuple[str, ...] | None, where: str) -> pa.Table:
    """The table with class labels as names; whole numbers are places in `known` if it is given.

    Raises:
        DataError: a number that is no place in `known`.
    """
    values = table.column(field)
    if _are_probabilities(values.type):
        return table
    rows = values.to_pylist()

    def name(value: Any) -> str:
        if known is None or not isinstance(value, int) or isinstance(value, bool):
            return label_name(value)
        if not 0 <= value < len(known):
            raise DataError(
                f"{where}: the label {value} has no name among {len(known)} data.label_names; "
                f"labels run from 0 to {len(known) - 1}"
            )
        return known[value]

    if is_list(values.type):
        column = pa.array([[name(v) for v in row] for row in rows], pa.list_(pa.string()))
    else:
        column = pa.array([name(value) for value in rows], pa.string())
    return table.set_column(table.column_names.index(field), field, column)


def unknown_names(table: pa.Table, field: str, classes: tuple[str, ...]) -> Counter[str]:
    """How often labels of a named table occur that are not among `classes`."""
    values = table.column(field)
    if _are_probabilities(values.type):
        return Counter()
    found = _one_by_one(values)
    known = set(classes)
    return Counter(name for name in found.to_pylist() if name not in known)


def check_names(
    table: pa.Table, field: str, classes: tuple[str, ...], where: str, *, listed: bool = False
) -> None:
    """Every label of a named table must be one of `classes`.

    Args:
        listed: the classes are those of data.label_names, and not what training found.

    Raises:
        DataError: the commonest label that is not, or too few or many probabilities.
    """
    values = table.column(field)
    if _are_probabilities(values.type) and (
        widths := {len(row) for row in values.to_pylist()} - {len(classes)}
    ):
        raise DataError(
            f"{where}: every row needs {len(classes)} probabilities, got {widths.pop()}"
        )
    if unknown := unknown_names(table, field, classes):
        label, count = unknown.most_common(1)[0]
        names = ", ".join(map(repr, classes[:10]))
        known, mend = "the training labels", "mend the label or the split"
        if listed:
            known, mend = "data.label_names", "add it there, or mend the label"
        raise DataError(
            f"{where}: the label {label[:60]!r} ({count} times) is not among {known} {names}; "
            f"{mend}"
        )


def _one_by_one(values: pa.ChunkedArray) -> Any:
    """The labels of all rows, whether a row has one or a list of them."""
    return values.combine_chunks().flatten() if is_list(values.type) else values


def _are_probabilities(kind: pa.DataType) -> bool:
    return bool(is_list(kind) and pa.types.is_floating(kind.value_type))


def class_ids(table: pa.Table, encoded: Encoded, labels: LabelSet) -> npt.NDArray[Any]:
    """Class ids, [n], or probabilities, [n, classes]."""
    values = table.column("label")
    if is_list(values.type):
        return np.array(values.to_pylist(), dtype=np.float64)
    return np.array([labels.id_of[name] for name in values.to_pylist()], dtype=np.int64)


def membership(table: pa.Table, encoded: Encoded, labels: LabelSet) -> npt.NDArray[Any]:
    """1 for every class that a row has, [n, classes]."""
    rows = table.column("labels").to_pylist()
    found = np.zeros((len(rows), len(labels.names)), dtype=np.uint8)
    for row, names in enumerate(rows):
        found[row, [labels.id_of[name] for name in names]] = 1
    return found


def values(table: pa.Table, encoded: Encoded, labels: LabelSet) -> npt.NDArray[Any]:
    """Numbers, [n]."""
    return np.array(table.column("label").to_pylist(), dtype=np.float64)


def tag_ids(table: pa.Table, encoded: Encoded, labels: LabelSet) -> npt.NDArray[Any]:
    """The id of a word's tag on its first token, `IGNORED` on others, [total]."""
    assert encoded.words is not None  # encode_words says where words begin
    tags_of_rows = table.column("tags").to_pylist()
    of_row = [
        np.array([labels.id_of[tag] for tag in tags], dtype=np.int64) for tags in tags_of_rows
    ]
    found = np.full(len(encoded.tokens), IGNORED, dtype=np.int64)
    for item in range(len(encoded)):
        where = encoded[item]
        words = encoded.words[where]
        found[where][words >= 0] = of_row[encoded.rows[item]][words[words >= 0]]
    return found


def answer_positions(table: pa.Table, encoded: Encoded, labels: LabelSet) -> npt.NDArray[Any]:
    """First and last token of the first answer in each window, [n, 2]; 0, 0 where it is not."""
    assert encoded.spans is not None  # encode_windows says which characters a token covers
    answers = [answer_pairs(value) for value in table.column("answers").to_pylist()]
    found = np.zeros((len(encoded), 2), dtype=np.int64)
    changes = encoded.rows[1:] != encoded.rows[:-1]
    first_window, last_window = np.append(True, changes), np.append(changes, True)
    for item in range(len(encoded)):
        pairs = answers[encoded.rows[item]]
        if not pairs:
            continue
        text, start = pairs[0]
        start += len(text) - len(text.lstrip())  # blanks have no token
        end = start + len(text.strip())
        spans = encoded.spans[encoded[item]]
        covering = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start) & (spans[:, 0] >= 0))
        if not len(covering):
            continue
        # A window that begins or ends inside the answer lacks a part of it; characters without a
        # token, at either end of the context, are no part that could be lacking.
        inside = spans[:, 0] >= 0
        begun = start >= spans[inside, 0].min() or first_window[item]
        ended = end <= spans[inside, 1].max() or last_window[item]
        if begun and ended:
            found[item] = covering[0], covering[-1]
    return found
