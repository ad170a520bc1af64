"""Encoding: segments, class ids, truncation, and what the cache may serve again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_ray.config import Data, Limit
from sft_ray.training.data import open_dataset, prepare
from tests.models import TASK, TOKEN_ID, VOCABULARY, tiny_tokenizer, toy_rows, write_csv

ROWS = toy_rows(90, seed=4)


def test_pairs_of_texts_give_segments(tmp_path: Path, load) -> None:
    rows = [("cat dog", "oak", "a"), ("saw", "rose fern moss", "b")]
    path = str(write_csv(tmp_path / "pairs.csv", rows, ("one", "two", "label")))
    columns = {"text": "one", "text_pair": "two"}
    examples = load(train=path, validation=path, columns=columns).train
    first = ["[CLS]", "cat", "dog", "[SEP]", "oak", "[SEP]"]
    second = ["[CLS]", "saw", "[SEP]", "rose", "fern", "moss", "[SEP]"]
    assert [VOCABULARY[token] for token in examples.tokens] == first + second
    assert examples.lengths.tolist() == [6, 7]
    assert examples.segments.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]


def test_whole_number_labels_are_named_in_numeric_order(tmp_path: Path, load) -> None:
    rows = [(f"cat {i}", label) for i, label in enumerate([10, 2, 30, 10, 2, 30])]
    path = str(write_csv(tmp_path / "numbers.csv", rows))
    dataset = load(train=path, validation=path)
    assert dataset.label_names == ("2", "10", "30")
    assert dataset.train.labels.tolist() == [1, 0, 2, 1, 0, 2]


@pytest.mark.parametrize("kind", ["int8", "int32", "int64", "uint8", "uint64"])
def test_labels_of_every_integer_type_are_read(tmp_path: Path, load, kind: str) -> None:
    labels = pa.array([0, 1] * 10, getattr(pa, kind)())
    path = str(tmp_path / "typed.parquet")
    pq.write_table(pa.table({"text": ["cat"] * 20, "label": labels}), path)
    assert load(train=path, validation=path).train.labels.tolist() == [0, 1] * 10


def test_files_whose_labels_look_different_still_share_their_classes(tmp_path: Path, load) -> None:
    train = write_csv(tmp_path / "train.csv", [("cat", "1"), ("dog", "2"), ("oak", "x")])
    validation = write_csv(tmp_path / "validation.csv", [("cat", "1"), ("dog", "2")])
    dataset = load(train=str(train), validation=str(validation))
    assert dataset.validation.labels.tolist() == [0, 1]


def test_texts_that_are_too_long_are_cut_and_counted(tmp_path: Path, load) -> None:
    rows = [("cat " * n, "ab"[n % 2]) for n in (1, 5, 6, 7, 8, 20)]
    path = str(write_csv(tmp_path / "long.csv", rows))
    short = str(write_csv(tmp_path / "short.csv", rows[:3]))
    dataset = load(train=path, validation=short, max_length=8)
    assert dataset.train.lengths.tolist() == [3, 7, 8, 8, 8, 8]
    assert dataset.num_truncated == {"train": 3, "validation": 0}


def test_constant_scores_are_those_of_always_answering_the_commonest(tmp_path, load) -> None:
    train = write_csv(tmp_path / "train.csv", [("cat", "a")] * 3 + [("dog", "b")] * 5)
    validation = write_csv(tmp_path / "validation.csv", [("cat", "a")] * 3 + [("dog", "b")])
    dataset = load(train=str(train), validation=str(validation))
    constant = TASK.constant_scores(dataset.train, dataset.validation, dataset.label_set)
    assert constant["accuracy"] == pytest.approx(0.25)
    assert constant["loss"] == pytest.approx(-(3 * math.log(3 / 8) + math.log(5 / 8)) / 4)
    used = {"[CLS]", "[SEP]", "cat", "dog"}
    assert dataset.used_tokens.tolist() == sorted(TOKEN_ID[token] for token in used)
    assert np.all(np.diff(dataset.used_tokens) > 0)


def test_encoded_data_is_reused_until_something_about_it_changes(tmp_path, tiny_bert) -> None:
    path = str(write_csv(tmp_path / "all.csv", ROWS))

    def folder(**changes: Any) -> Path:
        data = Data(**{"train": path, "max_length": 32, **changes})
        return prepare(data, TASK, str(tiny_bert), None, 17)

    first = folder()
    written = {f.name: f.stat().st_mtime_ns for f in first.iterdir()}
    assert set(written) == {
        "train.arrow",
        "validation.arrow",
        "validation.raw.arrow",
        "meta.json",
    }
    assert folder() == first
    assert {f.name: f.stat().st_mtime_ns for f in first.iterdir()} == written
    others = [folder(max_length=16), folder(limit=Limit(train=20)), folder(validation=path)]
    copy = write_csv(tmp_path / "copy.csv", ROWS)
    assert folder(train=str(copy)) == first
    write_csv(tmp_path / "all.csv", [*ROWS, ("cat", "animal")])
    assert len({first, folder(), *others}) == 5


def test_a_tokenizer_that_allows_less_is_not_served_what_another_cut_later(tmp_path) -> None:
    path = str(write_csv(tmp_path / "long.csv", [("cat " * 20, "a"), ("dog " * 20, "b")]))
    longest = {}
    for max_length in (16, 8):
        tiny_tokenizer(tmp_path / str(max_length), max_length)
        folder = prepare(
            Data(train=path, validation=path), TASK, str(tmp_path / str(max_length)), None, 1
        )
        longest[max_length] = int(open_dataset(folder).train.lengths.max())
    assert longest == {16: 16, 8: 8}
