"""From files, folders, the hub or a built-in set to encoded examples on disk.

`prepare` reads, checks and tokenises once per machine into a folder of Arrow files; `open_dataset`
maps that folder into memory.  The test split is sealed: a search neither encodes nor scores it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import AutoTokenizer

from sft_ray.cache import build_once, cache_root
from sft_ray.config import Columns, Data
from sft_ray.errors import DataError
from sft_ray.training import sources
from sft_ray.training.seeds import derived_seed

ENCODING_VERSION = 1  # change when the files below change their meaning
SPLITS = ("train", "validation")
META = "meta.json"

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Examples:
    """One encoded split; token sequences lie end to end.

    Attributes:
        tokens: token ids of all examples, [total].
        offsets: start of each example in `tokens` and the end of the last, [n + 1].
        segments: token type ids, [total], for pairs of texts; else None.
        labels: class ids, [n].
    """

    tokens: IntArray
    offsets: IntArray
    segments: IntArray | None
    labels: IntArray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> IntArray:
        """Tokens per example, [n]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Dataset:
    """Encoded splits, the names of the classes, and what is worth saying about them."""

    train: Examples
    validation: Examples
    label_names: tuple[str, ...]
    fingerprint: str
    num_truncated: dict[str, int]

    @property
    def used_tokens(self) -> IntArray:
        """Ascending ids of the vocabulary that occurs in any split."""
        return np.union1d(np.unique(self.train.tokens), np.unique(self.validation.tokens))

    @property
    def majority_share(self) -> float:
        """Validation accuracy of always answering the most frequent training label."""
        majority = np.bincount(self.train.labels).argmax()
        return float((self.validation.labels == majority).mean())


def prepare(data: Data, model_folder: str, revision: str | None, seed: int) -> Path:
    """Read, check and encode a data set; return the folder that holds it.

    Raises:
        DataError: what is wrong, naming file, column, row or label.
    """
    tables = {
        split: _limited(table, getattr(data.limit, split), seed, split)
        for split, table in sources.read_splits(data, seed).items()
    }
    tokenizer = load_tokenizer(model_folder, revision)
    max_length = min(data.max_length, tokenizer.model_max_length)
    recipe = {
        "version": ENCODING_VERSION,
        "tables": {split: _content_hash(table) for split, table in tables.items()},
        "tokenizer": _content_hash_text(tokenizer.backend_tokenizer.to_str()),
        "columns": data.columns.model_dump(),
        "max_length": max_length,
    }
    key = _content_hash_text(json.dumps(recipe, sort_keys=True))
    label_names, label_ids = sources.encode_labels(tables, data.columns.label)

    def build(folder: Path) -> None:
        truncated = {}
        for split, table in tables.items():
            encoded, truncated[split] = _encode(
                table, data.columns, tokenizer, max_length, label_ids[split]
            )
            with (
                pa.OSFile(str(folder / f"{split}.arrow"), "wb") as sink,
                pa.ipc.new_file(sink, encoded.schema) as writer,
            ):
                writer.write_table(encoded)
        meta = {"label_names": label_names, "fingerprint": key, "num_truncated": truncated}
        (folder / META).write_text(json.dumps(meta), encoding="utf-8")

    return build_once(cache_root() / "encoded" / key, build)


def open_dataset(folder: Path) -> Dataset:
    """Map a folder written by `prepare` into memory."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    splits = {split: _open_examples(folder / f"{split}.arrow") for split in SPLITS}
    return Dataset(
        train=splits["train"],
        validation=splits["validation"],
        label_names=tuple(meta["label_names"]),
        fingerprint=meta["fingerprint"],
        num_truncated=meta["num_truncated"],
    )


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
    if not tokenizer.is_fast:
        raise DataError(f"model: {model_folder} has no fast tokenizer (tokenizer.json); add one")
    return tokenizer


def _limited(table: pa.Table, limit: int | None, seed: int, split: str) -> pa.Table:
    if limit is None or limit >= table.num_rows:
        return table
    order = np.random.default_rng(derived_seed(seed, "limit", split)).permutation(table.num_rows)
    return table.take(pa.array(np.sort(order[:limit])))


def _encode(
    table: pa.Table, columns: Columns, tokenizer: Any, max_length: int, labels: IntArray
) -> tuple[pa.Table, int]:
    texts = [table.column(columns.text).to_pylist()]
    if columns.text_pair is not None:
        texts.append(table.column(columns.text_pair).to_pylist())
    encoded = tokenizer(
        *texts,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=len(texts) == 2,
    )
    arrays = {
        "tokens": pa.array(encoded["input_ids"], pa.large_list(pa.int32())),
        "label": pa.array(labels, pa.int64()),
    }
    if "token_type_ids" in encoded:
        arrays["segments"] = pa.array(encoded["token_type_ids"], pa.large_list(pa.int8()))
    truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    return pa.table(arrays).combine_chunks(), truncated


def _open_examples(path: Path) -> Examples:
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all().combine_chunks()
    tokens = table.column("tokens").chunk(0)
    segments = table.column("segments").chunk(0) if "segments" in table.column_names else None
    return Examples(
        tokens=tokens.values.to_numpy(),
        offsets=tokens.offsets.to_numpy(),
        segments=None if segments is None else segments.values.to_numpy(),
        labels=table.column("label").chunk(0).to_numpy(),
    )


def _content_hash(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _content_hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
