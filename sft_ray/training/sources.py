"""Reading raw examples: hub, save_to_disk folder, csv, tsv, json, jsonl, parquet, built-in.

Every reader returns Arrow tables; every problem is a `DataError` that names file, column, row or
label.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from sft_ray.config import Data, Split, Splits
from sft_ray.errors import DataError, did_you_mean
from sft_ray.training.columns import Fields, is_name, number, select_fields
from sft_ray.training.hub import is_missing_folder
from sft_ray.training.seeds import derived_seed

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# What readers raise for a damaged file; deep nesting and huge numbers included.
READ_ERRORS = (
    pa.ArrowException,
    ValueError,
    AttributeError,
    OSError,
    OverflowError,
    RecursionError,
)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """Checked examples under their fields' names.

    Attributes:
        tables: by split; `test` only where the experiment names one that is at hand.
        names: of labels that are whole numbers, where the data set knows them.
        where: split -> how messages call it.
    """

    tables: dict[str, pa.Table]
    names: tuple[str, ...] | None
    where: dict[str, str]


def read_splits(data: Data, fields: Fields, seed: int, splits: tuple[str, ...] = SPLITS) -> Source:
    """The data set's splits, reduced to the fields of a task and checked.

    Raises:
        DataError: every problem found.
    """
    names: dict[str, tuple[str, ...]] = {}
    if data.train is not None:
        files = {split: getattr(data, split) for split in SPLITS}
        tables = {split: read_file(file) for split, file in files.items() if file}
    elif data.path is not None and data.path.startswith("builtin:"):
        tables = _read_builtin(data.path, data.splits or Splits())
    else:
        tables, names = _read_dataset(data, splits)
    where = {split: _name_of(data, split) for split in SPLITS}
    selected, problems = select_fields(tables, fields, data.columns, where)
    if problems:
        raise DataError(*problems)
    if data.split is not None and "validation" in selected:
        raise DataError(f"data.split: {data.path} has a validation split already; remove `split`")
    if "validation" not in selected:
        split = data.split or Split()
        if "test" in selected:  # there is one already
            split = split.model_copy(update={"test": 0.0})
        selected |= _cut(selected["train"], split, fields, seed)
    target = data.columns.get(fields.target_name) or fields.target_name
    known = names.get(str(target))
    return Source(selected, tuple(data.label_names) if data.label_names else known, where)


def _name_of(data: Data, split: str) -> str:
    if data.path is not None:
        return f"data ({data.path}, {split})"
    file = getattr(data, split)
    return f"data.{split} ({file})" if file else f"data.train ({data.train}), its {split} part"


def read_file(path: str) -> pa.Table:
    """One csv, tsv, json, jsonl or parquet file, by its ending.

    Raises:
        DataError: the file is missing, of another type, or damaged.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_TYPES:
        raise DataError(f"{path}: a data file ends in {', '.join(FILE_TYPES)}, got {suffix!r}")
    if not os.path.isfile(path):  # noqa: PTH113  # unlike Path, it takes any name
        raise DataError(f"{path}: no such file; paths are relative to the working directory")
    try:
        table = _parse(path, suffix)
        table.validate(full=True)  # texts that are no UTF-8, for one
    except READ_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        foreign = ("UTF8" in reason or "utf-8" in reason) and "surrogates" not in reason
        mend = "; save the file as UTF-8" if foreign else ""
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {reason[:300]}{mend}") from None
    return table


def _parse(path: str, suffix: str) -> pa.Table:
    if suffix == ".parquet":
        return pq.read_table(path)
    if suffix in (".csv", ".tsv"):
        delimiter = "\t" if suffix == ".tsv" else ","
        return pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=False),
        )
    if suffix == ".json" and Path(path).read_bytes().lstrip()[:1] == b"[":
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it must hold a list of at least one {column: value} object")
        return pa.Table.from_pylist(rows)
    return pyarrow.json.read_json(
        path, parse_options=pyarrow.json.ParseOptions(newlines_in_values=False)
    )


def _read_builtin(path: str, splits: Splits) -> dict[str, pa.Table]:
    from sft_ray.training.builtin import docstrings

    builtin = {"builtin:docstrings": docstrings}
    if path not in builtin:
        raise DataError(f"data.path: no built-in data set {path!r}; {did_you_mean(path, builtin)}")
    return _sliced(builtin[path](), splits, path)


def _read_dataset(
    data: Data, wanted: tuple[str, ...]
) -> tuple[dict[str, pa.Table], dict[str, tuple[str, ...]]]:
    """A hub data set or a local folder, through `datasets`; and the names of its classes."""
    import datasets

    datasets.disable_progress_bars()
    assert data.path is not None  # the configuration has exactly one source
    folder = Path(data.path)
    if folder.suffix.lower() in FILE_TYPES and not os.path.isdir(folder):  # noqa: PTH112
        raise DataError(
            f"data.path: a hub data set or a folder, got the file {data.path}; "
            "name a file as data.train instead of data.path"
        )
    if is_missing_folder(data.path):
        raise DataError(
            f"data.path: no such folder: {data.path}; give a hub id or a folder relative to the "
            "working directory"
        )
    splits = data.splits or Splits()
    on_disk = [folder / name for name in ("dataset_dict.json", "state.json")]
    try:
        if any(marker.is_file() for marker in on_disk):
            loaded = datasets.load_from_disk(data.path)
            named = loaded if isinstance(loaded, dict) else {"train": loaded}
            names = _class_names(next(iter(named.values())))
            tables = {name: part.with_format("arrow")[:] for name, part in named.items()}
            if "validation" not in tables and data.splits is None and "train" in tables:
                return {n: tables[n] for n in ("train", "test") if n in tables}, names
            return _sliced(tables, splits, data.path), names
        parts = {
            split: datasets.load_dataset(
                data.path, data.config, revision=data.revision, split=getattr(splits, split)
            )
            for split in wanted
            if getattr(splits, split) is not None
        }
    except DataError:
        raise
    except Exception as error:  # hub, network and parser errors have no common base
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"data.path: the data set {data.path!r} cannot be loaded: {type(error).__name__}: "
            f"{reason}; "
            "give a hub id, a save_to_disk folder, or data.train with a file"
        ) from None
    tables = {split: part.with_format("arrow")[:] for split, part in parts.items()}
    return tables, _class_names(parts["train"])


def _class_names(dataset: Any) -> dict[str, tuple[str, ...]]:
    """Column -> names of its class ids, for columns of ids or of lists of ids."""
    import datasets

    found = {}
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            found[column] = tuple(inner.names)
    return found


def _sliced(tables: dict[str, pa.Table], splits: Splits, source: str) -> dict[str, pa.Table]:
    """Apply `datasets`' slicing syntax to tables in memory."""
    import datasets

    lengths = {name: table.num_rows for name, table in tables.items()}
    found = {}
    for split in SPLITS:
        spec = getattr(splits, split)
        if spec is None and split in tables:
            spec = split
        if spec is None:
            continue
        try:
            parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"data.splits.{split}: {source} has no slice {spec!r}: {error}; "
                f"its splits: {', '.join(lengths)}"
            ) from None
        found[split] = pa.concat_tables(
            tables[part.splitname].slice(part.from_, part.to - part.from_) for part in parts
        )
    return found


def _cut(table: pa.Table, split: Split, fields: Fields, seed: int) -> dict[str, pa.Table]:
    """Seeded parts of one table, stratified by label; the sealed test part is cut off first."""
    labels = None
    values = table.column(fields.target_name)
    if is_name(values.type) and fields.target[fields.target_name] is not number:
        labels = np.array([str(value) for value in values.to_pylist()])
    rest = np.arange(table.num_rows)
    parts = {}
    random_state = derived_seed(seed, "split")
    try:
        for name, share in (("test", split.test), ("validation", split.validation)):
            if share > 0:
                count = round(share * table.num_rows)
                rest, parts[name] = _hold_out(rest, count, labels, random_state)
    except ValueError as error:
        raise DataError(f"data.split: {table.num_rows} rows cannot be split: {error}") from None
    parts["train"] = rest
    return {name: table.take(pa.array(np.sort(rows))) for name, rows in parts.items()}


def _hold_out(rows: Any, count: int, labels: Any, random_state: int) -> Any:
    """The other rows and `count` held-out ones, as many of each class as there should be.

    Classes of one or two rows stay where they can be learned; with more classes than held-out rows
    the cut is plain.

    Raises:
        ValueError: one of the two would be empty.
    """
    from sklearn.model_selection import train_test_split

    kept, stratify = rows[:0], None
    if labels is not None:
        sizes = Counter(labels[rows].tolist())
        rare = np.array([sizes[label] < 3 for label in labels[rows]])
        if np.count_nonzero(~rare) > count:
            kept, rows = rows[rare], rows[~rare]
        sizes = Counter(labels[rows].tolist())
        if min(sizes.values()) >= 2 and len(sizes) <= min(count, len(rows) - count):
            stratify = labels[rows]
    rest, held = train_test_split(
        rows, test_size=count, random_state=random_state, stratify=stratify
    )
    return np.concatenate([kept, rest]), held
