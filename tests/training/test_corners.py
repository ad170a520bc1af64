"""Corners of real data: absent classes, cut words, tag schemes, odd characters, small parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sft_ray.config import Data, Split, Train
from sft_ray.errors import ConfigError
from sft_ray.training import encoding, metrics
from sft_ray.training.data import load_tokenizer, open_dataset, prepare
from sft_ray.training.encoding import Encoder
from sft_ray.training.forward import loss_options
from sft_ray.training.model import load_pretrained
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import TASKS
from sft_ray.training.world import World
from tests.models import TASK, WIDE_VOCABULARY, dataset_of, write_csv

TAG, ANSWER, RELATE = "token-classification", "question-answering", "relation-extraction"


@pytest.mark.parametrize("soft", [False, True])
def test_balanced_weights_of_classes_that_training_lacks_are_0(tmp_path, wide_bert, soft) -> None:
    if soft:
        labels: list[Any] = [[0.5, 0.3, 0.2, 0.0]] * 20
    else:
        labels = [0] * 12 + [1] * 6 + [2] * 2
    rows = [{"text": f"the cat {i}", "label": label} for i, label in enumerate(labels)]
    names = ["a", "b", "c", "never"]
    dataset = dataset_of(
        tmp_path / "rows", "text-classification", wide_bert, rows, rows, label_names=names
    )
    setup = Setup(TASK, dataset, None, None, World())
    weights = loss_options(Train(class_weights="balanced"), setup).class_weights
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0] if soft else [0.6, 0.3, 0.1, 0.0])
    assert weights[3] == 0
    assert float((weights * shares).sum()) == pytest.approx(1.0)


def test_words_that_were_cut_off_are_wrong_where_there_is_no_outside(tmp_path, wide_bert) -> None:
    rows = [{"tokens": ["cat"] * 30, "tags": ["ADJ"] * 29 + ["NOUN"]}] * 4
    dataset = dataset_of(tmp_path / "rows", TAG, wide_bert, rows, rows, max_length=10)
    validation = dataset.validation
    outputs = np.zeros((len(validation.tokens), 2))
    noun = dataset.label_names.index("NOUN")
    outputs[:, noun] = 9.0
    found = TASKS[TAG].score(outputs, validation, dataset.label_set)
    assert found["accuracy"] == found["f1"] == 0
    outputs[:, noun] = -9.0
    assert TASKS[TAG].score(outputs, validation, dataset.label_set)["accuracy"] == 8 / 30
    answer = TASKS[TAG].answer(outputs, validation, dataset.label_set)[0]
    assert answer["tags"] == ["ADJ"] * 8 + ["?"] * 22


def test_bilou_is_read_as_iobes() -> None:
    names = ["O", "B-X", "I-X", "L-X", "U-X"]
    found = metrics.entities([["U-X", "U-X"]], [["U-X", "O"]], names)
    assert (found["precision"], found["recall"]) == (1, 0.5)
    rows = [["B-X", "L-X", "B-X", "L-X"]]
    assert metrics.entities(rows, rows, names)["f1"] == 1
    assert metrics.entities(rows, [["B-X", "L-X", "O", "O"]], names)["recall"] == 0.5


def test_both_marks_of_both_entities_survive_every_cut(tmp_path: Path, wide_bert: Path) -> None:
    encoder = Encoder(load_tokenizer(str(wide_bert)), 16)
    rng = np.random.default_rng(0)
    words = ["cats", "dogs", "sawing", "the", "oaked", "file", "mosss"]  # of one to three pieces
    rows = []
    for _ in range(200):
        text = [str(word) for word in rng.choice(words, size=rng.integers(20, 40))]
        first = int(rng.integers(0, len(text) - 2))
        places = [(len(" ".join(text[:i])) + bool(i), i) for i in (first, first + 1)]
        spans = [(at, at + len(text[i])) for at, i in places]
        if rng.random() < 0.5:
            spans.reverse()
        (a, b), (c, d) = spans
        rows.append(
            {
                "text": " ".join(text),
                "subject_start": a,
                "subject_end": b,
                "object_start": c,
                "object_end": d,
            }
        )
    encoded = encoding.encode_marked(pa.Table.from_pylist(rows), encoder)
    marks = encoding._marks(encoder.tokenizer)
    for item in range(len(encoded)):
        tokens = [WIDE_VOCABULARY[t] for t in encoded.tokens[encoded[item]]]
        assert len(tokens) <= 16
        assert [tokens.count(mark) for mark in marks] == [2, 2]
    assert encoded.num_truncated > 100


@pytest.mark.parametrize(
    ("context", "answer", "start", "covered"),
    [
        ("the cat went", " cat", 3, "cat"),
        ("the old cat ", "cat ", 8, "cat"),
        ("the cat\u200b", "cat\u200b", 4, "cat"),
    ],
)
def test_characters_without_a_token_do_not_hide_an_answer(
    tmp_path, wide_bert, context, answer, start, covered
) -> None:
    row = {"question": "the ?", "context": context}
    row["answers"] = {"text": [answer], "answer_start": [start]}
    dataset = dataset_of(tmp_path / "rows", ANSWER, wide_bert, [row] * 2, [row] * 2)
    examples = dataset.validation
    first, last = examples.labels[0]
    tokens = examples.tokens[examples[0]][first : last + 1]
    assert " ".join(WIDE_VOCABULARY[t] for t in tokens) == covered


def test_a_context_without_tokens_is_answered_and_not_an_error(tmp_path, wide_bert) -> None:
    row = {"question": "the ?", "context": "\u200b\u200b"}
    row["answers"] = {"text": ["\u200b"], "answer_start": [0]}
    good = {**row, "context": "the cat", "answers": {"text": ["cat"], "answer_start": [4]}}
    dataset = dataset_of(tmp_path / "rows", ANSWER, wide_bert, [good, row], [good, row])
    outputs = np.zeros((len(dataset.validation.tokens), 2))
    answers = TASKS[ANSWER].answer(outputs, dataset.validation, dataset.label_set)
    assert answers[1]["answer"] == ""
    assert np.isfinite(answers[1]["score"])


@pytest.mark.parametrize("pairs", [10, 25])
def test_rare_classes_do_not_keep_a_file_from_being_cut(tmp_path, tiny_bert, pairs: int) -> None:
    rows = [("the cat", f"rare {i}") for i in range(pairs) for _ in range(2)]
    rows += [("the dog", "common")] * 80
    data = Data(
        train=str(write_csv(tmp_path / "a.csv", rows)), split=Split(validation=0.2, test=0.2)
    )
    for seed in range(3):
        dataset = open_dataset(prepare(data, TASK, str(tiny_bert), None, seed))
        assert set(dataset.train.labels) == set(range(pairs + 1))
        parts = len(dataset.train) + len(dataset.validation)
        assert parts == len(rows) - round(0.2 * len(rows))


def test_a_regression_over_whole_numbers_is_cut_without_classes(tmp_path, tiny_bert) -> None:
    rows = [("the cat", i % 100) for i in range(200)]
    data = Data(train=str(write_csv(tmp_path / "a.csv", rows)), split=Split(validation=0.2))
    folder = prepare(data, TASKS["regression"], str(tiny_bert), None, 17)
    assert len(open_dataset(folder).validation) == 40


def test_texts_of_every_arrow_kind_are_read(tmp_path: Path, tiny_bert: Path) -> None:
    texts = pa.array(["the cat", "an oak"] * 20)
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"text": texts.cast(kind), "label": ["a", "b"] * 20}), path)
        data = Data(train=str(path), split=Split(validation=0.2))
        assert len(open_dataset(prepare(data, TASK, str(tiny_bert), None, 17)).train) == 32
    dictionary = tmp_path / "dictionary.parquet"
    columns = {"text": texts.dictionary_encode(), "label": pa.array(["a", "b"] * 20)}
    pq.write_table(pa.table(columns), dictionary)
    data = Data(train=str(dictionary), split=Split(validation=0.2))
    assert len(open_dataset(prepare(data, TASK, str(tiny_bert), None, 17)).train) == 32


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tiny_bert, toy) -> None:
    used = np.append(toy.used_tokens, 10_000)
    with pytest.raises(ConfigError, match="gives the token 10000, its embeddings end at"):
        load_pretrained(
            str(tiny_bert),
            TASK,
            toy.label_set,
            seed=17,
            device=torch.device("cpu"),
            used_tokens=used,
        )
