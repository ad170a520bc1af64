"""Every problem with a data set is a DataError that names the file, column, row or label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_ray.config import Data, Split, Splits
from sft_ray.errors import DataError
from sft_ray.training.data import prepare
from tests.models import TASK, toy_rows, write_csv

GOOD = toy_rows(30, seed=4)
NONE = (None, None)


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def raw(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def doubled(path: Path, twice: str) -> str:
    header = (twice, "text", "label")
    return str(write_csv(path, [("a", text, label) for text, label in GOOD], header))


def saved(folder: Path, labels: list[int], second: str = "validation") -> str:
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = {"text": ["cat"] * len(labels), "label": labels}
    part = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": part, second: part}).save_to_disk(folder)
    return str(folder)


def csv(path: Path, rows: list[tuple[Any, ...]]) -> str:
    return str(write_csv(path, rows))


# Name of a problem -> the data section for a folder that has it, and what the message must say.
Case = tuple[Callable[[Path], dict[str, Any]], list[str]]
CASES: dict[str, Case] = {
    "missing file": (
        lambda at: {"train": str(at / "none.csv")},
        ["none.csv", "no such file"],
    ),
    "wrong suffix": (
        lambda at: {"train": raw(at / "book.xlsx", b"x")},
        ["book.xlsx", "'.xlsx'", ".csv, .tsv, .json, .jsonl, .parquet"],
    ),
    "missing column": (
        lambda at: {"train": csv(at / "a.csv", GOOD), "columns": {"text": "txt"}},
        ["data.train", "a.csv", "no column 'txt'", "did you mean 'text'?"],
    ),
    "column given twice": (
        lambda at: {"train": doubled(at / "twice.csv", "text")},
        ["data.train", "twice.csv", "'text'"],
    ),
    "label column given twice": (
        lambda at: {"train": doubled(at / "twice.csv", "label")},
        ["data.train", "twice.csv", "'label'"],
    ),
    "null text": (
        lambda at: {"train": parquet(at / "a.parquet", {"text": ["a", None], "label": [0, 1]})},
        ["data.train", "a.parquet", "'text' is empty in row 2"],
    ),
    "null label": (
        lambda at: {"train": raw(at / "a.jsonl", b'{"text":"a","label":"x"}\n{"text":"b"}\n')},
        ["data.train", "a.jsonl", "'label' is empty in row 2"],
    ),
    "two null labels": (
        lambda at: {"train": parquet(at / "a.parquet", {"text": ["a"] * 3, "label": [0, *NONE]})},
        ["'label' is empty in 2 rows, first in row 2; fill or remove them"],
    ),
    "empty label of numbers in a csv": (
        lambda at: {"train": csv(at / "a.csv", [("a", 1), ("b", ""), ("c", 2)])},
        ["data.train", "a.csv", "'label' is empty in row 2"],
    ),
    "empty label of texts in a csv": (
        lambda at: {"train": csv(at / "a.csv", [*GOOD, ("cat", "")])},
        ["data.train", "a.csv", "'label' is empty in row 31"],
    ),
    "labels beside NA in a csv": (
        lambda at: {"train": csv(at / "a.csv", [("a", "01"), ("b", "02"), ("c", "NA")])},
        ["data.train", "a.csv", "'label' is empty in row 3"],
    ),
    "truth beside NA in a csv": (
        lambda at: {"train": csv(at / "a.csv", [("a", "TRUE"), ("b", "FALSE"), ("c", "NA")])},
        ["data.train", "a.csv", "'label' is empty in row 3"],
    ),
    "scores for labels in a csv": (
        lambda at: {
            "train": csv(at / "a.csv", [("a", f"{i % 25 / 10:.2f}") for i in range(50)]),
            "validation": csv(at / "b.csv", [("a", "0.10"), ("b", "0.20")]),
        },
        ["data.train", "data.validation", "'label'", "got double", "set task: regression"],
    ),
    "one class": (
        lambda at: {"train": csv(at / "a.csv", [("a", "only")] * 20)},
        ["at least two labels", "'only'", "'label'"],
    ),
    "label unknown in validation": (
        lambda at: {
            "train": csv(at / "a.csv", GOOD),
            "validation": csv(at / "b.csv", [*GOOD, ("x", "stone"), ("y", "stone")]),
        },
        ["validation", "'stone' (2 times)", "'animal', 'plant', 'tool'"],
    ),
    "label that data.label_names lacks": (
        lambda at: {"train": csv(at / "a.csv", GOOD), "label_names": ["animal", "tool"]},
        ["data.train", "'plant' (", "among data.label_names 'animal', 'tool'; add it there, or"],
    ),
    "label of validation that data.label_names lacks": (
        lambda at: {
            "train": csv(at / "a.csv", GOOD),
            "validation": csv(at / "b.csv", [*GOOD, ("x", "stone")]),
            "label_names": ["animal", "plant", "tool"],
        },
        ["data.validation", "'stone' (1 times) is not among data.label_names 'animal', "],
    ),
    "unlabelled rows": (
        lambda at: {"train": csv(at / "a.csv", [("a", 0), ("b", 1), ("c", -1)])},
        ["data.train", "a.csv", "'label' is -1, unlabelled, in row 3"],
    ),
    "header only": (
        lambda at: {"train": csv(at / "a.csv", [])},
        ["data.train", "a.csv", "has no rows"],
    ),
    "empty validation file": (
        lambda at: {
            "train": csv(at / "a.csv", GOOD),
            "validation": raw(at / "b.jsonl", b""),
        },
        ["b.jsonl", "cannot be read as jsonl"],
    ),
    "damaged parquet": (
        lambda at: {"train": raw(at / "a.parquet", b"PAR1 this is none PAR1")},
        ["a.parquet", "cannot be read as parquet"],
    ),
    "cut json": (
        lambda at: {"train": raw(at / "a.json", b'[{"text": "a", "la')},
        ["a.json", "cannot be read as json"],
    ),
    "json of other things": (
        lambda at: {"train": raw(at / "a.json", b"[1, 2]")},
        ["a.json", "cannot be read as json"],
    ),
    "csv with a field too many": (
        lambda at: {"train": raw(at / "a.csv", b"text,label\na,b,c\n")},
        ["a.csv", "cannot be read as csv", "Expected 2 columns, got 3"],
    ),
    "csv that is not UTF-8": (
        lambda at: {"train": raw(at / "a.csv", "text,label\ncafé,a\nx,b\n".encode("latin1"))},
        ["a.csv", "'text' must hold texts"],
    ),
    "texts that are numbers": (
        lambda at: {"train": csv(at / "a.csv", [(1, "a"), (2, "b")])},
        ["data.train", "a.csv", "'text' must hold texts, got int64"],
    ),
    "too few rows to split": (
        lambda at: {
            "train": csv(at / "a.csv", GOOD[:3]),
            "split": Split(validation=0.1, test=0.1),
        },
        ["data.split", "3 rows cannot be split", "no rows for test; raise data.split.test"],
    ),
    "too few rows for validation": (
        lambda at: {"train": csv(at / "a.csv", GOOD[:4]), "split": Split(validation=0.1)},
        ["validation 0.1 leaves no rows for validation; raise data.split.validation or give"],
    ),
    "too few rows for training": (
        lambda at: {
            "train": csv(at / "a.csv", GOOD[:2]),
            "split": Split(validation=0.4, test=0.3),
        },
        ["validation 0.4 leaves no rows for train; lower data.split.validation"],
    ),
    "semicolons": (
        lambda at: {"train": raw(at / "a.csv", b"text;label\na, b;x\n")},
        ["a.csv: is separated by ';'; save it with commas, or with tabs as .tsv"],
    ),
    "tabs in a csv": (
        lambda at: {"train": raw(at / "a.csv", b"text\tlabel\na\tx\n")},
        ["a.csv: is separated by tabs; save it with commas, or with tabs as .tsv"],
    ),
    **{
        f"{suffix} in {code}": (
            lambda at, suffix=suffix, code=code: {
                "train": raw(at / f"a.{suffix}", "\ufefftext\tlabel\na\tx\n".encode(code))
            },
            [f"a.{suffix}: is written in UTF-16; save the file as UTF-8"],
        )
        for suffix in ("csv", "tsv", "json", "jsonl")
        for code in ("utf-16-le", "utf-16-be")
    },
    "folder in place of a file": (
        lambda at: {"train": str(at)},
        ["is a folder; name a file here, or the folder as data.path"],
    ),
    "labels that are not UTF-8": (
        lambda at: {"train": raw(at / "a.csv", "text,label\na,café\nb,x\n".encode("latin1"))},
        ["a.csv", "save the file as UTF-8"],
    ),
    "json of numbers and texts": (
        lambda at: {
            "train": raw(at / "a.json", b'[{"text":"a","label":1},{"text":"b","label":"x"}]')
        },
        ["a.json: cannot be read as json: column 'label' is not of one type in all rows; mend it"],
    ),
    "jsonl of numbers and texts": (
        lambda at: {
            "train": raw(at / "a.jsonl", b'{"text":"a","label":1}\n{"text":"b","label":"x"}\n')
        },
        ["a.jsonl: cannot be read as jsonl: ", "(/label)", "in row 2"],
    ),
    "file in a bucket": (
        lambda at: {"train": "s3://bucket/a.csv"},
        ["s3://bucket/a.csv: data files are local; copy it to every machine that trains"],
    ),
    "a test part beside a test file": (
        lambda at: {
            "train": csv(at / "a.csv", GOOD),
            "test": csv(at / "b.csv", GOOD),
            "split": Split(validation=0.2, test=0.2),
        },
        ["data.split.test", "b.csv is a test split already", "remove `test`"],
    ),
    "a test part beside a test split": (
        lambda at: {
            "path": saved(at / "folder", [0, 1] * 20, second="test"),
            "split": Split(validation=0.2, test=0.2),
        },
        ["data.split.test", "folder is a test split already, or has one", "remove `test`"],
    ),
    "folder of other files": (
        lambda at: {"path": str(Path(raw(at / "notes.odt", b"x")).parent)},
        ["data.path", "its files must be called train, validation and test, with their endings"],
    ),
    "jsonl of lists": (
        lambda at: {"train": raw(at / "a.jsonl", b'["a", 1]\n["b", 2]\n')},
        ["a.jsonl", "cannot be read as jsonl"],
    ),
    "unknown slice": (
        lambda at: {"path": saved(at / "folder", [0, 1]), "splits": Splits(train="trian[:50%]")},
        ["data.splits.train", "'trian[:50%]'", "its splits: train, validation"],
    ),
    "malformed slice": (
        lambda at: {"path": saved(at / "folder", [0, 1]), "splits": Splits(train="train[:5%")},
        ["data.splits.train", "'train[:5%'", "its splits: train, validation"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_problem_is_a_data_error_that_names_it(tmp_path, tiny_bert, name: str) -> None:
    section, fragments = CASES[name]
    with pytest.raises(DataError) as refusal:
        prepare(Data(**section(tmp_path)), TASK, str(tiny_bert), None, seed=17)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_all_problems_of_all_files_are_reported_together(tmp_path: Path, tiny_bert: Path) -> None:
    train = csv(tmp_path / "a.csv", [("", "a"), ("dog", "b")])
    validation = csv(tmp_path / "b.csv", [("", "a"), ("cat", "b")])
    with pytest.raises(DataError) as refusal:
        prepare(Data(train=train, validation=validation), TASK, str(tiny_bert), None, seed=17)
    assert [p.split(" ")[0] for p in refusal.value.problems] == ["data.train", "data.validation"]


def test_a_model_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    train = csv(tmp_path / "a.csv", GOOD)
    with pytest.raises(DataError, match=f"no tokenizer can be loaded from {tmp_path}"):
        prepare(Data(train=train), TASK, str(tmp_path), None, seed=17)


def test_nothing_is_cached_for_data_that_was_refused(tmp_path, tiny_bert, monkeypatch) -> None:
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path / "cache"))
    train = csv(tmp_path / "a.csv", [("a", "only")] * 20)
    with pytest.raises(DataError):
        prepare(Data(train=train), TASK, str(tiny_bert), None, seed=17)
    assert not list(tmp_path.glob("cache/**/*.arrow"))
