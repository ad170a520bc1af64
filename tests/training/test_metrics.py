"""Every metric against scikit-learn and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from sft_ray.training import metrics
from sft_ray.training.tasks import TASKS


@pytest.fixture
def scored() -> tuple[metrics.Logits, metrics.Labels]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, size=200)
    logits = rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[labels]
    return logits, labels


def test_metrics_agree_with_scikit_learn(scored) -> None:
    logits, labels = scored
    answers = logits.argmax(axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert metrics.accuracy(logits, labels) == pytest.approx(sk.accuracy_score(labels, answers))
    assert metrics.macro_f1(logits, labels) == pytest.approx(
        sk.f1_score(labels, answers, average="macro")
    )
    assert metrics.mcc(logits, labels) == pytest.approx(sk.matthews_corrcoef(labels, answers))
    assert metrics.log_loss(logits, labels) == pytest.approx(sk.log_loss(labels, probabilities))


def test_metrics_agree_with_hand_computed_values() -> None:
    # Answers 0 0 1 1 1 for labels 0 1 1 1 0: one of each mistake, three right.
    logits = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 1, 0])
    assert metrics.accuracy(logits, labels) == pytest.approx(3 / 5)
    assert metrics.macro_f1(logits, labels) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics.mcc(logits, labels) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    right = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))
    wrong = 2 * math.log1p(math.exp(1))
    assert metrics.log_loss(logits, labels) == pytest.approx((right + wrong) / 5)


def test_macro_f1_counts_a_class_that_is_only_predicted() -> None:
    logits = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert metrics.macro_f1(logits, np.array([0, 1, 1])) == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_macro_f1_leaves_out_a_class_that_never_occurs() -> None:
    logits = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert metrics.macro_f1(logits, np.array([0, 1])) == 1.0


def test_mcc_of_one_constant_answer_is_chance() -> None:
    logits = np.array([[1.0, 0.0]] * 4)
    assert metrics.mcc(logits, np.array([0, 1, 0, 1])) == 0.0


def test_log_loss_of_certain_answers_does_not_overflow() -> None:
    logits = np.array([[1e4, 0.0], [0.0, 1e4]])
    assert metrics.log_loss(logits, np.array([0, 1])) == 0.0
    assert metrics.log_loss(logits, np.array([1, 1])) == pytest.approx(5e3)


def test_log_loss_of_equal_logits_is_the_log_of_the_number_of_classes() -> None:
    assert metrics.log_loss(np.zeros((3, 5)), np.array([0, 2, 4])) == pytest.approx(math.log(5))


def test_score_gives_every_metric_of_a_task_as_a_float(scored) -> None:
    task = TASKS["text-classification"]
    table = {name: metric for name, (metric, _) in task.metrics.items()}
    found = metrics.score(table, *scored)
    assert list(found) == ["accuracy", "macro_f1", "mcc", "loss"]
    assert all(type(value) is float for value in found.values())
    assert task.default_objective == "accuracy"
    assert [task.direction(name) for name in found] == ["maximize"] * 3 + ["minimize"]
