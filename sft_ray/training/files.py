"""Reading one file of raw examples: csv, tsv, json, jsonl or parquet.

Every reader returns an Arrow table; every problem is a `DataError` that names the file.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from sft_ray.errors import DataError, first_line
from sft_ray.training.columns import MIXED, is_text

DELIMITED = (".csv", ".tsv")
FILE_TYPES = (*DELIMITED, ".json", ".jsonl", ".parquet")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
ROW = re.compile(r" in row (\d+)$")
# What readers raise for a damaged file; deep nesting and huge numbers included.
READ_ERRORS = (
    pa.ArrowException,
    ValueError,
    AttributeError,
    OSError,
    OverflowError,
    RecursionError,
)


def read_file(path: str, texts: Collection[str] = ()) -> pa.Table:
    """One csv, tsv, json, jsonl or parquet file, by its ending.

    Args:
        texts: columns of a csv or tsv file that are texts whatever they look like.

    Raises:
        DataError: the file is missing, of another type, or damaged.
    """
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):  # noqa: PTH112  # unlike Path, it takes any name
        raise DataError(f"{path}: is a folder; name a file here, or the folder as data.path")
    if suffix not in FILE_TYPES:
        raise DataError(f"{path}: a data file ends in {', '.join(FILE_TYPES)}, got {suffix!r}")
    if "://" in path:
        raise DataError(f"{path}: data files are local; copy it to every machine that trains")
    if not os.path.isfile(path):  # noqa: PTH113  # unlike Path, it takes any name
        raise DataError(f"{path}: no such file; paths are relative to the working directory")
    if suffix != ".parquet" and _is_utf_16(path):
        raise DataError(f"{path}: is written in UTF-16; save the file as UTF-8")
    if suffix == ".csv" and (mark := _other_delimiter(path)):
        raise DataError(
            f"{path}: is separated by {mark}; save it with commas, or with tabs as .tsv"
        )
    try:
        table = _parse(path, suffix, texts)
        table.validate(full=True)  # texts that are no UTF-8, for one
    except READ_ERRORS as error:
        reason = first_line(error)
        if suffix == ".jsonl":  # Arrow counts them from 0
            reason = ROW.sub(lambda found: f" in row {int(found[1]) + 1}", reason)
        foreign = ("UTF8" in reason or "utf-8" in reason) and "surrogates" not in reason
        mend = "; save the file as UTF-8" if foreign else ""
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {reason[:300]}{mend}") from None
    return table


def _is_utf_16(path: str) -> bool:
    """Whether a text file begins as some spreadsheets and shells of Windows save it."""
    try:
        with Path(path).open("rb") as file:
            return file.read(2) in UTF_16
    except OSError:  # the parser says what is wrong
        return False


def _other_delimiter(path: str) -> str | None:
    """What separates the columns of a csv file whose first row has no comma, in words."""
    try:
        with Path(path).open(encoding="utf-8", errors="replace", newline="") as file:
            header = next((row for row in csv.reader(file) if row), [])
    except (csv.Error, OSError):  # the parser says what is wrong
        return None
    marks = {";": "';'", "\t": "tabs"} if len(header) == 1 else {}
    return next((name for mark, name in marks.items() if mark in header[0]), None)


def _parse(path: str, suffix: str, texts: Collection[str]) -> pa.Table:
    if suffix == ".parquet":
        return pq.read_table(path)
    if suffix == ".csv":
        return _parse_delimited(path, ",", texts)
    if suffix == ".tsv":
        return _parse_tabs(path, texts)
    if _holds_list(path):
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it must hold a list of at least one {column: value} object")
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: _values(rows, name) for name in names}
        mixed = json.dumps([name for name, values in columns.items() if values is None])
        found = {name: values for name, values in columns.items() if values is not None}
        return pa.table(found, metadata={MIXED: mixed})
    return pyarrow.json.read_json(
        path,
        read_options=pyarrow.json.ReadOptions(block_size=_block_size(path)),
        parse_options=pyarrow.json.ParseOptions(newlines_in_values=False),
    )


def _values(rows: list[dict[str, Any]], name: str) -> pa.Array | None:
    """A column of a json list; None if it is of no one type and not even the first row has it."""
    try:
        return pa.array([row.get(name) for row in rows])
    except (pa.ArrowException, OverflowError):
        if name in rows[0]:
            raise ValueError(f"column {name!r} is not of one type in all rows; mend it") from None
        return None


def _holds_list(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _block_size(path: str) -> int:
    """In bytes: the whole file, up to 256 MiB; no row may be longer than a block."""
    return min(max(1 << 20, Path(path).stat().st_size), 1 << 28)


def _parse_tabs(path: str, texts: Collection[str]) -> pa.Table:
    """Quoted like csv, unless quotes are plain text (GLUE's files) and one swallows rows."""
    try:
        table = _parse_delimited(path, "\t", texts)
        if not any(_holds_rows(column) for column in table.columns) or _is_quoted(path):
            return table
    except pa.ArrowException:
        pass
    try:
        return _parse_delimited(path, "\t", texts, quoted=False)
    except pa.ArrowException:
        return _parse_delimited(path, "\t", texts)  # also raises what is wrong with it


def _is_quoted(path: str) -> bool:
    """Whether every quote of a tab-separated file opens or closes a whole value, or is doubled."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            for _ in csv.reader(file, delimiter="\t", strict=True):
                pass
    except csv.Error:
        return False
    finally:
        csv.field_size_limit(before)
    return True


def _holds_rows(values: pa.ChunkedArray) -> bool:
    """Whether a text has both a tab and a line break."""
    if not is_text(values.type):
        return False
    both = [pc.match_substring(values, mark) for mark in "\t\n"]
    return bool(pc.any(pc.and_(*both)).as_py())


def _parse_delimited(
    path: str, delimiter: str, texts: Collection[str], *, quoted: bool = True
) -> pa.Table:
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=_block_size(path)),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            strings_can_be_null=False, column_types=dict.fromkeys(texts, pa.string())
        ),
    )
