"""Reading raw examples: hub, save_to_disk folder, csv, tsv, json, jsonl, parquet, built-in.

Every reader returns Arrow tables; every problem is a `DataError` that names file, column, row or
label.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from sft_ray.config import Data, Split, Splits
from sft_ray.errors import DataError, did_you_mean
from sft_ray.training.seeds import derived_seed

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
UNLABELLED = -1  # GLUE and others mark hidden labels so


def read_splits(data: Data, seed: int) -> dict[str, pa.Table]:
    """The training and validation tables, reduced to the columns in use and checked.

    Raises:
        DataError: every problem found.
    """
    if data.train is not None:
        tables = {"train": read_file(data.train)}
        if data.validation is not None:
            tables["validation"] = read_file(data.validation)
    elif data.path is not None and data.path.startswith("builtin:"):
        tables = _read_builtin(data.path, data.splits or Splits())
    else:
        assert data.path is not None  # the configuration has exactly one source
        tables = _read_dataset(data)
    columns = [data.columns.text, data.columns.label]
    if data.columns.text_pair is not None:
        columns.insert(1, data.columns.text_pair)
    problems = [
        problem
        for split, table in tables.items()
        for problem in _table_problems(table, columns, _name_of(data, split))
    ]
    if problems:
        raise DataError(*problems)
    tables = {split: table.select(columns) for split, table in tables.items()}
    if "validation" not in tables:
        tables = _cut(tables["train"], data.split or Split(), data.columns.label, seed)
    return tables


def _name_of(data: Data, split: str) -> str:
    file = getattr(data, split)
    return f"data.{split} ({file})" if file else f"data ({data.path}, {split})"


def read_file(path: str) -> pa.Table:
    """One csv, tsv, json, jsonl or parquet file, by its ending.

    Raises:
        DataError: the file is missing, of another type, or damaged.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_TYPES:
        raise DataError(f"{path}: a data file ends in {', '.join(FILE_TYPES)}, got {suffix!r}")
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; paths are relative to the working directory")
    try:
        if suffix == ".parquet":
            return pq.read_table(path)
        if suffix in (".csv", ".tsv"):
            delimiter = "\t" if suffix == ".tsv" else ","
            return pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True
                ),
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
    except (pa.ArrowException, ValueError, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {reason}") from None


def _read_builtin(path: str, splits: Splits) -> dict[str, pa.Table]:
    from sft_ray.training.builtin import docstrings

    builtin = {"builtin:docstrings": docstrings}
    if path not in builtin:
        raise DataError(f"data.path: no built-in data set {path!r}; {did_you_mean(path, builtin)}")
    return _sliced(builtin[path](), splits, path)


def _read_dataset(data: Data) -> dict[str, pa.Table]:
    """A hub data set or a local folder, through `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    assert data.path is not None  # the caller has looked
    splits = data.splits or Splits()
    folder = Path(data.path)
    on_disk = [folder / name for name in ("dataset_dict.json", "state.json")]
    try:
        if any(marker.is_file() for marker in on_disk):
            loaded = datasets.load_from_disk(data.path)
            named = loaded if isinstance(loaded, dict) else {"train": loaded}
            tables = {name: _with_label_names(ds, data.columns.label) for name, ds in named.items()}
            if "validation" not in tables and data.splits is None and "train" in tables:
                return {"train": tables["train"]}
            return _sliced(tables, splits, data.path)
        return {
            split: _with_label_names(
                datasets.load_dataset(
                    data.path, data.config, revision=data.revision, split=getattr(splits, split)
                ),
                data.columns.label,
            )
            for split in ("train", "validation")
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


def _with_label_names(dataset: Any, label: str) -> pa.Table:
    """The Arrow table of a `datasets.Dataset`, class ids replaced by the names it knows."""
    import datasets

    table = dataset.with_format("arrow")[:]
    feature = dataset.features.get(label)
    if isinstance(feature, datasets.ClassLabel):
        ids = table.column(label).to_pylist()
        names = [None if i is None or i == UNLABELLED else feature.int2str(i) for i in ids]
        position = table.column_names.index(label)
        table = table.set_column(position, label, pa.array(names, pa.string()))
    return table


def _sliced(tables: dict[str, pa.Table], splits: Splits, source: str) -> dict[str, pa.Table]:
    """Apply `datasets`' slicing syntax to tables in memory."""
    import datasets

    lengths = {name: table.num_rows for name, table in tables.items()}
    found = {}
    for split in ("train", "validation"):
        spec = getattr(splits, split)
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


def _table_problems(table: pa.Table, columns: list[str], name: str) -> list[str]:
    problems = []
    for column in columns:
        if table.column_names.count(column) > 1:
            problems.append(f"{name}: the column {column!r} stands twice; rename one of them")
        elif column not in table.column_names:
            known = f"; {did_you_mean(column, table.column_names)}" if table.column_names else ""
            problems.append(f"{name}: no column {column!r}{known}; set data.columns")
    if table.num_rows == 0:
        problems.append(f"{name}: has no rows")
    if problems:
        return problems
    label = columns[-1]
    for column in columns:
        values = table.column(column)
        missing = pc.is_null(values)
        if column == label and _is_text(values.type):
            missing = pc.or_kleene(missing, pc.equal(values, ""))
        if rows := pc.sum(missing).as_py():
            row = pc.index(missing, True).as_py()
            problems.append(
                f"{name}: column {column!r} is empty in {rows} rows, first in row {row + 1}; fill "
                "or remove them"
            )
        elif column == label:
            problems += _label_type_problems(values, column, name)
        elif not _is_text(values.type):
            mend = "; save the file as UTF-8" if pa.types.is_binary(values.type) else ""
            problems.append(f"{name}: column {column!r} must hold texts, got {values.type}{mend}")
    return problems


def _label_type_problems(values: pa.ChunkedArray, column: str, name: str) -> list[str]:
    kind = values.type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return [f"{name}: labels in column {column!r} must be texts or whole numbers, got {kind}"]
    if (
        pa.types.is_signed_integer(kind)
        and (row := pc.index(values, pa.scalar(UNLABELLED, kind)).as_py()) >= 0
    ):
        return [f"{name}: row {row + 1} is unlabelled ({column} = -1); choose another split"]
    return []


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _cut(table: pa.Table, split: Split, label: str, seed: int) -> dict[str, pa.Table]:
    """Stratified parts of one table; the sealed test part is cut off and left alone."""
    from sklearn.model_selection import train_test_split

    labels = np.array(table.column(label).to_pylist())
    counts = Counter(labels.tolist())
    stratify = labels if min(counts.values()) >= 2 else None
    order = np.arange(table.num_rows)
    random_state = derived_seed(seed, "split")
    try:
        if split.test > 0:
            order, _ = train_test_split(
                order,
                test_size=round(split.test * table.num_rows),
                random_state=random_state,
                stratify=stratify,
            )
        train, validation = train_test_split(
            order,
            test_size=round(split.validation * table.num_rows),
            random_state=random_state,
            stratify=None if stratify is None else labels[order],
        )
    except ValueError as error:
        raise DataError(f"data.split: {table.num_rows} rows cannot be split: {error}") from None
    return {
        "train": table.take(pa.array(np.sort(train))),
        "validation": table.take(pa.array(np.sort(validation))),
    }


def encode_labels(
    tables: dict[str, pa.Table], column: str
) -> tuple[list[str], dict[str, npt.NDArray[np.int64]]]:
    """Class names in their order and class ids of each split; the training split defines them.

    Raises:
        DataError: fewer than two classes, or a validation label that training lacks.
    """
    values = {split: table.column(column).to_pylist() for split, table in tables.items()}
    if len({type(value) for column_values in values.values() for value in column_values}) > 1:
        # A csv whose labels all look like numbers beside one whose labels do not.
        values = {split: [str(v) for v in column_values] for split, column_values in values.items()}
    classes = sorted(set(values["train"]))
    if len(classes) < 2:
        raise DataError(
            f"data: classification needs at least two labels in the training split, got only "
            f"{classes[0]!r} in column {column!r}"
        )
    id_of = {value: i for i, value in enumerate(classes)}
    unknown = Counter(value for value in values["validation"] if value not in id_of)
    if unknown:
        label, count = unknown.most_common(1)[0]
        raise DataError(
            f"data: the validation label {label!r} ({count} rows) does not occur in training, "
            f"which has {', '.join(map(repr, classes[:10]))}; mend the label or the split"
        )
    ids = {
        split: np.array([id_of[value] for value in column_values], dtype=np.int64)
        for split, column_values in values.items()
    }
    return [str(value) for value in classes], ids
