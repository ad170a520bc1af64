"""An experiment's splits: of files, a save_to_disk folder, the hub or a built-in data set.

Tables are Arrow's; every problem is a `DataError` that names file, column, row or label.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_ray.config import Data, Split, Splits
from sft_ray.errors import DataError, did_you_mean, first_line
from sft_ray.training.columns import (
    UNLABELLED,
    Fields,
    is_name,
    is_text,
    is_unlabelled,
    number,
    position,
    select_fields,
    units,
)
from sft_ray.training.files import DELIMITED, FILE_TYPES, read_file
from sft_ray.training.hub import is_missing_folder
from sft_ray.training.seeds import derived_seed

MOST_DECIMALS = 20  # different ones that can name classes, as versions do
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """Checked examples under their fields' names.

    Attributes:
        tables: by split; `test` only where there is one.
        names: of labels that are whole numbers, where the data set knows them.
        where: split -> how messages call it.
        num_left_out: rows of these splits without a label, which are in no table.
    """

    tables: dict[str, pa.Table]
    names: tuple[str, ...] | None
    where: dict[str, str]
    num_left_out: int = 0


def read_splits(data: Data, fields: Fields, seed: int) -> Source:
    """The data set's splits, reduced to the fields of a task and checked.

    Raises:
        DataError: every problem found.
    """
    names: dict[str, tuple[str, ...]] = {}
    if data.train is not None:
        tables = _read_files(data, fields)
    elif data.path is not None and data.path.startswith("builtin:"):
        tables = _read_builtin(data.path, data.splits or Splits())
    else:
        tables, names = _read_dataset(data)
    target = str(data.columns.get(fields.target_name) or fields.target_name)
    num_rows = sum(table.num_rows for table in tables.values())
    if target in names:  # elsewhere -1 may be a class of its own
        tables = {split: _labelled(table, target) for split, table in tables.items()}
    num_left_out = num_rows - sum(table.num_rows for table in tables.values())
    where = {split: _name_of(data, split) for split in SPLITS}
    selected, problems = select_fields(tables, fields, data.columns, where)
    if problems:
        raise DataError(*problems)
    if data.split is not None and "validation" in selected:
        raise DataError(f"data.split: {data.path} has a validation split already; remove `split`")
    if "validation" not in selected:
        split = data.split or Split()
        if "test" in selected and split.test:
            raise DataError(
                f"data.split.test: {data.path or data.test} is a test split already, or has one; "
                "remove `test`"
            )
        selected |= _cut(selected["train"], split, fields, seed)
    known = tuple(data.label_names) if data.label_names else names.get(target)
    return Source(selected, known, where, num_left_out)


def _labelled(table: pa.Table, target: str) -> pa.Table:
    """The rows with a label; all of them if none has one."""
    if target not in table.column_names or is_unlabelled(table, target):
        return table
    values = table.column(target)
    if not pa.types.is_signed_integer(values.type):  # lists of labels, for one
        return table
    return table.filter(pc.fill_null(pc.not_equal(values, UNLABELLED), True))


def _name_of(data: Data, split: str) -> str:
    if data.path is not None:
        return f"data ({data.path}, {split})"
    file = getattr(data, split)
    return f"data.{split} ({file})" if file else f"data.train ({data.train}), its {split} part"


def _read_files(data: Data, fields: Fields) -> dict[str, pa.Table]:
    """The files of an experiment; texts and labels of csv and tsv as they are written there."""
    files = {split: file for split in SPLITS if (file := getattr(data, split))}
    tables = {split: read_file(file) for split, file in files.items()}
    column_of = {
        field: str(data.columns.get(field) or field)
        for field, kind in fields.kinds.items()
        if kind not in (number, position)
    }
    target = column_of.get(fields.target_name)  # none where labels are numbers
    found = [part for table in tables.values() for part in table.schema]
    texts = {part.name for part in found if is_text(part.type)} & set(column_of.values())
    written = {
        split: _as_written(tables[split], file, {*texts, target})
        for split, file in files.items()
        if Path(file).suffix.lower() in DELIMITED
    }
    # What one file's labels are, all files' are.
    labels = [
        (tables[split].column(target), columns[target])
        for split, columns in written.items()
        if target in columns
    ]
    are_renamed = any(_is_renamed(values, as_text) for values, as_text in labels)
    decimals = {
        text
        for values, as_text in labels
        if pa.types.is_floating(values.type)
        for text in as_text.to_pylist()
    }
    are_scores = len(decimals) > MOST_DECIMALS and not (target in texts or data.label_names)
    if data.label_names:  # where decimals are names, whole numbers beside them are no places
        are_renamed |= any(_are_decimals(values) for values, _ in labels)
        are_renamed |= bool(decimals & set(data.label_names))
    if are_renamed:
        _check_no_places(tables.keys() - written.keys(), tables, str(target), data)

    def may_stay(kind: pa.DataType) -> bool:
        if pa.types.is_integer(kind):
            return not are_renamed  # and may be places in data.label_names
        if pa.types.is_boolean(kind):
            return target not in texts  # true and false have names, however they are spelled
        return pa.types.is_floating(kind) and are_scores  # which are refused

    for split, columns in written.items():
        for name, as_text in columns.items():
            values = tables[split].column(name)
            if name == target:
                if may_stay(values.type):
                    continue
                as_text = pc.if_else(pc.is_null(values), None, as_text)
            place = tables[split].column_names.index(name)
            tables[split] = tables[split].set_column(place, name, as_text)
    return tables


def _check_no_places(
    splits: Collection[str], tables: dict[str, pa.Table], target: str, data: Data
) -> None:
    """Where labels are what is written in one file, numbers in another would be something else.

    Raises:
        DataError: a file of another kind has whole numbers.
    """
    for split in sorted(splits):
        table = tables[split]
        if target not in table.column_names or is_unlabelled(table, target):
            continue
        if pa.types.is_integer(table.column(target).type):
            raise DataError(
                f"data.{split} ({getattr(data, split)}): the labels in {target!r} are whole "
                "numbers, and texts (as 01 or 1.5) in the other files; write them as texts here"
            )


def _as_written(table: pa.Table, file: str, names: Collection[str | None]) -> dict[str, Any]:
    """Those of the columns of a csv or tsv file whose type was guessed, as the texts they are."""
    typed = [
        part.name
        for part in table.schema
        if part.name in names and not is_text(part.type)
        if table.column_names.count(part.name) == 1 and not is_unlabelled(table, part.name)
    ]
    written = read_file(file, typed) if typed else table
    return {name: written.column(name) for name in typed}


def _is_renamed(values: pa.ChunkedArray, written: pa.ChunkedArray) -> bool:
    """Whether whole numbers are written otherwise than their names, as 01 is."""
    pairs = zip(values.to_pylist(), written.to_pylist(), strict=True)
    return pa.types.is_integer(values.type) and any(
        value is not None and str(value) != text.strip() for value, text in pairs
    )


def _are_decimals(values: pa.ChunkedArray) -> bool:
    """Whether some have digits behind the point; 1.0 is how some programs write 1."""
    if not pa.types.is_floating(values.type):
        return False
    return bool(pc.any(pc.not_equal(values, pc.floor(values))).as_py())


def _read_builtin(path: str, splits: Splits) -> dict[str, pa.Table]:
    from sft_ray.training.builtin import docstrings

    builtin = {"builtin:docstrings": docstrings}
    if path not in builtin:
        raise DataError(f"data.path: no built-in data set {path!r}; {did_you_mean(path, builtin)}")
    return _sliced(builtin[path](), splits, path)


def _read_dataset(data: Data) -> tuple[dict[str, pa.Table], dict[str, tuple[str, ...]]]:
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
    is_saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if is_saved:
            loaded = datasets.load_from_disk(data.path)
            parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
        else:
            load = partial(datasets.load_dataset, data.path, data.config, revision=data.revision)
            if data.splits is None:
                parts = dict(load())
            else:
                named = data.splits.model_dump(exclude_none=True)
                parts = {split: load(split=spec) for split, spec in named.items()}
    except Exception as error:  # hub, network and parser errors have no common base
        mend = "give a hub id, a save_to_disk folder, or data.train with a file"
        if folder.is_dir() and not is_saved:
            mend = "its files must be called train, validation and test, with their endings"
        raise DataError(
            f"data.path: the data set {data.path!r} cannot be loaded: {type(error).__name__}: "
            f"{first_line(error)}; {mend}"
        ) from None
    names = _class_names(next(iter(parts.values())))
    if data.splits is None:
        if "train" not in parts:
            raise DataError(
                f"data.path: {data.path} has no split `train`, got {', '.join(parts)}; name its "
                "splits in data.splits"
            )
        alike = [n for n in parts if n.lower().startswith(("validation", "valid", "dev", "eval"))]
        if alike and "validation" not in parts:
            raise DataError(
                f"data.path: {data.path} has no split `validation`, but {', '.join(alike)}; name "
                "its splits in data.splits"
            )
        parts = {split: parts[split] for split in SPLITS if split in parts}
    tables = {name: part.with_format("arrow")[:] for name, part in parts.items()}
    if is_saved and data.splits is not None:
        tables = _sliced(tables, data.splits, data.path)
    return tables, names


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
    lengths = {name: table.num_rows for name, table in tables.items()}
    found = {}
    for split in SPLITS:
        spec = getattr(splits, split)
        if spec is None and split in tables:
            spec = split
        if spec is None:
            continue
        if spec in tables:  # no slice: the library takes a second to import
            found[split] = tables[spec]
            continue
        import datasets

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
    """Seeded parts of one table; the sealed test part is cut off first.

    Groups stay whole; where there are none, the parts are stratified by label.
    """
    unit_of, labels = units(table), None
    rest = np.unique(unit_of)
    kind, values = "rows", table.column(fields.target_name)
    if "group" in table.column_names:
        kind = "groups"
    elif is_name(values.type) and fields.target[fields.target_name] is not number:
        labels = np.array([str(value) for value in values.to_pylist()])
    parts, size = {}, len(rest)
    random_state = derived_seed(seed, "split")
    for name, share in (("test", split.test), ("validation", split.validation)):
        if share > 0:
            count = round(share * size)
            if not 0 < count < len(rest):
                empty, way = (name, "raise") if count < 1 else ("train", "lower")
                raise DataError(
                    f"data.split: {size} {kind} cannot be split: {name} {share} leaves no {kind} "
                    f"for {empty}; {way} data.split.{name} or give more {kind}"
                )
            rest, parts[name] = _hold_out(rest, count, labels, random_state)
    parts["train"] = rest
    rows = {name: np.flatnonzero(np.isin(unit_of, part)) for name, part in parts.items()}
    return {name: table.take(pa.array(found)) for name, found in rows.items()}


def _hold_out(rows: Any, count: int, labels: Any, random_state: int) -> Any:
    """The other rows and `count` held-out ones, as many of each class as there should be.

    Without `labels` rows may be groups, and the cut is plain.

    Classes of one or two rows stay where they can be learned; with more classes than held-out rows
    the cut is plain.
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
