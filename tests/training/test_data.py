"""Reading, splitting and limiting of data sets: what is in a file comes out encoded."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_ray.config import Data, Limit, Split, Splits
from sft_ray.training.examples import Dataset, Examples
from sft_ray.training.sources import read_file, read_splits
from tests.models import KEYWORDS, TASK, TOKEN_ID, VOCABULARY, toy_rows, write_csv

ROWS = toy_rows(90, seed=4)
NAMES = tuple(sorted(KEYWORDS))


def table_of(rows: list[tuple[str, str]]) -> pa.Table:
    return pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})


def write_tsv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in rows))


def write_json(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("\n " + json.dumps(table_of(rows).to_pylist(), indent=1))


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table_of(rows).to_pylist()))


def write_parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    pq.write_table(table_of(rows), path)


WRITERS: dict[str, Callable[[Path, Any], Any]] = {
    "csv": write_csv,
    "tsv": write_tsv,
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def texts(dataset: Dataset, examples: Examples) -> list[tuple[str, str]]:
    """(text, label) as they come out of the encoded form, special tokens removed."""
    found = []
    for i, label in enumerate(examples.labels):
        ids = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
        assert (ids[0], ids[-1]) == (TOKEN_ID["[CLS]"], TOKEN_ID["[SEP]"])
        found.append((" ".join(VOCABULARY[t] for t in ids[1:-1]), dataset.label_names[label]))
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_every_file_type_gives_the_same_examples(tmp_path, load, kind: str) -> None:
    for split, rows in (("train", ROWS[:60]), ("validation", ROWS[60:])):
        WRITERS[kind](tmp_path / f"{split}.{kind}", rows)
    dataset = load(**{s: str(tmp_path / f"{s}.{kind}") for s in ("train", "validation")})
    assert texts(dataset, dataset.train) == ROWS[:60]
    assert texts(dataset, dataset.validation) == ROWS[60:]
    assert dataset.label_names == NAMES
    assert dataset.train.segments is None
    assert dataset.num_truncated == {"train": 0, "validation": 0}


def test_csv_keeps_quoted_delimiters_newlines_and_texts_that_look_like_nothing(tmp_path) -> None:
    rows = [('one, "two"', "a"), ("line\nbreak", "b"), ("NA", "a"), ("null", "b")]
    table = read_file(str(write_csv(tmp_path / "odd.csv", rows)))
    assert [tuple(row.values()) for row in table.to_pylist()] == rows


def test_a_json_file_may_also_hold_one_object_per_line(tmp_path) -> None:
    write_jsonl(tmp_path / "lines.json", ROWS)
    assert read_file(str(tmp_path / "lines.json")).equals(table_of(ROWS))


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A `save_to_disk` folder whose class names are not in alphabetical order."""
    names = ["tool", "plant", "animal"]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    whole = datasets.Dataset.from_dict(
        {"text": [text for text, _ in ROWS], "label": [names.index(name) for _, name in ROWS]},
        features=datasets.Features(features),
    )
    hidden = whole.select(range(5)).map(lambda row: {"label": -1})
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": whole, "test": hidden}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def test_a_save_to_disk_folder_is_sliced_and_gives_class_names(saved: str, load) -> None:
    splits = Splits(train="train[:80%]", validation="train[80%:]")
    dataset = load(path=saved, splits=splits)
    assert texts(dataset, dataset.train) == ROWS[:72]
    assert texts(dataset, dataset.validation) == ROWS[72:]
    assert dataset.label_names == ("tool", "plant", "animal")


def test_a_folder_without_validation_is_split(saved: str, load) -> None:
    dataset = load(path=saved, split=Split(validation=0.2))
    assert (len(dataset.train), len(dataset.validation)) == (72, 18)
    assert sorted(texts(dataset, dataset.train) + texts(dataset, dataset.validation)) == sorted(
        ROWS
    )


def numbered(n: int) -> list[tuple[str, str]]:
    """Two of three examples are of the first class; every text is unique."""
    return [(f"{i} cat", "often" if i % 3 else "rare") for i in range(n)]


def split_of(path: Path, seed: int = 17, **fractions: float) -> dict[str, list[tuple[str, str]]]:
    data = Data(train=str(path), split=Split(**fractions))
    tables = read_splits(data, TASK.fields, seed).tables
    return {
        name: [(row["text"], row["label"]) for row in table.to_pylist()]
        for name, table in tables.items()
    }


def test_one_file_is_cut_into_stratified_disjoint_parts(tmp_path: Path) -> None:
    rows = numbered(300)
    parts = split_of(write_csv(tmp_path / "all.csv", rows), validation=0.1, test=0.2)
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes == {"train": 210, "validation": 30, "test": 60}
    for part in parts.values():
        assert Counter(label for _, label in part)["rare"] == len(part) / 3
    assert sorted(itertools.chain(*parts.values())) == sorted(rows)


def test_a_split_is_a_function_of_data_and_seed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "all.csv", numbered(300))
    fractions = {"validation": 0.1, "test": 0.2}
    assert split_of(path, **fractions) == split_of(path, **fractions)
    assert split_of(path, **fractions) != split_of(path, seed=18, **fractions)


def test_the_sealed_part_does_not_depend_on_the_validation_share(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "all.csv", numbered(300))

    def sealed(share: float) -> list[tuple[str, str]]:
        return split_of(path, validation=share, test=0.2)["test"]

    assert len(sealed(0.1)) == 60
    assert sealed(0.1) == sealed(0.3)


def test_limit_takes_a_seeded_sample_of_each_split(tmp_path: Path, load) -> None:
    path = str(write_csv(tmp_path / "all.csv", ROWS))
    limited = {"train": path, "validation": path, "limit": Limit(train=30, validation=20)}
    dataset = load(**limited)
    taken = texts(dataset, dataset.train)
    assert (len(taken), len(dataset.validation)) == (30, 20)
    assert not Counter(taken) - Counter(ROWS)
    assert taken != ROWS[:30]
    again, other = load(**limited), load(seed=18, **limited)
    assert texts(again, again.train) == taken
    assert texts(other, other.train) != taken


def test_a_limit_leaves_the_classes_of_the_whole_split(tmp_path: Path, load) -> None:
    path = str(write_csv(tmp_path / "all.csv", ROWS))
    dataset = load(train=path, validation=path, limit=Limit(train=1))
    assert len(dataset.train) == 1
    assert dataset.label_names == NAMES


def test_a_limit_above_the_number_of_rows_takes_all_of_them(tmp_path: Path, load) -> None:
    path = str(write_csv(tmp_path / "all.csv", ROWS))
    dataset = load(train=path, validation=path, limit=Limit(train=1000))
    assert texts(dataset, dataset.train) == ROWS
