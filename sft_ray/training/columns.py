"""What the columns of a data set must hold: from the user's columns to a task's checked fields.

Every problem is one line that names the source, the column and the first row that is wrong.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_ray.errors import did_you_mean

UNLABELLED = -1  # GLUE and others mark hidden labels so
MIXED = b"sft_ray: mixed"  # of a table: its columns that are left out, for they have no one type
LARGEST = 1e18  # label; the square of its error fits into float32
SHOWN = 60  # characters of a wrong value that are worth showing


# Checks one column; yields what is wrong with it, at most one line per rule.
Kind = Callable[[pa.ChunkedArray], Iterator[str]]


@dataclass(frozen=True)
class Fields:
    """The fields of a task.

    Attributes:
        inputs: field -> kind of what a model reads.
        optional: fields that are read where the data has them; fields of scoring included.
        target: field -> kind of what it learns; exactly one.
        together: checks rows across fields; yields problems.
    """

    inputs: Mapping[str, Kind]
    target: Mapping[str, Kind]
    optional: Mapping[str, Kind]
    together: Callable[[pa.Table], Iterator[str]]

    @property
    def target_name(self) -> str:
        return next(iter(self.target))

    @property
    def kinds(self) -> dict[str, Kind]:
        return {**self.inputs, **self.optional, **self.target}


def select_fields(
    tables: Mapping[str, pa.Table],
    fields: Fields,
    columns: Mapping[str, Any],
    where: Mapping[str, str],
) -> tuple[dict[str, pa.Table], list[str]]:
    """The tables reduced to the task's fields under the fields' names, and what is wrong.

    Args:
        columns: field -> column, [start, end] columns, or None to leave an optional field out.
        where: split -> how messages call it.

    The splits other than train and validation may lack the target.
    """
    problems: list[str] = []
    spans = {name.removesuffix("_start") for name in fields.inputs if name.endswith("_start")}
    known = [n for n in fields.kinds if n.rsplit("_", 1)[0] not in spans] + sorted(spans)
    for field, column in columns.items():
        if field not in known:
            problems.append(f"data.columns.{field}: no such field; {did_you_mean(field, known)}")
        elif (field in spans) != isinstance(column, list) and column is not None:
            rule = "takes [start_column, end_column]" if field in spans else "takes one column"
            problems.append(f"data.columns.{field}: {rule}, got {column!r}")
        elif column is None and field not in fields.optional:
            problems.append(f"data.columns.{field}: the task needs this field; name its column")
    if problems:
        return {}, problems
    column_of: dict[str, str | None] = {name: name for name in fields.kinds}
    for field, column in columns.items():
        if isinstance(column, list):
            column_of |= {f"{field}_start": column[0], f"{field}_end": column[1]}
        else:
            column_of[field] = column
    for field in fields.optional:  # present in training or nowhere, unless it was asked for
        if field not in columns and field not in tables["train"].column_names:
            column_of[field] = None
    selected = {}
    for split, table in tables.items():
        wanted = {field: column for field, column in column_of.items() if column is not None}
        if split not in ("train", "validation") and (
            wanted[fields.target_name] not in table.column_names
        ):
            del wanted[fields.target_name]
        found = list(_missing_columns(table, wanted))
        if table.num_rows == 0:
            found.append("has no rows")
        if not found:
            table = table.select(list(wanted.values())).rename_columns(list(wanted))
            selected[split] = _without_views(table.replace_schema_metadata(None))
            found += check_fields(selected[split], fields, wanted)
            if split in ("train", "validation") and is_unlabelled(
                selected[split], fields.target_name
            ):
                column = wanted[fields.target_name]
                found.append(f"is unlabelled (column {column!r} is empty or -1); choose another")
        problems += [f"{where[split]}: {problem}" for problem in found]
    return selected, problems


def check_fields(
    table: pa.Table, fields: Fields, column_of: Mapping[str, str] | None = None
) -> list[str]:
    """What is wrong with the values of a table whose columns carry the fields' names."""
    shown = {**{name: name for name in table.column_names}, **(column_of or {})}
    problems = [
        f"column {shown[field]!r} {problem}"
        for field in table.column_names
        if not (field == fields.target_name and is_unlabelled(table, field))
        for problem in itertools.islice(fields.kinds[field](table.column(field)), 1)
    ]
    if not problems:
        problems += fields.together(table)
    return problems


def _without_views(table: pa.Table) -> pa.Table:
    """Texts as plain Arrow strings; views lack kernels that are needed later."""
    for i, part in enumerate(table.schema):
        if pa.types.is_string_view(part.type):
            plain = table.column(i).cast(pa.large_string())
            table = table.set_column(i, part.name, plain)
    return table


def _missing_columns(table: pa.Table, wanted: Mapping[str, str]) -> Iterator[str]:
    for field, column in wanted.items():
        times = table.column_names.count(column)
        if times > 1:
            yield f"the column {column!r} stands twice; rename one of them"
        elif times == 0:
            known = f"; {did_you_mean(column, table.column_names)}" if table.column_names else ""
            span = field.removesuffix("_start").removesuffix("_end")
            key = f"{span}: [start, end]" if f"{span}_start" in wanted else field
            if column in json.loads((table.schema.metadata or {}).get(MIXED, "[]")):
                yield f"column {column!r} is not of one type in all rows; mend it"
            else:
                yield f"no column {column!r}{known}; set data.columns.{key}"


def is_unlabelled(table: pa.Table, target: str) -> bool:
    """Whether a split's labels are absent, all null or all -1."""
    if target not in table.column_names:
        return True
    values = table.column(target)
    if values.null_count == len(values):
        return True
    if pa.types.is_signed_integer(values.type):
        return bool(pc.all(pc.equal(values, UNLABELLED)).as_py())
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        hidden = pc.or_(pc.is_nan(values), pc.equal(values, UNLABELLED))
        return bool(pc.all(hidden, min_count=0).as_py())
    return False


def units(table: pa.Table) -> npt.NDArray[np.integer[Any]]:
    """Number of what stays together, of each row: its group, or the row itself, [rows]."""
    if "group" not in table.column_names:
        return np.arange(table.num_rows)
    groups = table.column("group").combine_chunks().dictionary_encode()
    return np.asarray(groups.indices.to_numpy())


# -- kinds ---------------------------------------------------------------------------------------


def text(values: pa.ChunkedArray) -> Iterator[str]:
    """A text that is not blank."""
    if not is_text(values.type):
        mend = "; save the file as UTF-8" if pa.types.is_binary(values.type) else ""
        yield f"must hold texts, got {values.type}{mend}"
        return
    yield from _blank(values)


def class_label(values: pa.ChunkedArray) -> Iterator[str]:
    """A text, a whole number, or a list of probabilities over the classes."""
    if is_list(values.type) and pa.types.is_floating(values.type.value_type):
        yield from _probabilities(values)
    else:
        yield from class_name(values)


def class_name(values: pa.ChunkedArray) -> Iterator[str]:
    """A text or a whole number."""
    kind = values.type
    if not is_name(kind):
        mend = "; store whole numbers as integers, or set task: regression"
        mend = mend if pa.types.is_floating(kind) else ""
        yield f"must hold labels that are texts or whole numbers, got {kind}{mend}"
    elif is_text(kind):
        yield from _blank(values)
        yield from _overlong(values.cast(pa.large_string()))
    else:
        yield from _empty(values)
        yield from _minus_one(values)


def class_labels(values: pa.ChunkedArray) -> Iterator[str]:
    """A list of texts or whole numbers, which may be empty."""
    if row := _multi_hot(values):
        yield (
            f"holds one 0 or 1 per class (row {row}); list the classes that hold instead, for "
            "example [0, 2]"
        )
        return
    if not (is_list(values.type) and (is_name(values.type.value_type) or _no_values(values))):
        yield f"must hold a list of labels per row (json, jsonl or parquet), got {values.type}"
        return
    yield from _empty(values)
    inside = pc.list_flatten(values)
    if inside.null_count:
        row = _first_row(values, lambda row: None in row)
        yield f"has an empty label inside row {row}; remove it"
    elif is_text(inside.type):
        yield from _overlong(inside.cast(pa.large_string()))


def number(values: pa.ChunkedArray) -> Iterator[str]:
    """A finite number."""
    kind = values.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        yield f"must hold numbers, got {kind}"
        return
    yield from _empty(values)
    size = pc.abs(values.cast(pa.float64(), safe=False))
    wrong = pc.invert(pc.less_equal(size, LARGEST))  # NaN is not, either
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        yield (
            f"must hold finite numbers up to {LARGEST:.0e}, got {values[row].as_py()} in row "
            f"{row + 1}; remove it"
        )


def words(values: pa.ChunkedArray) -> Iterator[str]:
    """A list of texts, at least one of them not blank."""
    if not (is_list(values.type) and is_text(values.type.value_type)):
        yield f"must hold a list of words per row (json, jsonl or parquet), got {values.type}"
        return
    yield from _empty(values)
    if row := _first_row(values, lambda row: None in row):
        yield f"has an empty word inside row {row}; remove it"
    elif row := _first_row(values, lambda row: not any(word.strip() for word in row)):
        yield f"has no words in row {row}; remove the row"


def tags(values: pa.ChunkedArray) -> Iterator[str]:
    """A list of texts or whole numbers."""
    if not (is_list(values.type) and is_name(values.type.value_type)):
        yield f"must hold a list of tags per row (json, jsonl or parquet), got {values.type}"
        return
    yield from _empty(values)
    if row := _first_row(values, lambda row: None in row or -100 in row or -1 in row):
        yield f"has a word without a tag in row {row}; every word needs one"


def position(values: pa.ChunkedArray) -> Iterator[str]:
    """A whole number from 0 upwards: a place in a text or list."""
    if not pa.types.is_integer(values.type):
        yield f"must hold positions (whole numbers from 0), got {values.type}"
        return
    yield from _empty(values)
    if pc.min(values).as_py() is not None and pc.min(values).as_py() < 0:
        row = pc.index(pc.less(values, 0), True).as_py()
        yield f"must not be negative, got {values[row].as_py()} in row {row + 1}"


def word_place(values: pa.ChunkedArray) -> Iterator[str]:
    """A word's position in its list, or the word itself."""
    yield from text(values) if is_text(values.type) else position(values)


def group_key(values: pa.ChunkedArray) -> Iterator[str]:
    """Whatever tells groups apart."""
    if pa.types.is_nested(values.type):
        yield f"must hold texts or numbers, got {values.type}"
    else:
        yield from _empty(values)


def answers(values: pa.ChunkedArray) -> Iterator[str]:
    """{text: [...], answer_start: [...]}, or a list of {text, answer_start}; SQuAD's formats."""
    kind = values.type
    inner = kind.value_type if is_list(kind) else kind
    parts = {inner.field(i).name for i in range(inner.num_fields)} if _is_struct(inner) else set()
    if not parts >= {"text", "answer_start"}:
        yield f"must hold {{text: [...], answer_start: [...]}} per row, got {_short(kind)}"
        return
    yield from _empty(values)
    for row, value in enumerate(values.to_pylist()):
        try:
            pairs = answer_pairs(value)
        except (TypeError, ValueError):
            pairs = [(None, None)]
        if any(not isinstance(t, str) or not isinstance(s, int) or not t for t, s in pairs):
            yield f"has an answer without text or start in row {row + 1}, got {_short(value)}"
            return


def answer_pairs(value: Any) -> list[tuple[Any, Any]]:
    """(text, start) of each answer of one row, whichever of the two formats it has.

    Raises:
        ValueError: texts and starts are not equally many.
    """
    if isinstance(value, list):
        return [(answer["text"], answer["answer_start"]) for answer in value]
    return list(zip(value["text"], value["answer_start"], strict=True))


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_name(kind: pa.DataType) -> bool:
    """Whether values of this type can name a class."""
    return bool(is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_struct(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind))


def _no_values(values: pa.ChunkedArray) -> bool:
    return len(pc.list_flatten(values)) == 0


def _multi_hot(values: pa.ChunkedArray) -> int | None:
    """Number, from 1, of the first row that can only hold a 0 or 1 for every class."""
    if not is_list(values.type) or pa.types.is_nested(values.type.value_type):
        return None
    inside = pc.list_flatten(values)
    if not set(pc.unique(inside).to_pylist()) <= {0, 1}:
        return None
    # Whole numbers may name two classes; then no row has one of them twice.
    is_whole = pa.types.is_integer(inside.type)
    return _first_row(values, lambda row: bool(row) and (not is_whole or len(set(row)) < len(row)))


def _blank(values: pa.ChunkedArray) -> Iterator[str]:
    """Texts that are missing or hold nothing but white space."""
    plain = values.cast(pa.large_string())
    yield from _missing(
        pc.or_kleene(pc.is_null(plain), pc.equal(pc.utf8_trim_whitespace(plain), ""))
    )


def _empty(values: pa.ChunkedArray) -> Iterator[str]:
    yield from _missing(pc.is_null(values, nan_is_null=pa.types.is_floating(values.type)))


def _missing(missing: pa.ChunkedArray) -> Iterator[str]:
    if rows := pc.sum(missing).as_py():
        row = pc.index(missing, True).as_py() + 1
        where = f"{rows} rows, first in row {row}" if rows > 1 else f"row {row}"
        yield f"is empty in {where}; fill or remove {'them' if rows > 1 else 'it'}"


def _minus_one(values: pa.ChunkedArray) -> Iterator[str]:
    if pa.types.is_signed_integer(values.type):
        row = pc.index(values, pa.scalar(UNLABELLED, values.type)).as_py()
        if row >= 0:
            yield (
                f"is -1, unlabelled, in row {row + 1} but not in all; remove such rows or, if -1 "
                "is a class, name it in words, such as negative"
            )


def _overlong(values: pa.ChunkedArray) -> Iterator[str]:
    longest = pc.max(pc.utf8_length(values)).as_py() or 0
    if longest > 200:
        yield f"holds labels of up to {longest} characters; is it the column of the texts?"


def _probabilities(values: pa.ChunkedArray) -> Iterator[str]:
    yield from _empty(values)
    width = None
    for row, vector in enumerate(values.to_pylist(), start=1):
        width = len(vector) if width is None else width
        if len(vector) != width or width < 2:
            yield f"must hold equally long lists of at least two, got {len(vector)} in row {row}"
            return
        if any(p is None or not math.isfinite(p) or p < 0 for p in vector) or (
            abs(sum(vector) - 1) > 1e-3
        ):
            yield f"must hold probabilities that sum to 1, got {_short(vector)} in row {row}"
            return


def _first_row(values: pa.ChunkedArray, wrong: Callable[[list[Any]], bool]) -> int | None:
    """Number, from 1, of the first row that is wrong."""
    rows = enumerate(values.to_pylist(), start=1)
    return next((number for number, row in rows if wrong(row)), None)


def _short(value: object) -> str:
    shown = str(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
