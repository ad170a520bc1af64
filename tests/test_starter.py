"""`sft-ray init`: what it guesses, and that a search accepts what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_ray import cli
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, DataError, SftError
from sft_ray.guess import guess_task
from sft_ray.search.preflight import prepare_experiment
from sft_ray.starter import write_experiment
from sft_ray.training.tasks import TASKS
from tests.models import task_rows, toy_rows, write_csv, write_jsonl

FOUND = {
    "text-classification": {"text": "text", "label": "label"},
    "multi-label": {"text": "text", "labels": "labels"},
    "regression": {"text": "text", "label": "label"},
    "token-classification": {"tokens": "tokens", "tags": "tags"},
    "question-answering": {"question": "question", "context": "context", "answers": "answers"},
    "relation-extraction": {
        "text": "text",
        "subject": ["subject_start", "subject_end"],
        "object": ["object_start", "object_end"],
        "label": "label",
    },
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def accepted(file: str, model: Path) -> Experiment:
    """The experiment, after the checks that a search begins with."""
    experiment = Experiment.load(file, [f"model={model}"])
    assert len(prepare_experiment(experiment).dataset.train) > 10
    return experiment


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_found_and_a_search_accepts_it(task: str, tiny_model: Path) -> None:
    write_jsonl(Path("mine.jsonl"), task_rows(task, 90))
    start = write_experiment("mine.jsonl", model=str(tiny_model))
    experiment = accepted(start.file, tiny_model)
    assert (experiment.task, experiment.data.columns) == (task, FOUND[task])
    assert experiment.name == "mine"
    assert set(start.facts) >= {"task", "max_length", "model", "written"}


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "saved", "splits"])
def test_every_kind_of_file_and_folder_is_read(ending: str, tiny_model: Path) -> None:
    rows = [{"review": text, "stars": label} for text, label in toy_rows(90)]
    place = Path(f"my data.{ending}")
    if ending in ("csv", "tsv"):
        comma = "," if ending == "csv" else "\t"
        lines = [f"{row['review']}{comma}{row['stars']}\n" for row in rows]
        place.write_text(f"review{comma}stars\n" + "".join(lines))
    elif ending == "json":
        place.write_text(json.dumps(rows))
    elif ending == "jsonl":
        write_jsonl(place, rows)
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), place)
    elif ending == "saved":
        parts = {"train": rows, "dev": rows[:30], "test": rows[30:60]}
        datasets.DatasetDict(
            {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
        ).save_to_disk(place)
    else:
        place.mkdir()
        write_jsonl(place / "train.jsonl", rows)
        write_csv(place / "dev.csv", toy_rows(30, seed=3), header=("review", "stars"))
    start = write_experiment(str(place), model=str(tiny_model))
    assert start.file == "my-data.yaml"
    experiment = accepted(start.file, tiny_model)
    assert experiment.data.columns == {"text": "review", "label": "stars"}
    assert (experiment.data.split is None) == (ending in ("saved", "splits"))


def table(**columns: list[Any]) -> pa.Table:
    return pa.table(columns)


TEXTS = [f"this is text number {i} of many" for i in range(200)]
IDS = list(range(200))


@pytest.mark.parametrize(
    ("columns", "task", "found"),
    [
        (  # an id is no label, a title no text
            {"id": IDS, "title": ["t"] * 200, "body": TEXTS, "kind": ["a", "b"] * 100},
            "text-classification",
            {"text": "body", "label": "kind"},
        ),
        (
            {"premise": TEXTS, "hypothesis": TEXTS[::-1], "label": [0, 1] * 100, "idx": IDS},
            "text-classification",
            {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        ),
        (  # many classes, because the numbers run from 0
            {"text": TEXTS, "intent": [i % 40 for i in IDS]},
            "text-classification",
            {"text": "text", "label": "intent"},
        ),
        (
            {"text": TEXTS, "price": [i * 7 for i in IDS]},
            "regression",
            {"text": "text", "label": "price"},
        ),
        (
            {"sentence1": TEXTS, "sentence2": TEXTS, "score": [i / 40 for i in IDS]},
            "regression",
            {"text": "sentence1", "text_pair": "sentence2", "label": "score"},
        ),
        (
            {"text": TEXTS, "label": [[0.25, 0.75]] * 200},
            "text-classification",
            {"text": "text", "label": "label"},
        ),
        (
            {"句子": TEXTS, "类别": ["好", "坏"] * 100},
            "text-classification",
            {"text": "句子", "label": "类别"},
        ),
        ({"text": TEXTS, "ok": [True, False] * 100}, "text-classification", {"label": "ok"}),
    ],
)
def test_columns_are_told_apart(columns: dict[str, Any], task: str, found: Any) -> None:
    guess = guess_task(table(**columns), "x.csv")
    assert guess.task == task
    assert guess.columns == {"text": "text", **found} if "text" not in found else found
    used = [c for c in guess.columns.values() if isinstance(c, str)]
    assert sorted(guess.unused) == sorted(set(columns) - set(used))


@pytest.mark.parametrize("one_hot", [[[1, 0, 0], [0, 1, 1]], [[True, False], [False, False]]])
def test_lists_of_0_and_1_are_not_taken_for_labels(one_hot: list[Any]) -> None:
    with pytest.raises(DataError, match="cannot tell"):
        guess_task(table(text=TEXTS, labels=one_hot * 100), "x.jsonl")


def test_a_wanted_task_is_found_where_it_fits() -> None:
    stars = table(review=TEXTS, stars=[1, 2, 3, 4, 5] * 40)
    assert guess_task(stars, "x.csv").task == "text-classification"
    assert guess_task(stars, "x.csv", "regression").columns["label"] == "stars"
    with pytest.raises(DataError, match="cannot tell the columns of question-answering"):
        guess_task(stars, "x.csv", "question-answering")
    with pytest.raises(DataError, match=r"review: texts of .* write the experiment by hand"):
        guess_task(table(review=TEXTS), "x.csv")


def test_rare_labels_and_chinese_texts_change_what_is_written(tiny_model: Path) -> None:
    rows = [(f"{text} 。", "no" if i % 10 else "yes") for i, (text, _) in enumerate(toy_rows(200))]
    write_csv(Path("rare.csv"), rows)
    start = write_experiment("rare.csv", model=str(tiny_model))
    assert accepted(start.file, tiny_model).search.objective == "macro_f1"
    write_csv(Path("zh.csv"), [(f"我在北京看了电影{i}", "好坏"[i % 2]) for i in range(60)])
    found = Experiment.load(write_experiment("zh.csv").file)
    assert found.model == "google-bert/bert-base-chinese"


def test_japanese_is_not_taken_for_chinese() -> None:
    write_csv(Path("ja.csv"), [(f"東京で映画を見ました{i}", "好悪"[i % 2]) for i in range(60)])
    found = Experiment.load(write_experiment("ja.csv").file)
    assert found.model == "FacebookAI/xlm-roberta-base"


def test_odd_names_and_labels_stay_what_they_are(tiny_model: Path) -> None:
    header = ("a: text,\n{of} #many", "no\nx")
    rows = [(text, f"{label}\n# x: [") for text, label in toy_rows(60)]
    write_csv(Path("ünder #1.csv"), rows, header=header)
    start = write_experiment("ünder #1.csv", model=str(tiny_model))
    experiment = accepted(start.file, tiny_model)
    assert experiment.data.columns == {"text": header[0], "label": header[1]}
    assert experiment.data.train == "ünder #1.csv"


def test_nothing_is_overwritten_and_bad_data_is_refused_before_writing(capsys) -> None:
    write_csv(Path("mine.csv"), toy_rows(60))
    write_experiment("mine.csv")
    before = Path("mine.yaml").read_text()
    with pytest.raises(ConfigError, match=r"mine\.yaml exists and is not overwritten"):
        write_experiment("mine.csv", task="text-classification")
    assert Path("mine.yaml").read_text() == before
    write_csv(Path("holes.csv"), [*toy_rows(60), ("", "animal")])
    with pytest.raises(SystemExit) as exit_:
        cli.main(["init", "holes.csv"])
    assert exit_.value.code == 2
    assert "column 'text' is empty in row" in capsys.readouterr().err
    assert not Path("holes.yaml").exists()
    Path("empty").mkdir()
    with pytest.raises(DataError, match="neither a save_to_disk folder"):
        write_experiment("empty")
    with pytest.raises(DataError, match="no such file or folder"):
        write_experiment("nowhere.csv")
    with pytest.raises(ConfigError, match="did you mean 'regression'"):
        write_experiment("mine.csv", task="regresion")


def test_the_command_says_what_it_guessed_and_what_comes_next(capsys) -> None:
    write_csv(Path("mine.csv"), toy_rows(60))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["init", "mine.csv", "--out", "my own.yaml"])
    assert not exit_.value.code
    said = capsys.readouterr().out
    assert "label repeats 3 different values" in said
    assert said.endswith("next:\n  sft-ray search 'my own.yaml'\n")


def test_a_table_with_its_index_and_a_name_from_the_file_that_is_written(capsys) -> None:
    rows = [f"{i},{text},{label}" for i, (text, label) in enumerate(toy_rows(60))]
    Path("indexed.csv").write_text("\n".join([",text,label", *rows]))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["init", "indexed.csv", "--out", "stars.yaml"])
    assert not exit_.value.code
    assert "(no name)" in capsys.readouterr().out
    assert Experiment.load("stars.yaml").name == "stars"


def test_the_names_of_tags_that_are_numbers_are_left_to_fill_in(tiny_model: Path) -> None:
    rows = [
        {"words": r["tokens"], "ner": [len(t) % 3 for t in r["tags"]]}
        for r in task_rows("token-classification", 60)
    ]
    write_jsonl(Path("mine.jsonl"), rows)
    start = write_experiment("mine.jsonl", model=str(tiny_model))
    assert "names" in start.facts["label_names"]
    with pytest.raises(SftError, match=r"data\.label_names: the tags in 'ner' are whole numbers"):
        prepare_experiment(Experiment.load(start.file))
    text = Path(start.file).read_text()
    assert "# label_names: []  # fill in: what the tags 0 to 2 mean" in text
    Path(start.file).write_text(text.replace("# label_names: []", "label_names: [O, B-x, I-x]"))
    accepted(start.file, tiny_model)


def test_what_init_cannot_write_is_told_in_a_line() -> None:
    rows = [f"Zoë,café {text},{label}" for text, label in toy_rows(60)]
    Path("latin.csv").write_text("\n".join(["author,text,label", *rows]), encoding="latin-1")
    with pytest.raises(DataError, match=r"'author' is not UTF-8; save the file as UTF-8"):
        write_experiment("latin.csv")
    Path("latin").mkdir()
    Path("latin/train.csv").write_text("text,label\ncafé,a\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"\(text: binary; .*\); save the file as UTF-8$"):
        write_experiment("latin")
    Path("twice.csv").write_text("text,label,label\na,b,c\n")
    with pytest.raises(DataError, match="the column 'label' stands twice"):
        write_experiment("twice.csv")
    write_csv(Path("mine.csv"), toy_rows(60))
    with pytest.raises(ConfigError, match=r"missing/x\.yaml cannot be written: No such file"):
        write_experiment("mine.csv", out="missing/x.yaml")
    rows = [{"text": text, "label": label} for text, label in toy_rows(60)]
    parts = {name: datasets.Dataset.from_list(rows) for name in ("training", "testing")}
    datasets.DatasetDict(parts).save_to_disk("saved")
    with pytest.raises(DataError, match="the training one must be called train"):
        write_experiment("saved")
