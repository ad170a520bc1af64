"""Every metric against scikit-learn and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from seqeval import metrics as seqeval
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics as sk

from sft_ray.tags import with_prefixes
from sft_ray.training import metrics
from sft_ray.training.examples import Examples, LabelSet
from sft_ray.training.tasks import TASKS


@pytest.fixture
def scored() -> tuple[metrics.Floats, metrics.Integers]:
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


def test_score_gives_the_metrics_of_a_task_as_floats(scored) -> None:
    task, (logits, labels) = TASKS["text-classification"], scored
    items = np.arange(len(labels))
    examples = Examples(items, np.append(items, len(items)), None, items, labels=labels)
    found = task.score(logits, examples, LabelSet(("a", "b", "c", "d")))
    assert list(found) == ["accuracy", "macro_f1", "precision", "recall", "mcc", "loss"]
    assert all(type(value) is float for value in found.values())
    assert task.default_objective == "accuracy"
    assert [task.direction(name) for name in found] == ["maximize"] * 5 + ["minimize"]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_losses_and_errors_are_minimized_and_all_else_is_maximized(task) -> None:
    assert {name for name in task.metrics if task.sign(name) < 0} == {"loss", "mse", "mae"} & set(
        task.metrics
    )
    assert "loss" in task.metrics


# -- ranking -------------------------------------------------------------------------------------


def test_ranking_metrics_agree_with_hand_computed_values() -> None:
    groups = ["x", "y", "x", "y", "y", "z"]
    scores = np.array([0.2, 0.9, 0.5, 0.1, 0.4, 0.3])
    gains = np.array([1, 0, 0, 1, 1, 0])
    # x ranks 2 0: the gain comes second.  y ranks 1 4 3: gains come second and third.  z has none.
    assert metrics.mean_reciprocal_rank(scores, gains > 0, groups) == pytest.approx(
        (1 / 2 + 1 / 2 + 0) / 3
    )
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    assert metrics.mean_ndcg(scores, gains, groups) == pytest.approx(
        (second + (second + third) / (1 + second)) / 2
    )


def test_ndcg_agrees_with_scikit_learn_for_gains_of_several_steps() -> None:
    rng = np.random.default_rng(0)
    gains, scores = rng.integers(0, 4, size=60), rng.integers(0, 8, size=60)
    groups = rng.integers(0, 9, size=60).tolist()
    expected = [
        sk.ndcg_score([gains[rows]], [scores[rows]])
        for rows in (np.flatnonzero(np.array(groups) == g) for g in set(groups))
    ]
    assert metrics.mean_ndcg(scores, gains, groups) == pytest.approx(np.mean(expected))


def test_a_group_of_one_candidate_ranks_it_first_or_is_left_out() -> None:
    assert metrics.mean_ndcg(np.array([0.1, 0.2]), np.array([1, 0]), ["x", "y"]) == 1
    assert metrics.mean_ndcg(np.array([0.1, 0.2]), np.array([0, 0]), ["x", "y"]) == 0
    scores, gains = np.array([0.1, 0.2]), np.array([1, 0])
    assert metrics.mean_reciprocal_rank(scores, gains > 0, ["x", "y"]) == 1 / 2


def test_a_constant_answer_gains_nothing_by_the_order_of_its_candidates() -> None:
    scores = np.zeros(3)
    for first in ([0, 0, 1], [1, 0, 0]):
        gains = np.array(first)
        assert metrics.mean_reciprocal_rank(scores, gains > 0, [1, 1, 1]) == 1 / 3
        mean_discount = np.mean(1 / np.log2([2, 3, 4]))
        assert metrics.mean_ndcg(scores, gains, [1, 1, 1]) == pytest.approx(mean_discount)


# -- multi-label ---------------------------------------------------------------------------------


def test_multi_label_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random((80, 5)) < 0.3).astype(float)
    truth[:, 4] = 0  # a class that never occurs
    logits = rng.normal(size=(80, 5)) + truth
    found, predicted = metrics.multi_label(logits, truth), logits > 0
    assert found["micro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(truth, predicted, average="macro", zero_division=0)
    )
    assert found["subset_accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    precisions = [sk.average_precision_score(truth[:, c], logits[:, c]) for c in range(4)]
    assert found["map"] == pytest.approx(np.mean(precisions))
    probabilities = 1 / (1 + np.exp(-logits))
    losses = -(truth * np.log(probabilities) + (1 - truth) * np.log(1 - probabilities))
    assert found["loss"] == pytest.approx(losses.mean())


@pytest.mark.parametrize("occurring", [0, 1])
def test_multi_label_metrics_exist_when_at_most_one_class_occurs(occurring: int) -> None:
    truth = np.zeros((6, 3))
    truth[:3, :occurring] = 1
    logits = np.where(truth > 0, 2.0, -2.0)
    found = metrics.multi_label(logits, truth)
    assert found["subset_accuracy"] == 1
    assert found["map"] == found["micro_f1"] == occurring
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-2)))


def test_multi_label_loss_of_certain_answers_does_not_overflow() -> None:
    logits = np.array([[1e4, -1e4]])
    assert metrics.multi_label(logits, np.array([[1.0, 0.0]]))["loss"] == 0
    assert metrics.multi_label(logits, np.array([[0.0, 1.0]]))["loss"] == pytest.approx(1e4)


# -- regression ----------------------------------------------------------------------------------


def test_regression_metrics_agree_with_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=50)
    predictions = (values + rng.normal(size=50)).astype(np.float32)
    found = metrics.regression(predictions, values)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, values).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predictions, values).statistic)
    assert found["mse"] == pytest.approx(sk.mean_squared_error(values, predictions))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(values, predictions))


@pytest.mark.parametrize("constant", ["predictions", "values", "both", "one row"])
def test_a_correlation_with_a_constant_is_0(constant: str) -> None:
    varied, same = np.array([1.0, 2.0, 4.0]), np.full(3, 0.1)
    predictions = same if constant in ("predictions", "both") else varied
    values = same if constant in ("values", "both") else varied
    if constant == "one row":
        predictions, values = predictions[:1], values[:1] + 1
    found = metrics.regression(predictions, values)
    assert found["spearman"] == found["pearson"] == 0
    assert found["mse"] == pytest.approx(np.mean((predictions - values) ** 2))


def test_predictions_that_hardly_differ_still_have_a_correlation() -> None:
    predictions = np.nextafter(np.float32(0.7), np.float32([0.0, 0.7, 1.0]))
    found = metrics.regression(predictions, np.array([1.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] > 0.9


# -- entities ------------------------------------------------------------------------------------


def entities(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Scored over the tags that occur."""
    return metrics.entities(truth, predicted, {tag for row in truth + predicted for tag in row})


TRUTH = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "B-LOC", "O"]]
FOUND = [["B-PER", "I-PER", "O", "O"], ["O", "B-LOC", "I-LOC", "B-PER"]]


def test_entity_metrics_agree_with_seqeval_and_hand_computed_values() -> None:
    found = entities(TRUTH, FOUND)
    # 4 entities; 3 are predicted, of which one (PER) is right.
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == pytest.approx(1 / 4)
    assert found["f1"] == pytest.approx(2 / 7)
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["f1"] == pytest.approx(seqeval.f1_score(TRUTH, FOUND))
    assert found["accuracy"] == pytest.approx(seqeval.accuracy_score(TRUTH, FOUND))


def test_an_entity_may_begin_with_inside_as_conlleval_counts() -> None:
    assert entities([["O", "I-LOC"]], [["O", "B-LOC"]])["f1"] == 1
    assert entities([["B-LOC", "I-PER"]], [["B-LOC", "B-PER"]])["f1"] == 1


def test_the_tags_of_chinese_corpora_are_read_as_those_they_stand_for() -> None:
    truth = [["B-ORG", "M-ORG", "M-ORG", "E-ORG", "O", "S-PER"]]
    found = [["B-ORG", "M-ORG", "M-ORG", "O", "O", "W-PER"]]
    assert entities(truth, found)["f1"] == pytest.approx(0.5)
    assert entities(truth, truth)["f1"] == 1


@pytest.mark.parametrize(
    ("names", "truth", "predicted"),
    [
        ("BIO", "BIOBI", "BOOBO"),
        ("BIO", "BBO", "BOO"),
        ("BIO", "BIIO", "IIIO"),
        ("BIOES", "BIESO", "BIEOS"),
        ("BI", "BIBI", "BIII"),
        ("BMES", "BMESBE", "BEBESS"),
    ],
)
def test_tags_without_a_type_are_read_as_seqeval_does(names, truth, predicted) -> None:
    rows = [list(truth)], [list(predicted)]
    as_iobes = [[[{"M": "I"}.get(tag, tag) for tag in row] for row in part] for part in rows]
    found = metrics.entities(*rows, list(names))
    assert found["f1"] == pytest.approx(seqeval.f1_score(*as_iobes))
    assert found["recall"] == pytest.approx(seqeval.recall_score(*as_iobes))


@pytest.mark.parametrize("names", ["BO", "OS", "OPL", "BILX", "LUW"])
def test_other_single_letters_are_types(names: str) -> None:
    row = [name for name in names for _ in "12"]
    whole = metrics.entities([row], [row], list(names))
    half = metrics.entities([row], [[*row[:-1], names[0]]], list(names))
    assert whole["f1"] == 1
    kinds = {kind for kind, *_ in get_entities(*with_prefixes([row], list(names)))}
    assert kinds == set(names) - {"O"}
    assert half["f1"] < 1


def test_tags_without_a_prefix_count_every_word() -> None:
    truth = [["DET", "NOUN", "VERB"], ["NOUN", "NOUN"]]
    predicted = [["DET", "NOUN", "NOUN"], ["NOUN", "VERB"]]
    found = entities(truth, predicted)
    assert found == {"f1": 0.6, "precision": 0.6, "recall": 0.6, "accuracy": 0.6}


def test_runs_of_a_tag_without_a_prefix_are_entities_where_there_is_an_outside() -> None:
    truth = [["PER", "PER", "O", "LOC"]]
    predicted = [["PER", "PER", "O", "O"]]
    found = entities(truth, predicted)
    assert found["recall"] == pytest.approx(1 / 2)
    assert found["precision"] == 1


def test_tags_without_a_prefix_beside_an_outside_are_scored_without_a_warning() -> None:
    assert entities([["PER", "O"]], [["PER", "O"]])["f1"] == 1


def test_rows_without_any_entity_score_0_and_not_an_error() -> None:
    found = entities([["O", "O"]], [["O", "O"]])
    assert found == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 1}


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat!", "cat"),
        ("a cat, an oak and the saw", "cat oak and saw"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("“北京”。", "北京"),
        ("“Agreement”", "“agreement”"),  # as the official script has it
        ("...", ""),
    ],
)
def test_answers_are_normalised_by_the_rules_of_squad(text: str, expected: str) -> None:
    assert metrics.normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the old cat", ["old", "cat"]),
        ("北京大学", ["北", "京", "大", "学"]),
        ("北京 2008 年", ["北", "京", "2008", "年"]),
        ("iPhone手机15", ["iphone", "手", "机", "15"]),
        ("ひらカタ", ["ひ", "ら", "カ", "タ"]),
        ("서울 시", ["서", "울", "시"]),
    ],
)
def test_answers_are_compared_by_words_or_characters(text: str, expected: list[str]) -> None:
    assert metrics.answer_words(text) == expected


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ("the old cat", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0),
        ("The cat.", "cat", 1),
        ("", "", 1),
        ("", "cat", 0),
        ("the", "", 1),
        ("北京市", "北京", 4 / 5),
        ("北京2008", "北京 2008", 1),
        ("在北京 2008", "北京2008年", 6 / 8),
    ],
)
def test_f1_of_an_answer_is_over_shared_words(predicted, truth, expected: float) -> None:
    assert metrics.answer_f1(predicted, truth) == pytest.approx(expected)


def test_the_best_of_several_true_answers_counts() -> None:
    found = metrics.question_answering(
        ["old cat", "the dog!", ""], [["cat", "old cat"], ["cat", "big dog"], [""]]
    )
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found["exact_match"] == pytest.approx(2 / 3)


# -- classes, once more --------------------------------------------------------------------------


def test_log_loss_of_probabilities_is_their_cross_entropy() -> None:
    logits, labels = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[0.8, 0.2], [0.5, 0.5]])
    first = 0.8 * math.log1p(math.exp(-2)) + 0.2 * (2 + math.log1p(math.exp(-2)))
    second = 0.5 * (1 + math.log1p(math.exp(-1))) + 0.5 * math.log1p(math.exp(-1))
    assert metrics.log_loss(logits, labels) == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_precision_recall_and_f1_can_leave_classes_out(scored, average: str) -> None:
    logits, labels = scored
    expected = sk.precision_recall_fscore_support(
        labels, logits.argmax(axis=1), average=average, labels=[0, 2]
    )
    found = metrics.precision_recall_f1(logits, labels, average=average, classes=[0, 2])
    assert found == pytest.approx(expected[:3])


def test_a_split_of_one_class_that_is_always_answered_has_an_mcc_of_0() -> None:
    assert metrics.mcc(np.array([[1.0, 0.0]] * 3), np.array([0, 0, 0])) == 0
