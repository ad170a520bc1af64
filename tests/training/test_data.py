"""Reading, splitting and limiting of data sets: what is in a file comes out encoded."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_ray.config import Data, Experiment, Limit, Split, Splits
from sft_ray.errors import DataError
from sft_ray.training.columns import is_unlabelled
from sft_ray.training.data import limited, with_classes
from sft_ray.training.examples import Dataset, Examples
from sft_ray.training.files import read_file
from sft_ray.training.preparation import prepare_training
from sft_ray.training.seeds import derived_seed
from sft_ray.training.sources import read_splits
from sft_ray.training.tasks import TASKS
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


def test_quotes_in_a_tab_separated_file_may_be_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"

    def texts_of(*lines: str) -> list[str]:
        path.write_text("".join(f"{line}\n" for line in ("text\tlabel", *lines)))
        return read_file(str(path)).column("text").to_pylist()

    assert texts_of('"the cat\ta', 'a dog" here\tb', "oak\ta") == ['"the cat', 'a dog" here', "oak"]
    assert texts_of("oak\ta", '"the cat\tb') == ["oak", '"the cat']  # never ends
    assert texts_of('"a ""cat""\nhere"\ta', "oak\tb") == ['a "cat"\nhere', "oak"]
    assert texts_of('"a\tcat\n\there"\ta', "oak\tb") == ["a\tcat\n\there", "oak"]
    assert texts_of('"a\tb\nc"\t1', "oak\t0") == ["a\tb\nc", "oak"]  # as pandas writes it
    with pytest.raises(DataError, match="Expected 2 columns, got 3"):
        texts_of("a\tb\tc")


def test_a_json_file_may_also_hold_one_object_per_line(tmp_path) -> None:
    write_jsonl(tmp_path / "lines.json", ROWS)
    assert read_file(str(tmp_path / "lines.json")).equals(table_of(ROWS))


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_list_of_rows_has_the_columns_of_all_of_them(tmp_path, kind: str, mark: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_text(f'{mark} [{{"text": "a"}},\n{{"label": 1, "text": "b"}}]', encoding="utf-8")
    expected = [{"text": "a", "label": None}, {"text": "b", "label": 1}]
    assert read_file(str(path)).to_pylist() == expected


def test_a_list_of_rows_may_have_a_column_of_no_one_type_that_its_first_row_lacks(tmp_path) -> None:
    path, rows = tmp_path / "a.json", [{"text": "a"}, {"text": "b", "x": 1}, {"text": "c", "x": []}]
    path.write_text(json.dumps(rows))
    assert read_file(str(path)).to_pylist() == [{"text": text} for text in "abc"]
    data = Data(train=str(path), validation=str(path), columns={"label": "x"})
    with pytest.raises(DataError, match="column 'x' is not of one type in all rows"):
        read_splits(data, TASK.fields, 17)
    path.write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match="cannot be read as json"):
        read_file(str(path))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_row_may_be_long(tmp_path: Path, kind: str) -> None:
    rows = [("cat", "a"), ("oak " * 1_500_000, "b"), ("dog", "c")]
    WRITERS[kind](tmp_path / f"a.{kind}", rows)
    assert read_file(str(tmp_path / f"a.{kind}")).equals(table_of(rows))


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("train", "dev", "classes"),
    [
        (["01", "02"], ["02"], ("01", "02")),
        (["01", "1"], ["1"], ("01", "1")),
        (["01", "02", "A1"], ["01", "02"], ("01", "02", "A1")),
        (["true", "false", "half-true"], ["true", "false"], ("false", "half-true", "true")),
        (["true", "false"], ["true"], ("false", "true")),
        (["1", "1.5", "2"], ["1", "2"], ("1", "1.5", "2")),
        (["3.9", "3.10"], ["3.10"], ("3.10", "3.9")),
        (["3.9", "3.10"], ["3.9"], ("3.10", "3.9")),
        (["0.5", "1.5"], ["1.5"], ("0.5", "1.5")),
        (["01", "1", "2"], ["1", "2"], ("01", "1", "2")),
        (["1.5", "2.5", "none"], ["1.5", "2.5"], ("1.5", "2.5", "none")),
        (["+1", "-1"], ["-1", "+1"], ("+1", "-1")),
        (["2024-01-01", "2024-02-01"], ["2024-02-01"], ("2024-01-01", "2024-02-01")),
        (["12:30", "10:00"], ["10:00"], ("10:00", "12:30")),
        (["10", "9", "0"], ["9", "10"], ("0", "9", "10")),
    ],
)
def test_labels_are_what_is_written(tmp_path: Path, kind: str, train, dev, classes) -> None:
    written = {"train": train, "validation": dev}
    for split, labels in written.items():
        WRITERS[kind](tmp_path / f"{split}.{kind}", [("cat", label) for label in labels])
    data = Data(**{split: str(tmp_path / f"{split}.{kind}") for split in written})
    tables, label_set = with_classes(read_splits(data, TASK.fields, 17), data, TASK)
    assert label_set.names == classes
    assert {split: table.column("label").to_pylist() for split, table in tables.items()} == written


def test_one_file_that_is_cut_keeps_its_labels(tmp_path: Path) -> None:
    rows = [(f"{i} cat", f"{i % 2:02}") for i in range(40)]
    parts = split_of(write_csv(tmp_path / "all.csv", rows), validation=0.2, test=0.2)
    assert {label for part in parts.values() for _, label in part} == {"00", "01"}
    assert sorted(itertools.chain(*parts.values())) == sorted(rows)


def test_texts_that_are_numbers_are_texts_where_another_file_has_texts(tmp_path: Path) -> None:
    header = ("text", "text_pair", "label")
    write_csv(tmp_path / "train.csv", [("cat", "oak", 0), ("dog", "1999", 1)], header)
    write_csv(tmp_path / "dev.csv", [("cat", "007", 0), ("12:30", "1.50", 1)], header)
    write_csv(tmp_path / "test.csv", [("true", "3", ""), ("2024-01-01", "4", "")], header)
    files = {"train": "train.csv", "validation": "dev.csv", "test": "test.csv"}
    data = Data(**{split: str(tmp_path / file) for split, file in files.items()})
    tables = read_splits(data, TASK.fields, 17).tables
    assert tables["validation"].column("text_pair").to_pylist() == ["007", "1.50"]
    assert tables["test"].column("text").to_pylist() == ["true", "2024-01-01"]
    assert is_unlabelled(tables["test"], "label")
    for split in ("train", "validation"):
        assert tables[split].schema.field("label").type == pa.int64()


@pytest.mark.parametrize("labels", [["05", "10"], ["1.50", "2"], ["+1", "-1"], ["0", "1"]])
def test_numbers_of_a_regression_stay_numbers(tmp_path: Path, labels: list[str]) -> None:
    path = str(write_csv(tmp_path / "a.csv", [("cat", label) for label in labels]))
    tables = read_splits(Data(train=path, validation=path), TASKS["regression"].fields, 17).tables
    assert tables["train"].column("label").to_pylist() == [float(label) for label in labels]


@pytest.mark.parametrize(
    ("train", "validation", "names", "found"),
    [
        (["no", "yes"], [1, 0], ["no", "yes"], ["yes", "no"]),  # places in the names
        (["01", "1"], [1, 1], ["1", "01"], ["1", "1"]),  # no places beside what is no number
        (["1.5", "2"], [2, 2], ["1", "1.5", "2"], ["2", "2"]),
    ],
)
def test_numbers_beside_labels_in_words_are_places_in_the_names(
    tmp_path: Path, train: list[str], validation: list[int], names: list[str], found: list[str]
) -> None:
    write_csv(tmp_path / "train.csv", list(zip(("cat", "dog"), train, strict=True)))
    write_csv(tmp_path / "dev.csv", list(zip(("cat", "dog"), validation, strict=True)))
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "dev.csv")}
    data = Data(**files, label_names=names)
    tables, _ = with_classes(read_splits(data, TASK.fields, 17), data, TASK)
    assert tables["validation"].column("label").to_pylist() == found


@pytest.mark.parametrize(
    ("train", "names"),
    [(["01", "1"], None), (["1.5", "2"], ["1", "1.5", "2"]), (["0.0", "1.0"], ["0.0", "1.0"])],
)
def test_numbers_of_json_beside_labels_that_are_what_is_written_are_refused(
    tmp_path: Path, train: list[str], names: list[str] | None
) -> None:
    write_csv(tmp_path / "train.csv", list(zip(("cat", "dog"), train, strict=True)))
    (tmp_path / "dev.jsonl").write_text('{"text": "cat", "label": 1}\n')
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "dev.jsonl")}
    with pytest.raises(DataError, match="'label' are whole numbers, and texts"):
        read_splits(Data(**files, label_names=names), TASK.fields, 17)


def test_numbers_of_json_beside_decimals_have_their_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("cat", "1"), ("dog", "1.5"), ("oak", "2")])
    (tmp_path / "dev.jsonl").write_text('{"text": "cat", "label": 1}\n')
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "dev.jsonl")}
    data = Data(**files)
    tables, labels = with_classes(read_splits(data, TASK.fields, 17), data, TASK)
    assert labels.names == ("1", "1.5", "2")
    assert tables["validation"].column("label").to_pylist() == ["1"]


def test_the_file_whose_labels_have_no_place_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("cat", "0"), ("dog", "1")])
    write_csv(tmp_path / "dev.csv", [("cat", "0.0"), ("dog", "1.0")])
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "dev.csv")}
    data = Data(**files, label_names=["neg", "pos"])
    with pytest.raises(DataError, match=r"dev.csv\): the label '0.0'"):
        with_classes(read_splits(data, TASK.fields, 17), data, TASK)


def test_a_test_split_changes_no_fingerprint(tmp_path: Path, tiny_bert: Path) -> None:
    for split in ("train", "dev", "test"):
        write_csv(tmp_path / f"{split}.csv", [(f"{split} cat", "x"), (f"{split} dog", "y")])
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "dev.csv")}
    without, with_test = (
        prepare_training(
            Experiment.from_tree(
                {
                    "name": "t",
                    "model": str(tiny_bert),
                    "data": {**files, "max_length": 16, **more},
                }
            )
        ).dataset
        for more in ({}, {"test": str(tmp_path / "test.csv")})
    )
    assert (without.test_split, with_test.test_split) == ("none", "labelled")
    assert without.fingerprint == with_test.fingerprint


def test_whole_numbers_beside_decimals_that_are_names_are_no_places(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("cat", "1.0"), ("dog", "2.0"), ("oak", "3.0")])
    write_csv(tmp_path / "dev.csv", [("cat", "1"), ("dog", "2")])
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "dev.csv")}
    data = Data(**files, label_names=["1.0", "2.0", "3.0"])
    with pytest.raises(DataError, match="the label '1'"):
        with_classes(read_splits(data, TASK.fields, 17), data, TASK)


@pytest.mark.parametrize("spelling", ["true false", "TRUE FALSE"])
@pytest.mark.parametrize("other", ["csv", "jsonl", "parquet"])
def test_truth_has_one_name_in_all_files(tmp_path, tiny_bert, spelling: str, other: str) -> None:
    """And in class_weights and label_names, where YAML has read it."""
    train = [(f"cat {i}", spelling.split()[i % 2], i // 4) for i in range(12)]
    header = ("text", "label", "group")
    write_csv(tmp_path / "train.csv", train, header)
    rows = [
        {"text": text, "label": label.lower() == "true", "group": g} for text, label, g in train
    ]
    if other == "csv":
        write_csv(tmp_path / "dev.csv", [tuple(row.values()) for row in rows], header)
    elif other == "jsonl":
        (tmp_path / "dev.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dev.parquet")
    for names in (None, [True, False]):
        tree = {
            "name": "truth",
            "model": str(tiny_bert),
            "data": {
                "train": str(tmp_path / "train.csv"),
                "validation": str(tmp_path / f"dev.{other}"),
                "max_length": 16,
                "label_names": names,
            },
            "train": {"class_weights": {True: 2.0, False: 1.0}},
            "search": {"objective": "mrr"},
        }
        found = prepare_training(Experiment.from_tree(tree)).dataset
        assert found.label_names == (("true", "false") if names else ("false", "true"))
        expected = [i % 2 for i in range(12)] if names else [(i + 1) % 2 for i in range(12)]
        assert found.validation.labels.tolist() == found.train.labels.tolist() == expected


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


@pytest.fixture(params=["saved", "files"])
def bare(request, tmp_path: Path, monkeypatch) -> Callable[..., str]:
    """A data set with splits of the names given: of `save_to_disk`, or as the hub's are read."""

    def write(*names: str) -> str:
        folder = tmp_path / "bare"
        if request.param == "saved":
            part = datasets.Dataset(table_of(ROWS))
            datasets.DatasetDict(dict.fromkeys(names, part)).save_to_disk(folder)
        else:
            folder.mkdir()
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
            for name in names:
                write_csv(folder / f"{name}.csv", ROWS)
        return str(folder)

    return write


def test_a_data_set_without_validation_is_cut_and_keeps_its_test_split(bare) -> None:
    data = Data(path=bare("train", "test"), split=Split(validation=0.2))
    tables = read_splits(data, TASK.fields, 17).tables
    assert {split: table.num_rows for split, table in tables.items()} == {
        "train": 72,
        "validation": 18,
        "test": 90,
    }


def test_a_data_set_that_has_all_splits_is_taken_as_it_is(bare) -> None:
    place = bare("train", "validation", "test")
    tables = read_splits(Data(path=place), TASK.fields, 17).tables
    assert list(tables) == ["train", "validation", "test"]
    with pytest.raises(DataError, match="has a validation split already; remove `split`"):
        read_splits(Data(path=place, split=Split()), TASK.fields, 17)


def test_a_data_set_without_a_training_split_tells_those_it_has(bare) -> None:
    with pytest.raises(DataError, match=r"no split `train`, got validation, test; .*data\.splits"):
        read_splits(Data(path=bare("validation", "test")), TASK.fields, 17)


@pytest.mark.parametrize("name", ["validation_matched", "dev"])
def test_a_validation_split_of_another_name_is_not_passed_over(tmp_path: Path, name: str) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a cat", "a dog"] * 9, "label": [0, 1] * 9})
    datasets.DatasetDict({"train": rows, name: rows}).save_to_disk(tmp_path / "mnli")
    with pytest.raises(DataError, match=rf"no split `validation`, but {name}; name its splits"):
        read_splits(Data(path=str(tmp_path / "mnli")), TASK.fields, 17)


def test_rows_without_a_label_are_left_out_of_a_data_set_that_names_its_classes(
    tmp_path: Path, tiny_bert: Path
) -> None:
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})

    def part(labels: list[int]) -> datasets.Dataset:
        rows = {"text": [f"cat {i} " + "dog " * 70 for i in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    parts = {"train": [0, -1, 1, 0], "validation": [1, -1], "test": [-1, -1, 0]}
    datasets.DatasetDict({split: part(labels) for split, labels in parts.items()}).save_to_disk(
        tmp_path / "partly"
    )
    data = Data(path=str(tmp_path / "partly"), max_length=80)
    tables = read_splits(data, TASK.fields, 17).tables
    found = {split: table.column("label").to_pylist() for split, table in tables.items()}
    assert found == {"train": [0, 1, 0], "validation": [1], "test": [0]}
    experiment = Experiment(name="partly", model=str(tiny_bert), data=data)
    told = prepare_training(experiment).described()["data"]
    assert "4 rows without a label left out" in told
    assert "4 cut at 64 tokens" in told  # all that the tokenizer allows


@pytest.mark.parametrize("kind", [pa.int64(), pa.float16(), pa.float32(), pa.float64()])
def test_a_split_of_nothing_but_minus_one_is_unlabelled(kind: pa.DataType) -> None:
    for labels, unlabelled in (([-1, -1], True), ([-1, 0], False)):
        column = pa.array(np.array(labels), kind)
        assert is_unlabelled(pa.table({"label": column}), "label") == unlabelled


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


def grouped(num_groups: int) -> pa.Table:
    """Groups of two to five rows, one after the other."""
    groups = [f"q{i}" for i in range(num_groups) for _ in range(2 + i % 4)]
    texts = [f"cat {i}" for i in range(len(groups))]
    return pa.table({"text": texts, "label": [i % 2 for i in range(len(groups))], "group": groups})


def test_groups_stay_whole_in_a_cut(tmp_path: Path) -> None:
    pq.write_table(grouped(40), tmp_path / "groups.parquet")
    data = Data(train=str(tmp_path / "groups.parquet"), split=Split(validation=0.1, test=0.2))
    tables = read_splits(data, TASK.fields, 17).tables
    found = {split: set(table.column("group").to_pylist()) for split, table in tables.items()}
    sizes = {split: len(groups) for split, groups in found.items()}
    assert sizes == {"train": 28, "validation": 4, "test": 8}
    assert len(set.union(*found.values())) == 40
    assert sum(table.num_rows for table in tables.values()) == grouped(40).num_rows
    pq.write_table(grouped(1), tmp_path / "groups.parquet")
    with pytest.raises(DataError, match="1 groups cannot be split"):
        read_splits(data, TASK.fields, 17)


@pytest.mark.parametrize("limit", [1, 7, 30])
def test_groups_stay_whole_under_a_limit(limit: int) -> None:
    parts = grouped(20), limited(grouped(20), limit, 17, "train")
    whole, taken = (Counter(part.column("group").to_pylist()) for part in parts)
    assert taken == {group: whole[group] for group in taken}
    assert len(taken) == 1 or taken.total() <= limit < taken.total() + max(whole.values())


def test_rows_without_groups_are_drawn_one_by_one() -> None:
    rows = grouped(20).drop_columns("group")
    order = np.random.default_rng(derived_seed(17, "limit", "train")).permutation(rows.num_rows)
    expected = rows.take(pa.array(np.sort(order[:9])))
    assert limited(rows, 9, 17, "train").equals(expected)


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


def test_a_rare_grade_stands_where_its_number_does(tmp_path: Path, load) -> None:
    """Ranking takes a class's place for what a candidate gains."""
    train = [(f"text {i}", (0, 1, 3, 10)[i % 4]) for i in range(80)]
    write_csv(tmp_path / "train.csv", train)
    write_csv(tmp_path / "dev.csv", [*train * 2, ("another", 2)])
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "dev.csv")}
    assert load(**files).label_names == ("0", "1", "2", "3", "10")
