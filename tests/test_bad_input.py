"""Malformed experiments and data files: exit code 2, plain lines that say what to mend, no trace.

Each case is a broken experiment over one of the small sound data sets below, run through the real
command line in this process; ten of them run as real commands too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from sft_ray import cli
from tests.models import toy_rows

ROWS = [{"text": text, "label": label} for text, label in toy_rows(40, seed=9)]
WORDS = [
    {"tokens": ["we", "went", "to", "oak"], "tags": ["O", "O", "O", "B-LOC"]},
    {"tokens": ["cat", "and", "dog"], "tags": ["B-PER", "O", "B-PER"]},
] * 10
QUESTIONS = [
    {
        "question": "what went there ?",
        "context": f"the old cat went near the oak {i} .",
        "answers": {"text": ["old cat"], "answer_start": [4]},
    }
    for i in range(20)
]
RELATIONS = [
    {
        "text": "the cat saw the dog",
        "subject_start": 4,
        "subject_end": 7,
        "object_start": 16,
        "object_end": 19,
        "label": label,
    }
    for label in ["saw(a,b)", "saw(b,a)"] * 10
]
NUMBERS = [{"text": f"cat {i}", "label": i / 7} for i in range(20)]
TOPICS = [{"text": f"cat {i}", "labels": [["a"], ["a", "b"], []][i % 3]} for i in range(20)]

Rows = list[dict[str, Any]]


def jsonl(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def raw(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def changed(rows: Rows, row: int, **values: Any) -> Rows:
    """The rows with some values of one of them replaced."""
    return [{**r, **values} if i == row else r for i, r in enumerate(rows)]


def over(rows: Rows, task: str = "text-classification", **tree: Any) -> Callable[[Path], Any]:
    """An experiment over `rows` as a jsonl file; dotted names replace parts of the tree."""
    return lambda at: {"task": task, "data.train": jsonl(at / "data.jsonl", rows), **tree}


def over_file(make: Callable[[Path], str], task: str = "text-classification", **tree: Any) -> Any:
    return lambda at: {"task": task, "data.train": make(at), **tree}


def train(**values: Any) -> Callable[[Path], Any]:
    return over(ROWS, **{f"train.{name}": value for name, value in values.items()})


def data(**values: Any) -> Callable[[Path], Any]:
    return over(ROWS, **{f"data.{name}": value for name, value in values.items()})


NER, QA = "token-classification", "question-answering"
RE, REG, MULTI = "relation-extraction", "regression", "multi-label"

# Name -> what makes the experiment, and what the error lines must say.
CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    # -- keys and values of the experiment
    "unknown key": (over(ROWS, tranie={}), ["tranie", "did you mean 'train'"]),
    "unknown key of train": (train(learning_rat=1e-4), ["train.learning_rat", "learning_rate"]),
    "unknown task": (over(ROWS, task="text-clasification"), ["task", "text-classification"]),
    "task that is a number": (over(ROWS, task=3), ["task", "3"]),
    "k of the wrong type": (train(frozen_layers="two"), ["train.frozen_layers", "'two'"]),
    "k that is negative": (train(frozen_layers=-1), ["train.frozen_layers", "-1"]),
    "k deeper than the model": (train(frozen_layers=9), ["train.frozen_layers", "2 layers", "9"]),
    "k that is a fraction": (train(frozen_layers=1.5), ["train.frozen_layers", "1.5"]),
    "too many layers anew": (
        train(frozen_layers=1, reinit_layers=2),
        ["train.reinit_layers", "2 layers", "1 are frozen"],
    ),
    "learning rate of 0": (train(learning_rate=0.0), ["train.learning_rate", "greater than 0"]),
    "learning rate as a text": (train(learning_rate="fast"), ["train.learning_rate", "'fast'"]),
    "batch of 0": (train(batch_size=0), ["train.batch_size", "0"]),
    "epochs that are half": (train(epochs=0.5), ["train.epochs", "0.5"]),
    "unknown optimiser": (train(optimizer="adamv"), ["train.optimizer", "did you mean 'adam"]),
    "unknown schedule": (train(schedule="liner"), ["train.schedule", "did you mean 'linear'"]),
    "unknown precision": (train(precision="fp8"), ["train.precision", "'fp8'"]),
    "warm-up and cooldown": (
        train(schedule="constant_with_cooldown", warmup=0.5, cooldown=0.6),
        ["warmup and cooldown", "0.5 + 0.6"],
    ),
    "dropout of 1": (train(dropout=1.0), ["train.dropout", "1.0"]),
    "layer decay above 1": (train(layer_decay=1.2), ["train.layer_decay", "1.2"]),
    "micro-batch as a text": (train(micro_batch="big"), ["train.micro_batch", "'big'"]),
    "penalty without strength": (
        train(regularization={"kind": "l1"}),
        ["train.regularization", "strength"],
    ),
    "weights for an unknown class": (
        train(class_weights={"animal": 1.0, "plant": 2.0, "tool": 1.0, "stone": 1.0}),
        ["train.class_weights", "'stone'"],
    ),
    "weights that lack a class": (
        train(class_weights={"animal": 1.0}),
        ["train.class_weights", "'plant'"],
    ),
    "label smoothing in regression": (
        over(NUMBERS, REG, **{"train.label_smoothing": 0.1}),
        ["train.label_smoothing", "regression"],
    ),
    "class weights for several labels": (
        over(TOPICS, MULTI, **{"train.class_weights": "balanced"}),
        ["train.class_weights", "multi-label"],
    ),
    "metric of another task": (
        over(NUMBERS, REG, **{"search.objective": "accuracy"}),
        ["search.objective", "'accuracy'", "spearman"],
    ),
    "f1 with three classes": (
        over(ROWS, **{"search.objective": "f1"}),
        ["search.objective", "f1", "accuracy"],
    ),
    "ranking without groups": (
        over(ROWS, **{"search.objective": "mrr"}),
        ["search.objective", "mrr", "group"],
    ),
    "ranking of several labels": (
        over(TOPICS, MULTI, **{"search.objective": "mrr"}),
        ["search.objective", "multi-label has no metric 'mrr'"],
    ),
    "ranking of texts in alphabetical order": (
        over(
            [
                {"text": f"cat {i}", "label": ["correct", "incorrect"][i % 2], "group": i // 4}
                for i in range(40)
            ],
            **{"search.objective": "mrr"},
        ),
        ["search.objective", "mrr", "'correct', 'incorrect'", "data.label_names"],
    ),
    "negative label of a classification": (
        data(negative_label="animal"),
        ["data.negative_label", "relation-extraction"],
    ),
    "negative label that is none": (
        over(RELATIONS, RE, **{"data.negative_label": "Other"}),
        ["data.negative_label", "'Other'", "'saw(a,b)'"],
    ),
    "names for a regression": (
        over(NUMBERS, REG, **{"data.label_names": ["a", "b"]}),
        ["data.label_names", "regression"],
    ),
    "too few names": (
        over(
            [{"text": f"cat {i}", "label": i % 3} for i in range(30)],
            **{"data.label_names": ["no", "yes"]},
        ),
        ["label 2", "2 data.label_names"],
    ),
    "the same name twice": (data(label_names=["a", "a"]), ["data.label_names", "different"]),
    "both a path and files": (data(path="builtin:docstrings"), ["data", "`path`", "`train`"]),
    "length beyond the model": (data(max_length=4000), ["data.max_length", "4000"]),
    "length beyond all models": (data(max_length=100_000), ["data.max_length", "100000"]),
    "column of another name, and no column": (
        lambda at: {
            "data.train": jsonl(at / "a.jsonl", [{"review": r["text"], "stars": 1} for r in ROWS]),
            "data.columns": {"text": "review", "label": ["stars"]},
        },
        ["data.columns: label takes one column or [start, end], got ['stars']"],
    ),
    "split that leaves nothing": (
        data(split={"validation": 0.6, "test": 0.5}),
        ["data", "leaves nothing"],
    ),
    "model that is no folder": (over(ROWS, model="/none/such"), ["model", "/none/such"]),
    # -- columns
    "unknown field": (data(columns={"txt": "text"}), ["data.columns.txt", "did you mean 'text'"]),
    "unknown column": (data(columns={"text": "body"}), ["no column 'body'", "data.columns.text"]),
    "duplicate column mapping": (
        data(columns={"text": "text", "label": "text"}),
        ["data.columns", "'text'", "label and text"],
    ),
    "column that is a number": (data(columns={"text": 3}), ["data.columns.text", "3"]),
    "required field left out": (data(columns={"text": None}), ["data.columns.text", "needs"]),
    "span of one column": (
        over(RELATIONS, RE, **{"data.columns": {"subject": "subject_start"}}),
        ["data.columns.subject", "[start_column, end_column]"],
    ),
    "span of three columns": (
        over(RELATIONS, RE, **{"data.columns": {"subject": ["a", "b", "c"]}}),
        ["data.columns", "[start, end]"],
    ),
    "span that is not there": (
        over([{n: v for n, v in r.items() if n != "object_end"} for r in RELATIONS], RE),
        ["no column 'object_end'", "set data.columns.object: [start, end]"],
    ),
    # -- files
    "missing file": (lambda at: {"data.train": str(at / "none.csv")}, ["none.csv", "no such"]),
    "wrong ending": (
        over_file(lambda at: raw(at / "a.xlsx", "x")),
        ["a.xlsx", ".csv", "'.xlsx'"],
    ),
    "not UTF-8": (
        over_file(lambda at: raw(at / "a.csv", "text,label\ncafé,a\nx,b\n".encode("latin1"))),
        ["a.csv", "UTF-8"],
    ),
    "jsonl not UTF-8": (
        over_file(lambda at: raw(at / "a.jsonl", '{"text": "é", "label": "a"}\n'.encode("latin1"))),
        ["a.jsonl"],
    ),
    "truncated parquet": (
        over_file(
            lambda at: raw(
                at / "cut.parquet",
                Path(parquet(at / "whole.parquet", {"text": ["a"] * 9})).read_bytes()[:-20],
            )
        ),
        ["cut.parquet", "parquet"],
    ),
    "torn json line": (
        over_file(lambda at: raw(at / "a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b')),
        ["a.jsonl", "jsonl"],
    ),
    "zero rows": (
        over_file(lambda at: raw(at / "a.csv", "text,label\n")),
        ["a.csv", "no rows"],
    ),
    "empty file": (over_file(lambda at: raw(at / "a.csv", "")), ["a.csv"]),
    "ragged csv": (
        over_file(lambda at: raw(at / "a.csv", "text,label\na,b\na,b,c\n")),
        ["a.csv", "Expected 2 columns, got 3"],
    ),
    # -- texts and labels
    "empty text": (over(changed(ROWS, 3, text="")), ["'text'", "row 4"]),
    "blank text": (over(changed(ROWS, 3, text=" \t ")), ["'text'", "row 4"]),
    "None text": (over(changed(ROWS, 5, text=None)), ["'text'", "row 6"]),
    "texts that are numbers": (
        over([{"text": i, "label": "ab"[i % 2]} for i in range(9)]),
        ["'text'", "int64"],
    ),
    "texts that are lists": (
        over([{"text": ["cat"], "label": "ab"[i % 2]} for i in range(9)]),
        ["'text'", "list"],
    ),
    "mixed label types": (over(changed(ROWS, 7, label=3)), ["data.jsonl", "label"]),
    "missing label": (over(changed(ROWS, 7, label=None)), ["'label'", "row 8"]),
    "float labels": (
        over([{"text": f"cat {i}", "label": i % 2 + 0.5} for i in range(9)]),
        ["'label'", "double"],
    ),
    "one class": (over([{**r, "label": "same"} for r in ROWS]), ["two labels", "'same'"]),
    "every label differs": (
        over([{**r, "label": f"l{i}"} for i, r in enumerate(ROWS)]),
        ["all", "differ"],
    ),
    "label of 100,000 characters": (
        over(changed(ROWS, 2, label="x" * 100_000)),
        ["'label'", "100000 characters"],
    ),
    "unlabelled rows": (
        over([{"text": f"cat {i}", "label": [0, 1, -1][i % 3]} for i in range(9)]),
        ["-1", "row 3", "if -1 is a class, name it in words"],
    ),
    "unlabelled split": (
        over([{"text": f"cat {i}", "label": -1} for i in range(9)]),
        ["unlabelled", "'label'"],
    ),
    "probabilities that sum to 2": (
        over([{"text": f"cat {i}", "label": [1.0, float(i == 4)]} for i in range(9)]),
        ["sum to 1", "row 5"],
    ),
    "probabilities of unequal length": (
        over([{"text": f"cat {i}", "label": [0.5, 0.5, 0.0][: 3 - (i == 4)]} for i in range(9)]),
        ["equally long", "row 5"],
    ),
    "NaN in a regression": (
        over_file(
            lambda at: parquet(
                at / "a.parquet", {"text": ["cat"] * 9, "label": [1.0] * 5 + [float("nan")] * 4}
            ),
            REG,
        ),
        ["'label'", "row 6"],
    ),
    "infinity in a regression": (
        over_file(
            lambda at: parquet(
                at / "a.parquet", {"text": ["cat"] * 9, "label": [1.0] * 5 + [float("inf")] * 4}
            ),
            REG,
        ),
        ["finite", "row 6"],
    ),
    "one number in all rows": (
        over([{**row, "label": 2.5} for row in NUMBERS], REG),
        ["at least two different values", "got only 2.5 in 'label'"],
    ),
    "a number whose square is too large": (
        over(changed(NUMBERS, 3, label=-2e18), REG),
        ["'label' must hold finite numbers up to 1e+18, got -2e+18 in row 4", "remove it"],
    ),
    "texts in a regression": (over(ROWS, REG), ["'label'", "numbers"]),
    "labels that are one text": (
        over([{**r, "labels": "a"} for r in TOPICS], MULTI),
        ["'labels'", "list of labels"],
    ),
    "empty label in a list": (
        over(changed(TOPICS, 1, labels=["a", None]), MULTI),
        ["'labels'", "row 2"],
    ),
    # -- words and tags
    "tokens as one text": (
        over([{"tokens": "we went", "tags": ["O", "O"]}] * 9, NER),
        ["'tokens'", "list of words"],
    ),
    "fewer tags than tokens": (
        over(changed(WORDS, 2, tags=["O"]), NER),
        ["row 3", "4 tokens and 1 tags"],
    ),
    "more tags than tokens": (
        over(changed(WORDS, 3, tags=["O"] * 9), NER),
        ["row 4", "3 tokens and 9 tags"],
    ),
    "row without words": (over(changed(WORDS, 2, tokens=[], tags=[]), NER), ["'tokens'", "row 3"]),
    "word that is None": (
        over(changed(WORDS, 2, tokens=["a", None, "b", "c"]), NER),
        ["'tokens'", "row 3"],
    ),
    "tag that is None": (
        over(changed(WORDS, 2, tags=["O", None, "O", "O"]), NER),
        ["'tags'", "row 3"],
    ),
    "tags that are numbers without names": (
        over([{"tokens": ["a", "cat"], "tags": [0, 1]}] * 20, NER),
        ["data.label_names", "'tags'", "O included"],
    ),
    "predicate beyond the row": (
        over([{**r, "predicate": 3} for r in WORDS], NER),
        ["predicate 3", "row 2"],
    ),
    "predicate that is not there": (
        over([{**r, "predicate": "went"} for r in WORDS], NER),
        ["predicate 'went'", "row 2"],
    ),
    # -- questions
    "answer not in its context": (
        over(changed(QUESTIONS, 4, answers={"text": ["zebra"], "answer_start": [4]}), QA),
        ["row 5", "'zebra'", "character 4"],
    ),
    "answer beyond its context": (
        over(changed(QUESTIONS, 4, answers={"text": ["cat"], "answer_start": [4000]}), QA),
        ["row 5", "character 4000"],
    ),
    "answer that starts before": (
        over(changed(QUESTIONS, 4, answers={"text": ["cat"], "answer_start": [-3]}), QA),
        ["row 5", "character -3"],
    ),
    "more texts than starts": (
        over(changed(QUESTIONS, 4, answers={"text": ["a", "b"], "answer_start": [4]}), QA),
        ["'answers'", "row 5"],
    ),
    "answers as a text": (
        over([{**r, "answers": "old cat"} for r in QUESTIONS], QA),
        ["'answers'", "answer_start"],
    ),
    "empty question": (over(changed(QUESTIONS, 4, question=""), QA), ["'question'", "row 5"]),
    "empty context": (over(changed(QUESTIONS, 4, context=""), QA), ["'context'", "row 5"]),
    # -- relations
    "subject out of range": (
        over(changed(RELATIONS, 1, subject_end=900), RE),
        ["row 2", "subject [4, 900)", "19 characters"],
    ),
    "object that ends before it starts": (
        over(changed(RELATIONS, 1, object_end=3), RE),
        ["row 2", "object [16, 3)"],
    ),
    "negative start": (
        over(changed(RELATIONS, 1, subject_start=-2), RE),
        ["'subject_start'", "-2", "row 2"],
    ),
    "positions as texts": (
        over([{**r, "object_start": "16"} for r in RELATIONS], RE),
        ["'object_start'", "whole numbers"],
    ),
}
AS_COMMANDS = (
    "unknown key of train",
    "k deeper than the model",
    "duplicate column mapping",
    "truncated parquet",
    "not UTF-8",
    "fewer tags than tokens",
    "answer not in its context",
    "subject out of range",
    "one class",
    "NaN in a regression",
)


def write_experiment(at: Path, tree: dict[str, Any], model: Path) -> Path:
    """The experiment's file, in a folder that holds nothing but it and its data."""
    whole: dict[str, Any] = {
        "name": "broken",
        "model": str(model),
        "storage": str(at / "runs"),
        "data": {"max_length": 32},
    }
    for path, value in tree.items():
        section, _, key = path.partition(".")
        if key:
            whole.setdefault(section, {})[key] = value
        else:
            whole[section] = value
    file = at / "broken.yaml"
    with file.open("w", encoding="utf-8") as stream:
        YAML(typ="safe").dump(whole, stream)
    return file


def check(lines: list[str], fragments: list[str]) -> None:
    assert len(lines) == 1, lines
    assert all(line.startswith("error: ") and len(line) < 700 for line in lines), lines
    said = "\n".join(lines)
    assert "Traceback" not in said
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_plain_lines_and_leaves_nothing(
    name: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, fragments = CASES[name]
    file = write_experiment(tmp_path, make(tmp_path), tiny_model)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", str(file)])
    printed = capsys.readouterr()
    assert exit_.value.code == 2, printed
    assert printed.out == ""
    check(printed.err.splitlines(), fragments)
    assert sorted(tmp_path.rglob("*")) == before


# Each starts a process of its own, which imports for seconds: three here, the others when time is.
@pytest.mark.parametrize(
    "name",
    [
        *AS_COMMANDS[:3],
        *(pytest.param(name, marks=pytest.mark.cluster) for name in AS_COMMANDS[3:]),
    ],
)
def test_the_real_command_says_the_same(name: str, tmp_path: Path, tiny_model: Path) -> None:
    make, fragments = CASES[name]
    file = write_experiment(tmp_path, make(tmp_path), tiny_model)
    done = subprocess.run(
        [sys.executable, "-m", "sft_ray.cli", "train", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    check(done.stderr.splitlines(), fragments)
    assert not (tmp_path / "runs").exists()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60
    assert set(AS_COMMANDS) <= set(CASES)
    assert len(AS_COMMANDS) == 10
