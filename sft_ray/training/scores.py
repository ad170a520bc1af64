"""From the outputs of a whole split to its metrics, and the best output that looks at no input.

Outputs are [n, classes] for tasks that answer per item, [total, classes] for those that answer per
token, with the tokens of all items end to end.
"""

from __future__ import annotations

import numpy as np

from sft_ray.training import metrics
from sft_ray.training.answers import answer_spans, predicted_tags
from sft_ray.training.columns import answer_pairs
from sft_ray.training.examples import IGNORED, Examples, LabelSet
from sft_ray.training.metrics import Floats


def none_missing(examples: Examples, label_set: LabelSet) -> set[str]:
    """Every metric of the task exists for all of its data."""
    return set()


def score_classes(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """Accuracy and its kin; F1 where there are two classes; ranking where there are groups.

    Precision and recall are those of the second of two classes, else macro averages.  Within a
    group candidates rank by their expected class number, which is also what a candidate gains.
    """
    truth = examples.labels
    ids = truth.argmax(axis=1) if truth.ndim == 2 else truth
    binary = len(label_set.names) == 2
    precision, recall, f1 = metrics.precision_recall_f1(
        logits, ids, average="binary" if binary else "macro"
    )
    found = {
        "accuracy": metrics.accuracy(logits, ids),
        "macro_f1": metrics.macro_f1(logits, ids),
        **({"f1": f1} if binary else {}),
        "precision": precision,
        "recall": recall,
        "mcc": metrics.mcc(logits, ids),
        "loss": metrics.log_loss(logits, truth),
    }
    if examples.has("group"):
        from scipy.special import softmax

        groups, places = examples.column("group"), np.arange(logits.shape[1])
        scores = softmax(logits, axis=1) @ places
        gains = truth @ places if truth.ndim == 2 else truth.astype(float)
        found["mrr"] = metrics.mean_reciprocal_rank(scores, ids > 0, groups)
        found["ndcg"] = metrics.mean_ndcg(scores, gains, groups)
    return found


def missing_of_classes(examples: Examples, label_set: LabelSet) -> set[str]:
    """F1 needs two classes, ranking needs groups."""
    missing = {"f1"} if len(label_set.names) != 2 else set()
    return missing if examples.has("group") else missing | {"mrr", "ndcg"}


def score_labels(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    return metrics.multi_label(logits, examples.labels)


def score_values(outputs: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    found = metrics.regression(outputs[:, 0], examples.labels)
    return {**found, "loss": found["mse"]}


def score_tags(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """Against all words of a row; those that were cut off count as predicted to be outside."""
    labelled = examples.labels != IGNORED
    found = predicted_tags(logits, examples, label_set)
    return {
        **metrics.entities(examples.column("tags"), found, label_set.names),
        "loss": metrics.log_loss(logits[labelled], examples.labels[labelled]),
    }


def score_answers(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """SQuAD's F1 and exact match, and the mean loss of a window."""
    from scipy.special import log_softmax

    truths = [
        [text for text, _ in answer_pairs(value)] or [""] for value in examples.column("answers")
    ]
    found = [answer["answer"] for answer in answer_spans(logits, examples, label_set)]
    losses = [
        -log_softmax(logits[examples[item]].astype(np.float64), axis=0)[place, [0, 1]].mean()
        for item, place in enumerate(examples.labels)
    ]
    return {**metrics.question_answering(found, truths), "loss": float(np.mean(losses))}


def score_relations(logits: Floats, examples: Examples, label_set: LabelSet) -> dict[str, float]:
    """F1 over the classes that are not the negative one; micro-F1 over all is accuracy."""
    ids = range(len(label_set.names))
    counted = [i for i in ids if label_set.names[i] != label_set.negative]
    truth = examples.labels
    return {
        "micro_f1": metrics.precision_recall_f1(logits, truth, average="micro", classes=counted)[2],
        "macro_f1": metrics.precision_recall_f1(logits, truth, average="macro", classes=counted)[2],
        "accuracy": metrics.accuracy(logits, truth),
        "loss": metrics.log_loss(logits, truth),
    }


# -- constant outputs ----------------------------------------------------------------------------


def class_frequencies(train: Examples, label_set: LabelSet) -> Floats:
    """Log share of every class among the training labels; the commonest is always answered."""
    classes = len(label_set.names)
    truth = train.labels
    if truth.ndim == 2:
        shares = truth.mean(axis=0)
    else:
        counts = np.bincount(truth[truth != IGNORED], minlength=classes)
        shares = counts / counts.sum()
    return np.log(np.maximum(shares, 1e-9))


def label_frequencies(train: Examples, label_set: LabelSet) -> Floats:
    shares = train.labels.mean(axis=0).clip(1e-9, 1 - 1e-9)
    return np.log(shares / (1 - shares))


def mean_value(train: Examples, label_set: LabelSet) -> Floats:
    return np.array([train.labels.mean()])


def no_constant(train: Examples, label_set: LabelSet) -> None:
    """Nothing sensible can be answered without looking at the input."""
