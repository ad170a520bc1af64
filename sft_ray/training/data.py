"""From files, folders, the hub or a built-in set to encoded examples on disk.

`prepare` reads, checks and tokenises once per machine into a folder of Arrow files; `open_dataset`
maps that folder into memory.  The test split is sealed: a search counts its duplicates in the
other splits, compares its labels with theirs, and neither encodes nor scores it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from transformers import AutoTokenizer

from sft_ray.cache import build_once, cache_root
from sft_ray.config import Data
from sft_ray.errors import DataError
from sft_ray.training import labels, sources
from sft_ray.training.columns import answer_pairs, is_unlabelled, units
from sft_ray.training.encoding import Encoder
from sft_ray.training.examples import Dataset, Examples, LabelSet
from sft_ray.training.seeds import derived_seed
from sft_ray.training.sources import Source
from sft_ray.training.tasks import Task

ENCODING_VERSION = 3  # change when the files below change their meaning
RARE = 0.01  # share of a split's rows whose labels training may lack
META = "meta.json"
RAW = "validation.raw.arrow"
PER_TOKEN = ("tokens", "segments", "words", "starts", "ends")


def prepare(
    data: Data,
    task: Task,
    model_folder: str,
    revision: str | None,
    seed: int,
    objective: str | None = None,
) -> Path:
    """Read, check and encode a data set; return the folder that holds it.

    Args:
        objective: a metric that the data has to allow.

    Raises:
        DataError: what is wrong, naming file, column, row or label.
    """
    source = sources.read_splits(data, task.fields, seed)
    tables, label_set = with_classes(source, data, task)
    if objective in labels.RANKING:
        labels.check_order(source.tables["train"], label_set.names, source.names, objective)
    for split in ("train", "validation"):
        tables[split] = limited(tables[split], getattr(data.limit, split), seed, split)
    duplicates = count_duplicates(tables, task)
    test, test_split = tables.pop("test", None), "none"
    if test is not None:
        test_split = "unlabelled" if is_unlabelled(test, task.fields.target_name) else "labelled"
    encoder = build_encoder(data, model_folder, revision)
    recipe = {
        "version": ENCODING_VERSION,
        "task": task.name,
        "tables": {split: _content_hash(table) for split, table in tables.items()},
        "labels": [label_set.names, label_set.negative],
        "tokenizer": _content_hash_text(encoder.tokenizer.backend_tokenizer.to_str()),
        "max_length": encoder.max_length,
        "doc_stride": encoder.doc_stride,
    }
    fingerprint = _content_hash_text(json.dumps(recipe, sort_keys=True))
    # What is told of the data beside it, and decides no number.
    told = [duplicates, source.num_left_out, test_split]
    key = _content_hash_text(json.dumps([fingerprint, told], sort_keys=True))

    def build(folder: Path) -> None:
        truncated = {}
        for split, table in tables.items():
            examples = encode_split(table, task, encoder, label_set)
            truncated[split] = examples.num_truncated
            _write_arrow(folder / f"{split}.arrow", _as_table(examples))
        _write_arrow(folder / RAW, tables["validation"])
        meta = {
            "label_names": label_set.names,
            "negative": label_set.negative,
            "fingerprint": fingerprint,
            "num_truncated": truncated,
            "max_length": encoder.max_length,
            "num_duplicates": duplicates,
            "num_left_out": source.num_left_out,
            "test_split": test_split,
        }
        (folder / META).write_text(json.dumps(meta), encoding="utf-8")

    return build_once(cache_root() / "encoded" / key, build)


def prepare_here(folder: Path, encode: Callable[[], Path]) -> Path:
    """`folder`, or the same data as `encode` makes it on this machine, once for all its workers.

    Raises:
        DataError: this machine sees other data than the one that named the folder.
    """
    mine = cache_root() / "encoded" / folder.name
    mine.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{mine}.fetch"):
        if folder.exists():
            return folder
        found = mine if mine.exists() else encode()
    if found.name != folder.name:
        raise DataError(
            f"data: this machine encodes to {found.name}, the driver's to {folder.name}; give all "
            "machines the same files and versions"
        )
    return found


def open_dataset(folder: Path) -> Dataset:
    """Map a folder written by `prepare` into memory."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    return Dataset(
        train=_open_examples(folder / "train.arrow"),
        validation=_open_examples(folder / "validation.arrow", folder / RAW),
        label_set=LabelSet(tuple(meta["label_names"]), meta["negative"]),
        fingerprint=meta["fingerprint"],
        num_truncated=meta["num_truncated"],
        max_length=meta["max_length"],
        num_duplicates=meta["num_duplicates"],
        num_left_out=meta["num_left_out"],
        test_split=meta["test_split"],
    )


def build_encoder(data: Data, model_folder: str, revision: str | None) -> Encoder:
    """The model's tokenizer with the experiment's limits."""
    tokenizer = load_tokenizer(model_folder, revision)
    return Encoder(tokenizer, min(data.max_length, tokenizer.model_max_length), data.doc_stride)


def with_classes(source: Source, data: Data, task: Task) -> tuple[dict[str, pa.Table], LabelSet]:
    """Tables whose class labels are names, and what there is to answer.

    The training split defines the classes; a label that only a few rows of another split have is
    one too, for a rare class can miss training by chance.  The labels of the test split are
    compared, too: a search should not end with one that its models cannot answer.

    Raises:
        DataError: labels that do not fit each other or the experiment.
    """
    tables, target = source.tables, task.fields.target_name
    if not task.classes:
        if target == "label":
            labels.check_values(tables["train"], target, str(data.columns.get(target) or target))
        rows = tables["train"].column(target).to_pylist() if target == "answers" else []
        return dict(tables), LabelSet((), "" if any(not answer_pairs(v) for v in rows) else None)
    column = str(data.columns.get(target) or target)
    classes = labels.choose_classes(tables["train"], target, source.names, column)
    labelled = {
        split: labels.with_names(table, target, source.names, source.where[split])
        for split, table in tables.items()
        if not is_unlabelled(table, target)
    }
    for table in labelled.values():
        rare = labels.unknown_names(table, target, classes)
        if source.names is None and rare.total() <= RARE * table.num_rows:
            classes += tuple(sorted(rare))
    if classes != source.names and labels.are_grades(classes):
        classes = tuple(sorted(classes, key=int))  # ranking makes use of them
    for split, table in labelled.items():
        listed = data.label_names is not None
        labels.check_names(table, target, classes, source.where[split], listed=listed)
    if data.negative_label is not None and data.negative_label not in classes:
        raise DataError(
            f"data.negative_label: {data.negative_label!r} is no label; there are "
            f"{', '.join(map(repr, classes[:10]))}"
        )
    return {**tables, **labelled}, LabelSet(classes, data.negative_label)


def count_duplicates(tables: dict[str, pa.Table], task: Task) -> dict[str, int]:
    """Rows of one split whose inputs occur in another; a leak if there are many."""
    inputs = {**task.fields.inputs, **task.fields.optional}
    seen = {
        split: [
            json.dumps(row)
            for row in table.select(
                [name for name in inputs if name in table.column_names and name != "group"]
            ).to_pylist()
        ]
        for split, table in tables.items()
    }
    pairs = [("validation", "train"), ("test", "train"), ("test", "validation")]
    counts = {}
    for later, earlier in pairs:
        if later in seen:
            known = set(seen[earlier])
            counts[f"{later} in {earlier}"] = sum(row in known for row in seen[later])
    return {name: count for name, count in counts.items() if count}


def encode_split(table: pa.Table, task: Task, encoder: Encoder, label_set: LabelSet) -> Examples:
    """Tokens and labels of checked rows; rows without labels get none."""
    encoded = task.encode(table, encoder)
    unlabelled = is_unlabelled(table, task.fields.target_name)
    found = np.zeros(0) if unlabelled else task.label(table, encoded, label_set)
    return Examples(**vars(encoded), labels=found, raw=table)


def load_tokenizer(model_folder: str, revision: str | None = None) -> Any:
    """The model's fast tokenizer.

    Raises:
        DataError: the folder or repository has none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # the library raises many kinds for a broken folder
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"model: no tokenizer can be loaded from {model_folder}: {reason}"
        ) from None
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # The library makes an empty one from config.json alone, to which every text is unknown.
        raise DataError(
            f"model: {model_folder} has no vocabulary (tokenizer.json, vocab.txt, …); save the "
            "tokenizer beside the model"
        )
    if tokenizer.pad_token_id is None:
        raise DataError(f"model: the tokenizer of {model_folder} has no padding token; name one")
    if not tokenizer.is_fast:
        raise DataError(f"model: {model_folder} has no fast tokenizer (tokenizer.json); add one")
    return tokenizer


def limited(table: pa.Table, limit: int | None, seed: int, split: str) -> pa.Table:
    """The first `limit` rows of a seeded shuffle, in their old order.

    Of groups the first whole ones that fit, at least one.
    """
    if limit is None or limit >= table.num_rows:
        return table
    unit_of = units(table)
    sizes = np.bincount(unit_of)
    order = np.random.default_rng(derived_seed(seed, "limit", split)).permutation(len(sizes))
    count = max(1, np.count_nonzero(np.cumsum(sizes[order]) <= limit))
    return table.take(pa.array(np.flatnonzero(np.isin(unit_of, order[:count]))))


def _as_table(examples: Examples) -> pa.Table:
    """One row per item; what is per token lies in lists."""

    def lists(values: Any) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array(examples.offsets), pa.array(values))

    columns: dict[str, Any] = {"tokens": lists(examples.tokens), "rows": pa.array(examples.rows)}
    if examples.segments is not None:
        columns["segments"] = lists(examples.segments)
    if examples.words is not None:
        columns["words"] = lists(examples.words)
    if examples.spans is not None:
        columns["starts"] = lists(np.ascontiguousarray(examples.spans[:, 0]))
        columns["ends"] = lists(np.ascontiguousarray(examples.spans[:, 1]))
    if examples.labels_per_token:
        columns["labels"] = lists(examples.labels)
    elif examples.labels.ndim == 2:
        width = examples.labels.shape[1]
        columns["labels"] = pa.FixedSizeListArray.from_arrays(
            pa.array(examples.labels.reshape(-1)), width
        )
    else:
        columns["labels"] = pa.array(examples.labels)
    return pa.table(columns)


def _open_examples(path: Path, raw: Path | None = None) -> Examples:
    table = _read_arrow(path)
    values = {name: table.column(name).chunk(0) for name in table.column_names}
    offsets = values["tokens"].offsets.to_numpy()
    flat = {n: values[n].values.to_numpy() for n in PER_TOKEN if n in values}
    labels_ = values["labels"]
    if pa.types.is_large_list(labels_.type):
        found = labels_.values.to_numpy()
    elif pa.types.is_fixed_size_list(labels_.type):
        found = labels_.values.to_numpy().reshape(-1, labels_.type.list_size)
    else:
        found = labels_.to_numpy()
    return Examples(
        tokens=flat["tokens"],
        offsets=offsets,
        segments=flat.get("segments"),
        rows=values["rows"].to_numpy(),
        words=flat.get("words"),
        # Only scoring looks at characters.
        spans=np.stack([flat["starts"], flat["ends"]], axis=1)
        if raw and "starts" in flat
        else None,
        labels=found,
        raw=None if raw is None else _read_arrow(raw),
    )


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all().combine_chunks()


def _content_hash(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    table = table.combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _content_hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
