"""Every task from rows to answers: what is read, learned, scored and said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from seqeval.metrics import f1_score as entity_f1
from sklearn import metrics as sk
from tokenizers import processors

from sft_ray.config import Data
from sft_ray.errors import DataError
from sft_ray.training.data import load_tokenizer, open_dataset, prepare
from sft_ray.training.examples import IGNORED, Dataset, Examples
from sft_ray.training.metrics import answer_f1
from sft_ray.training.progress import Progress
from sft_ray.training.tasks import TASKS
from tests.models import (
    KEYWORDS,
    SPECIALS,
    VOCABULARY,
    WIDE_VOCABULARY,
    answer_row,
    dataset_of,
    load_tiny,
    run_fit,
    task_dataset,
    task_rows,
    tiny_model_folder,
    write_jsonl,
)

CLASSIFY, LABELS, REGRESS = "text-classification", "multi-label", "regression"
TAG, ANSWER, RELATE = "token-classification", "question-answering", "relation-extraction"
NEGATIVE = {RELATE: {"negative_label": "none"}}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Learned:
    name: str
    dataset: Dataset
    reports: list[Progress]

    @property
    def answers(self) -> Rows:
        best = self.reports[-1].best
        validation = self.dataset.validation
        return TASKS[self.name].answer(best.outputs, validation, self.dataset.label_set)


@pytest.fixture(scope="module", params=list(TASKS))
def learned(request, tmp_path_factory: pytest.TempPathFactory, wide_bert: Path) -> Learned:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    dataset = task_dataset(folder, name, wide_bert, train=200, **NEGATIVE.get(name, {}))
    pretrained = load_tiny(wide_bert, dataset, task=TASKS[name])
    reports = run_fit(
        pretrained,
        dataset,
        task=TASKS[name],
        rungs=(50,),
        epochs=8,
        learning_rate=5e-3,
        batch_size=16,
    )
    return Learned(name, dataset, reports)


@pytest.fixture
def build(tmp_path: Path, wide_bert: Path) -> Callable[..., Dataset]:
    """Rows of a task, encoded and opened."""

    def build(task: str, train: Rows, validation: Rows | None = None, **data: Any) -> Dataset:
        return dataset_of(tmp_path / "rows", task, wide_bert, train, validation, **data)

    return build


def shown(examples: Examples, item: int) -> str:
    """An item's tokens without the special ones."""
    tokens = (WIDE_VOCABULARY[t] for t in examples.tokens[examples[item]])
    return " ".join(token for token in tokens if token not in SPECIALS.values())


def perfect(examples: Examples, classes: int) -> np.ndarray:
    """Outputs that say what the labels say, per item or token."""
    if examples.spans is None:
        return 9.0 * np.eye(classes)[np.maximum(examples.labels, 0)]
    outputs = np.zeros((len(examples.tokens), 2))
    for item, (start, end) in enumerate(examples.labels):
        first = examples[item].start
        outputs[first + start, 0] = outputs[first + end, 1] = 9.0
    return outputs


# -- learning ------------------------------------------------------------------------------------


def test_a_tiny_model_learns_the_task_better_than_any_constant_answer(learned: Learned) -> None:
    task, dataset = TASKS[learned.name], learned.dataset
    assert [r.fault for r in learned.reports] == [None] * len(learned.reports)
    best = learned.reports[-1].best.score
    constant = task.constant_scores(dataset.train, dataset.validation, dataset.label_set)
    if learned.name == ANSWER:
        assert constant == {}
        assert best > 0.9
    else:
        assert best > constant[task.default_objective] + 0.15
        assert learned.reports[-1].best.metrics["loss"] < constant["loss"]


def test_every_metric_of_the_task_is_a_finite_number(learned: Learned) -> None:
    for_some_data = {"f1", "mrr", "ndcg"} if learned.name == CLASSIFY else set()
    found = learned.reports[-1].metrics
    assert set(found) == set(TASKS[learned.name].metrics) - for_some_data
    assert all(type(value) is float and np.isfinite(value) for value in found.values())


def score_of_answers(name: str, rows: Rows, answers: Rows) -> float:
    """The default objective worked out from the answers and the rows alone."""
    if name == CLASSIFY:
        return np.mean([a["label"] == r["label"] for a, r in zip(answers, rows, strict=True)])
    if name == LABELS:
        found, truth = ([[g in x["labels"] for g in KEYWORDS] for x in s] for s in (answers, rows))
        return sk.f1_score(truth, found, average="micro")
    if name == REGRESS:
        from scipy.stats import spearmanr

        return spearmanr([a["value"] for a in answers], [r["label"] for r in rows]).statistic
    if name == TAG:
        return entity_f1([r["tags"] for r in rows], [a["tags"] for a in answers])
    if name == ANSWER:
        return np.mean(
            [
                answer_f1(a["answer"], r["answers"]["text"][0])
                for a, r in zip(answers, rows, strict=True)
            ]
        )
    found, truth = ([x["label"] for x in side] for side in (answers, rows))
    return sk.f1_score(truth, found, average="micro", labels=list(KEYWORDS))


def test_the_answers_are_what_was_scored(learned: Learned) -> None:
    rows = task_rows(learned.name, 60, seed=2)
    assert len(learned.answers) == len(rows)
    score = score_of_answers(learned.name, rows, learned.answers)
    assert score == pytest.approx(learned.reports[-1].best.score, abs=1e-9)


def test_every_answer_has_its_form(learned: Learned) -> None:
    names = set(learned.dataset.label_names)
    for row, answer in zip(task_rows(learned.name, 60, seed=2), learned.answers, strict=True):
        if learned.name in (CLASSIFY, RELATE):
            assert set(answer) == {"label", "probability"}
            assert answer["label"] in names
            assert 1 / len(names) <= answer["probability"] <= 1
        elif learned.name == LABELS:
            assert set(answer["probabilities"]) == names
            certain = [n for n, p in answer["probabilities"].items() if p > 0.5]
            assert answer["labels"] == certain
        elif learned.name == REGRESS:
            assert type(answer["value"]) is float
        elif learned.name == TAG:
            assert len(answer["tags"]) == len(row["tokens"])
            for entity in answer["entities"]:
                first, past = entity["words"]
                assert entity["label"] in KEYWORDS
                assert entity["text"] == " ".join(row["tokens"][first:past])
        else:
            assert answer["answer"] == row["context"][answer["start"] : answer["end"]] != ""


# -- classification ------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "has_f1"), [(2, True), (3, False)])
def test_f1_exists_for_two_classes_only(build, classes: int, has_f1: bool) -> None:
    rows = [{"text": f"cat {i}", "label": i % classes} for i in range(12)]
    dataset = build(CLASSIFY, rows)
    outputs = np.random.default_rng(0).normal(size=(12, classes))
    found = TASKS[CLASSIFY].score(outputs, dataset.validation, dataset.label_set)
    assert ("f1" in found) == has_f1
    if has_f1:
        truth, predicted = dataset.validation.labels, outputs.argmax(axis=1)
        assert found["f1"] == pytest.approx(sk.f1_score(truth, predicted))
        assert found["precision"] == pytest.approx(sk.precision_score(truth, predicted))
        assert found["recall"] == pytest.approx(sk.recall_score(truth, predicted))


def test_labels_may_be_probabilities(build) -> None:
    vectors = [[0.7, 0.3], [0.1, 0.9], [0.5, 0.5], [1.0, 0.0]] * 3
    rows = [{"text": f"cat {i}", "label": vector} for i, vector in enumerate(vectors)]
    dataset = build(CLASSIFY, rows, label_names=["no", "yes"])
    assert dataset.label_names == ("no", "yes")
    np.testing.assert_array_equal(dataset.train.labels, vectors)
    outputs = np.log(np.clip(vectors, 1e-12, 1))
    found = TASKS[CLASSIFY].score(outputs, dataset.validation, dataset.label_set)
    entropy = -np.mean(np.sum(vectors * np.log(np.clip(vectors, 1e-12, 1)), axis=1))
    assert found["loss"] == pytest.approx(entropy, abs=1e-9)
    assert found["accuracy"] == 1
    assert build(CLASSIFY, rows).label_names == ("0", "1")


def test_a_model_learns_from_probabilities(build, wide_bert: Path) -> None:
    soft = {"animal": [0.8, 0.1, 0.1], "plant": [0.1, 0.8, 0.1], "tool": [0.1, 0.1, 0.8]}
    rows = [{**row, "label": soft[row["label"]]} for row in task_rows(CLASSIFY, 150)]
    dataset = build(CLASSIFY, rows[:120], rows[120:])
    reports = run_fit(
        load_tiny(wide_bert, dataset), dataset, epochs=8, learning_rate=5e-3, batch_size=16
    )
    assert reports[-1].best.score > 0.8
    assert reports[-1].train_loss > 0.6  # the entropy of the labels is 0.64


def test_names_and_probabilities_must_be_equally_many(build) -> None:
    rows = [{"text": "cat", "label": [0.5, 0.5]}, {"text": "dog", "label": [0.1, 0.9]}]
    with pytest.raises(DataError, match="2 names are needed, one per probability, got 3"):
        build(CLASSIFY, rows, label_names=["a", "b", "c"])
    wider = [{"text": "cat", "label": [0.5, 0.25, 0.25]}]
    with pytest.raises(DataError, match="every row needs 2 probabilities, got 3"):
        build(CLASSIFY, rows, wider)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([0.5, 0.6], r"sum to 1, got \[0\.5, 0\.6\] in row 2"),
        ([1.5, -0.5], "sum to 1"),
        ([0.2, 0.3, 0.5], "equally long lists of at least two, got 3 in row 2"),
    ],
)
def test_vectors_that_are_no_probabilities_are_refused(build, vector, message: str) -> None:
    rows = [{"text": "cat", "label": [0.5, 0.5]}, {"text": "dog", "label": vector}]
    with pytest.raises(DataError, match=message):
        build(CLASSIFY, rows)


def test_a_group_column_gives_ranking_metrics(build) -> None:
    labels = [0, 1, 0, 1, 0, 0, 0, 0]
    groups = ["x", "x", "y", "y", "y", "x", "z", "z"]
    rows = [
        {"text": f"cat {i}", "label": label, "group": group}
        for i, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]
    dataset = build(CLASSIFY, rows)
    scores = np.array([3.0, 2.0, 1.0, 5.0, 4.0, 1.0, 1.0, 2.0])  # ranks: x 0 1 5, y 3 4 2, z none
    outputs = np.stack([np.zeros(8), scores], axis=1)
    found = TASKS[CLASSIFY].score(outputs, dataset.validation, dataset.label_set)
    assert found["mrr"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["ndcg"] == pytest.approx((1 / np.log2(3) + 1) / 2)


RELEVANT = {"incorrect": 0, "correct": 1}


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (str, list(RELEVANT)),
        (RELEVANT.get, list(RELEVANT)),
        (RELEVANT.get, None),
        (lambda name: str(RELEVANT[name]), None),
        (lambda name: name == "correct", None),
        (lambda name: str(name == "correct"), None),
        (lambda name: [1.0 - RELEVANT[name], float(RELEVANT[name])], None),
    ],
    ids=[
        "listed",
        "numbers with names",
        "numbers",
        "digits",
        "booleans",
        "truth in words",
        "probabilities",
    ],
)
def test_labels_with_an_order_can_be_ranked(tmp_path: Path, wide_bert: Path, label, names) -> None:
    rows = [{"text": f"cat {i}", "label": ["correct", "incorrect"][i % 2]} for i in range(8)]
    rows = [{**row, "group": i // 4} for i, row in enumerate(rows)]

    def prepared(rows: Rows, names: list[str] | None, objective: str) -> Dataset:
        file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
        data = Data(train=file, validation=file, label_names=names, max_length=16)
        task = TASKS[CLASSIFY]
        return open_dataset(prepare(data, task, str(wide_bert), None, 17, objective))

    found = prepared([{**row, "label": label(row["label"])} for row in rows], names, "mrr")
    outputs = np.stack([np.zeros(8), [1.0, 0.0] * 4], axis=1)
    assert TASKS[CLASSIFY].score(outputs, found.validation, found.label_set)["mrr"] == 1
    for objective in ("mrr", "ndcg"):
        with pytest.raises(DataError, match=rf"{objective} .* 'correct', 'incorrect'; list them"):
            prepared(rows, None, objective)
    assert prepared(rows, None, "accuracy").label_names == ("correct", "incorrect")


def test_a_rare_label_of_the_validation_split_becomes_a_class(build) -> None:
    train = [{"text": f"cat {i}", "label": "ab"[i % 2]} for i in range(20)]
    validation = [{"text": f"dog {i}", "label": "ab"[i % 2]} for i in range(199)]
    rare = {"text": "oak", "label": "A"}
    dataset = build(CLASSIFY, train, [*validation, rare])
    assert dataset.label_names == ("a", "b", "A")
    assert dataset.validation.labels[-1] == 2
    with pytest.raises(DataError, match=r"'A' \(3 times\) is not among the training labels"):
        build(CLASSIFY, train, [*validation, rare, rare, rare])


def test_labels_of_the_test_split_are_compared_before_anything_is_trained(
    build, tmp_path: Path
) -> None:
    rows = [{"text": f"cat {i}", "label": "ab"[i % 2]} for i in range(199)]
    test = write_jsonl(tmp_path / "test.jsonl", [*rows, {"text": "oak", "label": "A"}])
    assert build(CLASSIFY, rows, test=str(test)).label_names == ("a", "b", "A")
    write_jsonl(test, [*rows[:9], {"text": "oak", "label": "A"}])
    with pytest.raises(DataError, match=r"test.*'A' \(1 times\) is not among the training labels"):
        build(CLASSIFY, rows, test=str(test))


def test_label_names_keep_the_order_of_the_numbers(build) -> None:
    rows = [{"text": f"cat {i}", "label": i % 3} for i in range(9)]
    dataset = build(CLASSIFY, rows, label_names=["zero", "one", "another"])
    assert dataset.label_names == ("zero", "one", "another")
    assert dataset.train.labels.tolist() == [0, 1, 2] * 3
    with pytest.raises(DataError, match=r"label 2 has no name among 2 data\.label_names"):
        build(CLASSIFY, rows, label_names=["zero", "one"])


def test_a_second_text_is_read_where_there_is_one_and_can_be_left_out(build) -> None:
    rows = [{"text": "cat", "text_pair": "oak", "label": i % 2} for i in range(6)]
    both, one = build(CLASSIFY, rows), build(CLASSIFY, rows, columns={"text_pair": None})
    assert shown(both.train, 0) == "cat oak"
    assert both.train.segments is not None
    assert shown(one.train, 0) == "cat"
    assert one.train.segments is None


def test_a_second_text_of_one_split_only_is_a_problem(build) -> None:
    rows = [{"text": "cat", "text_pair": "oak", "label": i % 2} for i in range(6)]
    bare = [{"text": "cat", "label": i % 2} for i in range(6)]
    with pytest.raises(DataError, match=r"validation\.jsonl.*no column 'text_pair'"):
        build(CLASSIFY, rows, bare)


def test_labels_of_multi_label_rows_may_be_none_at_all(build) -> None:
    rows = [{"text": "cat", "labels": ["b", "a"]}, {"text": "dog", "labels": []}] * 2
    dataset = build(LABELS, rows)
    assert dataset.label_names == ("a", "b")
    np.testing.assert_array_equal(dataset.train.labels, [[1, 1], [0, 0]] * 2)


# -- tags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "row"),
    [
        ([[1, 0], [], [1, 0, 0]], 3),
        ([[], [True, False], [False, True]], 2),
        ([[0.0, 1.0], [1.0, 1.0]], 1),
    ],
)
def test_one_0_or_1_per_class_is_no_list_of_labels(build, labels: list[Any], row: int) -> None:
    rows = [{"text": f"cat {i}", "labels": found} for i, found in enumerate(labels)]
    with pytest.raises(DataError, match=rf"holds one 0 or 1 per class \(row {row}\); list the"):
        build(LABELS, rows)


@pytest.mark.parametrize("labels", [[[0, 1], [1], []], [["0", "0"], ["1"]], [[2, 0], [0, 0]]])
def test_classes_may_be_called_0_and_1(build, labels: list[Any]) -> None:
    rows = [{"text": f"cat {i}", "labels": found} for i, found in enumerate(labels)]
    assert len(build(LABELS, rows).label_names) == 2


def test_words_that_were_cut_off_count_as_outside(build) -> None:
    words = ["the"] * 4 + ["cat"] + ["the"] * 4 + ["dog", "cats"]
    tags = ["O"] * 4 + ["B-animal"] + ["O"] * 4 + ["B-animal", "I-animal"]
    dataset = build(TAG, [{"tokens": words, "tags": tags}] * 2, max_length=8)
    assert dataset.num_truncated == {"train": 2, "validation": 2}
    validation, labels = dataset.validation, dataset.label_set
    outputs = perfect(validation, len(labels.names))
    answer = TASKS[TAG].answer(outputs, validation, labels)[0]
    assert answer["tags"] == ["O"] * 4 + ["B-animal"] + ["O"] * 6
    found = TASKS[TAG].score(outputs, validation, labels)
    assert (found["precision"], found["recall"]) == (1, 0.5)
    assert found["accuracy"] == pytest.approx(9 / 11)


def test_a_word_of_several_tokens_is_tagged_by_its_first(build) -> None:
    rows = [{"tokens": ["cats", "walked,", "old"], "tags": ["B-x", "O", "B-y"]}] * 2
    dataset = build(TAG, rows)
    examples, ids = dataset.train, {name: i for i, name in enumerate(dataset.label_names)}
    of_token = dict(zip(shown(examples, 0).split(), examples.labels[1:-1], strict=False))
    assert of_token["cat"] == ids["B-x"]
    assert of_token["##s"] == IGNORED
    assert examples.words[examples[0]].max() == 2
    assert examples.counts.tolist() == [3, 3]
    outputs = perfect(dataset.validation, len(ids))
    assert TASKS[TAG].answer(outputs, dataset.validation, dataset.label_set)[0] == {
        "tags": ["B-x", "O", "B-y"],
        "entities": [
            {"label": "x", "words": [0, 1], "text": "cats"},
            {"label": "y", "words": [2, 3], "text": "old"},
        ],
    }


def test_a_word_without_any_token_counts_as_outside(build) -> None:
    rows = [{"tokens": ["cat", "\u200b", "dog"], "tags": ["B-x", "B-x", "O"]}] * 2
    dataset = build(TAG, rows)
    assert dataset.train.counts.tolist() == [2, 2]
    outputs = perfect(dataset.validation, len(dataset.label_names))
    answer = TASKS[TAG].answer(outputs, dataset.validation, dataset.label_set)[0]
    assert answer["tags"] == ["B-x", "O", "O"]


@pytest.mark.parametrize("predicate", [2, "saw"])
def test_the_predicate_is_marked_and_tags_stay_with_their_words(build, predicate) -> None:
    row = {"tokens": ["the", "cats", "saw", "oak"], "tags": ["O", "A0", "V", "A1"]}
    dataset = build(TAG, [{**row, "predicate": predicate}] * 2)
    assert shown(dataset.train, 0) == "the cat ##s @ saw @ oak"
    names, labels = dataset.label_names, dataset.train.labels[dataset.train[0]]
    tagged = [names[i] for i in labels if i != IGNORED]
    assert tagged == ["O", "A0", "V", "A1"]
    assert [names[i] if i >= 0 else "" for i in labels[1:-1]] == [
        "O",
        "A0",
        "",
        "",
        "V",
        "",
        "A1",
    ]


@pytest.mark.parametrize("predicate", [7, "cat", "dog"])
def test_a_predicate_that_is_no_one_word_is_refused(build, predicate) -> None:
    row = {"tokens": ["cat", "saw", "cat"], "tags": ["O", "V", "O"], "predicate": predicate}
    good = {**row, "predicate": type(predicate)(1) if predicate == 7 else "saw"}
    with pytest.raises(DataError, match=f"row 2: the predicate {predicate!r}"):
        build(TAG, [good, row])


def test_tags_without_a_prefix_keep_their_names_in_answers(build) -> None:
    row = {"tokens": ["the", "cat", "dog"], "tags": ["DET", "NOUN", "NOUN"]}
    dataset = build(TAG, [row] * 2)
    outputs = perfect(dataset.validation, len(dataset.label_names))
    answer = TASKS[TAG].answer(outputs, dataset.validation, dataset.label_set)[0]
    assert answer["tags"] == row["tags"]
    assert {entity["label"] for entity in answer["entities"]} <= {"DET", "NOUN"}


def test_tags_without_a_prefix_are_answered_without_a_warning(build) -> None:
    dataset = build(TAG, [{"tokens": ["the", "cat"], "tags": ["DET", "NOUN"]}] * 2)
    outputs = perfect(dataset.validation, len(dataset.label_names))
    first, _ = TASKS[TAG].answer(outputs, dataset.validation, dataset.label_set)
    assert first["tags"] == ["DET", "NOUN"]


def test_a_keyword_is_answered_whole(build) -> None:
    row = {"tokens": ["the", "old", "cat", "new", "dog"], "tags": ["O", "B", "I", "B", "I"]}
    dataset = build(TAG, [row] * 2)
    outputs = perfect(dataset.validation, len(dataset.label_names))
    first, _ = TASKS[TAG].answer(outputs, dataset.validation, dataset.label_set)
    found = [(entity["label"], entity["text"]) for entity in first["entities"]]
    assert found == [("_", "old cat"), ("_", "new dog")]


def test_tags_that_are_whole_numbers_need_names(build) -> None:
    rows = [{"tokens": ["the", "cat"], "tags": [0, 1]}] * 2
    with pytest.raises(DataError, match=r"data\.label_names: the tags .* O included"):
        build(TAG, rows)
    dataset = build(TAG, rows, label_names=["O", "B-animal"])
    assert dataset.validation.column("tags") == [["O", "B-animal"]] * 2


def test_as_many_tags_as_words_are_needed(build) -> None:
    rows = [{"tokens": ["cat"], "tags": ["O"]}, {"tokens": ["cat", "dog"], "tags": ["B-x"]}]
    with pytest.raises(DataError, match="row 2 has 2 tokens and 1 tags"):
        build(TAG, rows)


def test_tags_of_a_saved_data_set_have_the_names_of_its_classes(tmp_path, wide_bert) -> None:
    names = ["O", "B-tool", "B-animal"]
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=names)),
        }
    )
    rows = {"tokens": [["the", "cat"], ["saw", "the"]] * 5, "tags": [[0, 2], [1, 0]] * 5}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "saved")
    data = Data(path=str(tmp_path / "saved"), max_length=16)
    dataset = open_dataset(prepare(data, TASKS[TAG], str(wide_bert), None, seed=1))
    assert dataset.label_names == tuple(names)
    assert dataset.validation.column("tags")[:2] == [["O", "B-animal"], ["B-tool", "O"]]
    assert dataset.train.labels[dataset.train[0]].tolist() == [IGNORED, 0, 2, IGNORED]


# -- question answering --------------------------------------------------------------------------


def question(context: str, answer: str | None, asked: str = "one in the ?") -> dict[str, Any]:
    texts = [] if answer is None else [answer]
    starts = [context.index(text) for text in texts]
    return {
        "question": asked,
        "context": context,
        "answers": {"text": texts, "answer_start": starts},
    }


LONG = " ".join(["the old road"] * 12 + ["near cats"] + ["a house"] * 12)


def test_a_long_context_becomes_several_overlapping_windows(build) -> None:
    dataset = build(ANSWER, [question(LONG, "cats"), question("a cat", "cat")], max_length=16)
    examples = dataset.validation
    assert examples.lengths.max() <= 16
    assert examples.rows.tolist() == [0] * (len(examples) - 1) + [1]
    ends = []
    for item in range(len(examples) - 1):
        spans = examples.spans[examples[item]]
        inside = spans[spans[:, 0] >= 0]
        if ends:
            assert inside[0, 0] < ends[-1] < inside[-1, 1]
        ends.append(inside[-1, 1])
    assert ends[-1] == len(LONG)
    labelled = np.flatnonzero(examples.labels.any(axis=1))
    assert 1 < len(labelled) < len(examples)
    outputs = perfect(examples, 2)
    answers = TASKS[ANSWER].answer(outputs, dataset.validation, dataset.label_set)
    assert [answer["answer"] for answer in answers] == ["cats", "cat"]
    assert TASKS[ANSWER].score(outputs, dataset.validation, dataset.label_set)["f1"] == 1


def test_the_best_window_gives_the_answer(build) -> None:
    dataset = build(ANSWER, [question(LONG, "cats")] * 2, max_length=16)
    examples = dataset.validation
    outputs = np.zeros((len(examples.tokens), 2))
    for item in range(len(examples)):
        inside = np.flatnonzero(examples.spans[examples[item], 0] >= 0)
        outputs[examples[item].start + inside[0]] = item
    answers = TASKS[ANSWER].answer(outputs, examples, dataset.label_set)
    last = [np.flatnonzero(examples.rows == row)[-1] for row in (0, 1)]
    assert [a["score"] for a in answers] == [2 * item for item in last]


def test_a_blank_that_a_token_covers_is_no_part_of_an_answer(build) -> None:
    dataset = build(ANSWER, [question("the cat went", "cat")] * 2)
    examples = dataset.validation
    # As tokenizers of sentence pieces give them.
    spans = examples.spans - ((examples.spans[:, :1] > 0) * [[1, 0]])
    shifted = replace(examples, spans=spans)
    assert (spans[:, 0] == 3).any()
    for answer in TASKS[ANSWER].answer(perfect(shifted, 2), shifted, dataset.label_set):
        assert (answer["answer"], answer["start"], answer["end"]) == ("cat", 4, 7)


def test_a_question_of_more_than_half_the_length_is_cut_and_counted(build) -> None:
    rows = [question("a cat", "cat", "near " * 40 + "?"), question("a cat", "cat")]
    dataset = build(ANSWER, rows, max_length=16)
    assert dataset.num_truncated == {"train": 1, "validation": 1}
    assert shown(dataset.train, 0) == " ".join(["near"] * 8 + ["a", "cat"])


def test_answers_are_never_longer_than_their_limit_nor_reversed(build, monkeypatch) -> None:
    monkeypatch.setattr("sft_ray.training.answers.MAX_ANSWER_TOKENS", 3)
    dataset = build(ANSWER, [question("the old cat saw a new house", "cat")] * 2)
    examples, rng = dataset.validation, np.random.default_rng(0)
    for _ in range(30):
        outputs = rng.normal(size=(len(examples.tokens), 2))
        for answer in TASKS[ANSWER].answer(outputs, examples, dataset.label_set):
            assert 1 <= len(answer["answer"].split()) <= 3


@pytest.mark.parametrize("some_are_unanswerable", [True, False])
def test_an_empty_answer_is_given_only_if_training_has_some(build, some_are_unanswerable) -> None:
    train = [question("the cat", "cat"), question("the oak", None)]
    validation = [question("the cat", "cat")] * 2
    dataset = build(ANSWER, train if some_are_unanswerable else validation, validation)
    assert dataset.label_set.negative == ("" if some_are_unanswerable else None)
    examples = dataset.validation
    outputs = np.zeros((len(examples.tokens), 2))
    outputs[examples.offsets[:-1]] = 5.0
    answers = TASKS[ANSWER].answer(outputs, examples, dataset.label_set)
    assert {answer["answer"] == "" for answer in answers} == {some_are_unanswerable}


def test_a_model_learns_which_questions_have_no_answer(build, wide_bert: Path) -> None:
    def rows(n: int, seed: int) -> Rows:
        rng = np.random.default_rng(seed)
        found = [answer_row(rng, i) for i in range(n)]
        for row in found[::3]:
            word = row["answers"]["text"][0]
            row["context"] = " ".join("road" if w == word else w for w in row["context"].split())
            row["answers"] = {"text": [], "answer_start": []}
        return found

    dataset = build(ANSWER, rows(200, 1), rows(60, 2))
    task = TASKS[ANSWER]
    reports = run_fit(
        load_tiny(wide_bert, dataset, task=task),
        dataset,
        task=task,
        rungs=(),
        epochs=6,
        learning_rate=5e-3,
        batch_size=16,
    )
    best = reports[-1].best
    assert best.score > 0.9
    answers = task.answer(best.outputs, dataset.validation, dataset.label_set)
    assert [a["answer"] == "" for a in answers[:6]] == [True, False, False] * 2


def test_answers_may_be_a_list_of_text_and_start(build) -> None:
    nested = [question("the cat", "cat"), question("a dog", "dog")]
    listed = [
        {**row, "answers": [{"text": row["answers"]["text"][0], "answer_start": start}]}
        for row, start in zip(nested, (4, 2), strict=True)
    ]
    first, second = build(ANSWER, nested), build(ANSWER, listed)
    np.testing.assert_array_equal(first.train.labels, second.train.labels)
    outputs = perfect(second.validation, 2)
    assert TASKS[ANSWER].score(outputs, second.validation, second.label_set)["exact_match"] == 1


def test_any_of_several_answers_is_right(build) -> None:
    row = question("the old cat", "cat")
    row["answers"] = {"text": ["cat", "old cat"], "answer_start": [8, 4]}
    dataset = build(ANSWER, [row] * 2)
    examples = dataset.validation
    outputs = perfect(examples, 2)
    assert TASKS[ANSWER].score(outputs, examples, dataset.label_set)["exact_match"] == 1
    end = int(examples.labels[0, 1])
    outputs[:, 0] = 0
    outputs[examples.offsets[:-1] + end - 1, 0] = 9
    found = TASKS[ANSWER].answer(outputs, examples, dataset.label_set)
    assert {answer["answer"] for answer in found} == {"old cat"}
    assert TASKS[ANSWER].score(outputs, examples, dataset.label_set)["exact_match"] == 1


def test_an_answer_that_is_not_where_it_says_is_refused(build) -> None:
    row = question("the cat", "cat")
    row["answers"]["answer_start"] = [3]
    with pytest.raises(DataError, match="row 1: the answer 'cat' does not stand at character 3"):
        build(ANSWER, [row, question("the cat", "cat")])


@pytest.mark.parametrize("max_length", [8, 9, 10])
def test_the_shortest_lengths_still_leave_room_for_windows(build, max_length: int) -> None:
    rows = [question("the old cat saw a new house", "cat", "one in the ?")] * 2
    dataset = build(ANSWER, rows, max_length=max_length)
    assert dataset.train.lengths.max() <= max_length


def test_shorter_lengths_are_refused(build) -> None:
    rows = [question("the old cat saw a new house", "cat", "one in the ?")] * 2
    with pytest.raises(DataError, match=r"data\.max_length: .* at least 8 tokens .* got 7"):
        build(ANSWER, rows, max_length=7)


@pytest.mark.parametrize(("max_length", "fits"), [(8, False), (9, False), (10, True), (11, True)])
def test_pairs_with_two_separators_need_more_room(tmp_path, wide_bert, max_length, fits) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wide_bert, folder)
    tokenizer = load_tokenizer(str(folder))
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(*ends)
    tokenizer.save_pretrained(folder)
    rows = [question("the old cat saw a new house", "cat", "one in the ?")] * 2
    if fits:
        dataset = dataset_of(tmp_path / "rows", ANSWER, folder, rows, max_length=max_length)
        assert dataset.train.lengths.max() <= max_length
    else:
        with pytest.raises(DataError, match=rf"at least 10 tokens .* got {max_length}"):
            dataset_of(tmp_path / "rows", ANSWER, folder, rows, max_length=max_length)


# -- relations -----------------------------------------------------------------------------------


def related(text: str, subject: tuple[int, int], object_: tuple[int, int]) -> dict[str, Any]:
    return {
        "text": text,
        "subject_start": subject[0],
        "subject_end": subject[1],
        "object_start": object_[0],
        "object_end": object_[1],
    }


@pytest.mark.parametrize(
    ("subject", "object_", "expected"),
    [
        ((0, 3), (8, 11), "@ cat @ saw # oak # house"),
        ((8, 11), (0, 3), "# cat # saw @ oak @ house"),
        ((0, 4), (4, 7), "@ cat @ # saw # oak house"),
        ((4, 7), (0, 4), "# cat # @ saw @ oak house"),
        ((4, 7), (0, 11), "# cat @ saw @ oak # house"),
        ((0, 11), (4, 7), "@ cat # saw # oak @ house"),
        ((0, 7), (4, 11), "@ cat # saw @ oak # house"),
        ((0, 3), (12, 17), "@ cat @ saw oak # house #"),
    ],
)
def test_entities_are_marked_however_they_lie(build, subject, object_, expected: str) -> None:
    row = related("cat saw oak house", subject, object_)
    dataset = build(RELATE, [{**row, "label": "a"}, {**row, "label": "b"}])
    assert shown(dataset.train, 0) == expected


@pytest.mark.parametrize("shared", [(0, 3), (0, 17), (4, 11)])
def test_entities_of_equal_span_keep_all_their_marks(build, shared: tuple[int, int]) -> None:
    text = "cat saw oak house"
    row = related(text, shared, shared)
    dataset = build(RELATE, [{**row, "label": "a"}, {**row, "label": "b"}])
    found = shown(dataset.train, 0)
    assert (found.count("@"), found.count("#")) == (2, 2)
    assert [w for w in found.split() if w not in "@#"] == text.split()


@pytest.mark.parametrize(("subject", "object_"), [(0, 1), (1, 5), (25, 20), (44, 49), (49, 48)])
def test_a_long_text_is_cut_around_its_entities(build, subject: int, object_: int) -> None:
    words = ["the"] * 50
    words[subject], words[object_] = "cat", "oak"
    text = " ".join(words)
    spans = [(text.index(word), text.index(word) + 3) for word in ("cat", "oak")]
    row = related(text, *spans)
    dataset = build(RELATE, [{**row, "label": "a"}, {**row, "label": "b"}], max_length=16)
    assert dataset.num_truncated["train"] == 2
    assert dataset.train.lengths.tolist() == [16, 16]
    found = shown(dataset.train, 0)
    assert "@ cat @" in found
    assert "# oak #" in found
    assert len(found.split()) == 14


def test_other_punctuation_marks_entities_if_the_vocabulary_has_no_better(tmp_path) -> None:
    model = tiny_model_folder(tmp_path / "plain")
    row = related("cat saw oak house", (0, 3), (8, 11))
    rows = [{**row, "label": "a"}, {**row, "label": "b"}]
    dataset = dataset_of(tmp_path / "rows", RELATE, model, rows)
    assert shown(dataset.train, 0) == "? cat ? saw , oak , house"
    bare = tuple(token for token in VOCABULARY if token not in ",.?")
    model = tiny_model_folder(tmp_path / "bare", vocabulary=bare)
    with pytest.raises(DataError, match="no punctuation to mark entities with"):
        dataset_of(tmp_path / "rows", RELATE, model, rows)


@pytest.mark.parametrize("span", [(5, 5), (7, 5), (15, 18)])
def test_an_entity_that_is_no_span_of_the_text_is_refused(build, span: tuple[int, int]) -> None:
    good = {**related("cat saw oak house", (0, 3), (8, 11)), "label": "a"}
    bad = {**related("cat saw oak house", (0, 3), span), "label": "b"}
    with pytest.raises(DataError, match=r"row 2: the object \["):
        build(RELATE, [good, bad])


def test_spans_may_stand_in_columns_of_other_names(build) -> None:
    row = {"text": "cat saw oak", "s": 0, "t": 3, "object_start": 8, "object_end": 11}
    rows = [{**row, "label": "a"}, {**row, "label": "b"}]
    dataset = build(RELATE, rows, columns={"subject": ["s", "t"]})
    assert shown(dataset.train, 0) == "@ cat @ saw # oak #"
    with pytest.raises(DataError, match=r"data\.columns\.subject: takes \[start_column"):
        build(RELATE, rows, columns={"subject": "s"})


def test_the_negative_label_does_not_count_and_must_exist(build) -> None:
    row = related("cat saw oak house", (0, 3), (8, 11))
    rows = [{**row, "label": label} for label in ("none", "a", "b", "a")]
    dataset = build(RELATE, rows, negative_label="none")
    outputs = 9.0 * np.eye(3)[[0, 1, 1, 2]]  # a, b, b, none
    assert dataset.label_names == ("a", "b", "none")
    found = TASKS[RELATE].score(outputs, dataset.validation, dataset.label_set)
    truth, predicted = ["none", "a", "b", "a"], ["a", "b", "b", "none"]
    expected = sk.f1_score(truth, predicted, average="micro", labels=["a", "b"])
    assert found["micro_f1"] == pytest.approx(expected)
    everything = TASKS[RELATE].score(outputs, dataset.validation, build(RELATE, rows).label_set)
    assert everything["micro_f1"] == pytest.approx(everything["accuracy"])
    with pytest.raises(DataError, match=r"data\.negative_label: 'nothing' is no label"):
        build(RELATE, rows, negative_label="nothing")


# -- Chinese -------------------------------------------------------------------------------------

PLACES, GROUPS = ("北京", "上海", "广州"), {"猫": "动物", "狗": "动物", "树": "植物", "花": "植物"}
PLAIN = tuple("我你他在去看了的很大小新旧")


def chinese(rng: np.random.Generator, inserted: str) -> tuple[str, int]:
    """A text of some characters with `inserted` at a place in it."""
    text = "".join(rng.choice(PLAIN, size=rng.integers(3, 9)))
    place = int(rng.integers(0, len(text) + 1))
    return text[:place] + inserted + text[place:], place


def learn(build, wide_bert: Path, name: str, make: Callable[[Any, int], Any]) -> Learned:
    rng = np.random.default_rng(5)
    rows = [make(rng, i) for i in range(240)]
    dataset, task = build(name, rows[:180], rows[180:]), TASKS[name]
    reports = run_fit(
        load_tiny(wide_bert, dataset, task=task),
        dataset,
        task=task,
        rungs=(),
        epochs=8,
        learning_rate=5e-3,
        batch_size=16,
    )
    return Learned(name, dataset, reports)


def test_chinese_texts_are_classified(build, wide_bert: Path) -> None:
    def row(rng: np.random.Generator, i: int) -> dict[str, Any]:
        word = list(GROUPS)[i % 4]
        return {"text": chinese(rng, word)[0], "label": GROUPS[word]}

    learned = learn(build, wide_bert, CLASSIFY, row)
    assert learned.dataset.label_names == ("动物", "植物")
    assert learned.reports[-1].best.score > 0.9
    assert {answer["label"] for answer in learned.answers} == {"动物", "植物"}


def test_entities_of_chinese_characters_are_found(build, wide_bert: Path) -> None:
    def row(rng: np.random.Generator, i: int) -> dict[str, Any]:
        text, at = chinese(rng, PLACES[i % 3])
        tags = ["O"] * at + ["B-地", "I-地"] + ["O"] * (len(text) - at - 2)
        return {"tokens": list(text), "tags": tags}

    learned = learn(build, wide_bert, TAG, row)
    assert learned.reports[-1].best.score > 0.9
    texts = {e["text"] for answer in learned.answers for e in answer["entities"]}
    assert {place[0] + " " + place[1] for place in PLACES} <= texts


def test_chinese_questions_are_answered_and_scored_by_characters(build, wide_bert: Path) -> None:
    def row(rng: np.random.Generator, i: int) -> dict[str, Any]:
        text, at = chinese(rng, PLACES[i % 3])
        answers = {"text": [PLACES[i % 3]], "answer_start": [at]}
        return {"question": "你去在", "context": text, "answers": answers}

    learned = learn(build, wide_bert, ANSWER, row)
    assert learned.reports[-1].best.score > 0.9
    assert {answer["answer"] for answer in learned.answers} >= set(PLACES)
    examples, labels = learned.dataset.validation, learned.dataset.label_set
    outputs = perfect(examples, 2)
    outputs[:, 1] = np.roll(outputs[:, 1], -1)  # one character less at the end
    found = TASKS[ANSWER].score(outputs, examples, labels)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["exact_match"] == 0
