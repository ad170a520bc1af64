"""Metrics: arrays in, floats out.

Shapes: `logits` are [n, classes]; `labels` are class ids [n], or probabilities or 0/1 [n, classes]
where a function says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sft_ray.squad import CJK, normalize_answer
from sft_ray.tags import with_prefixes

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[np.number[Any]]


def accuracy(logits: Floats, labels: Integers) -> float:
    """Share of examples whose largest logit is the label's."""
    return float((logits.argmax(axis=1) == labels).mean())


def macro_f1(logits: Floats, labels: Integers) -> float:
    """Unweighted mean of the F1 of every class that occurs in labels or predictions."""
    return precision_recall_f1(logits, labels, average="macro")[2]


def mcc(logits: Floats, labels: Integers) -> float:
    """Matthews correlation coefficient; 0 is chance, whatever the class balance.

    For any number of classes (Gorodkin 2004); 0 where labels or predictions are all the same.
    """
    hits, said, true = _counts(logits, labels).astype(float)
    count = len(labels)
    spread = (count**2 - said @ said) * (count**2 - true @ true)
    return float((hits.sum() * count - said @ true) / math.sqrt(spread)) if spread else 0.0


def log_loss(logits: Floats, labels: Integers | Floats) -> float:
    """Mean cross-entropy in nats; labels are ids [n] or probabilities [n, classes]."""
    from scipy.special import log_softmax

    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    if labels.ndim == 2:
        return float(-(labels * log_probabilities).sum(axis=1).mean())
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def precision_recall_f1(
    logits: Floats,
    labels: Integers,
    *,
    average: Literal["binary", "macro", "micro"],
    classes: Sequence[int] | None = None,
) -> tuple[float, float, float]:
    """Precision, recall and F1 as scikit-learn averages them, over some classes or all that occur.

    `binary` looks at the second class alone.  What is divided by 0 is 0.  Importing scikit-learn
    itself would add a fifth to all that a worker imports.
    """
    counts = _counts(logits, labels)
    chosen = np.flatnonzero(counts[1] + counts[2]) if classes is None else np.asarray(classes)
    if average == "binary":
        chosen = np.array([1])
    return _averaged(counts[:, chosen], micro=average == "micro")


def _averaged(counts: Integers, *, micro: bool) -> tuple[float, float, float]:
    """Precision, recall and F1 of `_counts`: of all classes together, or means over them."""
    hits, said, true = counts.sum(axis=1, keepdims=True) if micro else counts

    def ratio(top: Integers, bottom: Integers) -> float:
        return float(np.mean(top / np.maximum(bottom, 1)))  # without a bottom there is no top

    return ratio(hits, said), ratio(hits, true), ratio(2 * hits, said + true)


def _counts(logits: Floats, labels: Integers) -> Integers:
    """Of every class: predicted rightly, predicted, labelled; [3, classes]."""
    predicted, size = logits.argmax(axis=1), logits.shape[1]
    parts = labels[predicted == labels], predicted, labels
    return np.stack([np.bincount(part, minlength=size) for part in parts])


def mean_reciprocal_rank(
    scores: Numbers, relevant: npt.NDArray[np.bool_], groups: Sequence[Any]
) -> float:
    """Mean over groups of 1 / rank of the first relevant candidate; 0 for a group without one.

    Among equal scores the relevant come last, so that a constant answer gains nothing.
    """
    found = []
    for rows in _by_group(groups):
        good = relevant[rows]
        if good.any():
            ahead = scores[rows][~good] >= scores[rows][good].max()
            found.append(1 / (1 + ahead.sum()))
        else:
            found.append(0.0)
    return float(np.mean(found))


def mean_ndcg(scores: Numbers, gains: Numbers, groups: Sequence[Any]) -> float:
    """Mean over groups of the normalised discounted cumulative gain (Järvelin, Kekäläinen 2002).

    Candidates of equal score share the mean of their discounts.  Groups whose candidates all have
    gain 0 are left out; 0 if all groups are.
    """
    found = []
    for rows in _by_group(groups):
        discounts = 1 / np.log2(np.arange(len(rows)) + 2)
        ideal = float(np.sort(gains[rows])[::-1] @ discounts)
        if ideal > 0:
            order = np.argsort(-scores[rows], kind="stable")
            ties = np.unique(-scores[rows][order], return_inverse=True)[1]
            shared = np.bincount(ties, discounts) / np.bincount(ties)
            found.append(float(gains[rows][order] @ shared[ties]) / ideal)
    return float(np.mean(found)) if found else 0.0


def multi_label(logits: Floats, labels: Floats) -> dict[str, float]:
    """Micro-F1, macro-F1, subset accuracy, mean average precision and mean binary cross-entropy.

    Labels are 0/1 [n, classes]; a class is predicted above a probability of 0.5.  The mean of
    average precisions is over the classes that occur.
    """
    from sklearn.metrics import average_precision_score

    labels = labels.astype(np.float64)
    predicted, truth = logits > 0, labels > 0.5
    occurs = truth.any(axis=0)
    counts = np.stack([part.sum(axis=0) for part in (predicted & truth, predicted, truth)])
    return {
        "micro_f1": _averaged(counts, micro=True)[2],
        "macro_f1": _averaged(counts, micro=False)[2],
        "subset_accuracy": float((predicted == truth).all(axis=1).mean()),
        "map": float(average_precision_score(truth[:, occurs], logits[:, occurs], average="macro"))
        if occurs.any()
        else 0.0,
        "loss": float(np.mean(np.logaddexp(0, logits) - labels * logits)),
    }


def regression(predictions: Floats, values: Floats) -> dict[str, float]:
    """Spearman, Pearson, mean squared and mean absolute error; both arguments are [n].

    A correlation that is undefined, because one side is constant, is 0.
    """
    from scipy.stats import pearsonr, spearmanr

    predictions, values = predictions.astype(np.float64), values.astype(np.float64)
    errors = predictions - values
    # Below the rounding of their size, differences are noise and scipy warns.
    spread = min(np.ptp(v) / max(np.abs(v).max(), 1e-30) for v in (predictions, values))
    varied = len(values) > 1 and spread > 1e-9
    return {
        "spearman": float(spearmanr(predictions, values).statistic) if varied else 0.0,
        "pearson": float(pearsonr(predictions, values).statistic) if varied else 0.0,
        "mse": float(np.mean(errors**2)),
        "mae": float(np.mean(np.abs(errors))),
    }


def entities(
    truth: list[list[str]], predicted: list[list[str]], names: Collection[str]
) -> dict[str, float]:
    """Entity F1, precision and recall (seqeval, as conlleval counts) and accuracy per word.

    Args:
        names: of all tags there are; they decide how the rows are read, see `with_prefixes`.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    words = [
        pair
        for row, guess in zip(truth, predicted, strict=True)
        for pair in zip(row, guess, strict=True)
    ]
    truth, predicted = with_prefixes(truth, names), with_prefixes(predicted, names)
    return {
        "f1": float(f1_score(truth, predicted, zero_division=0)),
        "precision": float(precision_score(truth, predicted, zero_division=0)),
        "recall": float(recall_score(truth, predicted, zero_division=0)),
        "accuracy": sum(t == p for t, p in words) / max(len(words), 1),
    }


CJK_OR_WORD = re.compile(f"[{CJK}]|[^{CJK}\\s]+")


def answer_words(text: str) -> list[str]:
    """Words of a normalised answer; in CJK scripts its characters."""
    return CJK_OR_WORD.findall(normalize_answer(text))


def answer_f1(predicted: str, truth: str) -> float:
    """Harmonic mean of precision and recall over shared words (characters for CJK)."""
    guess, words = answer_words(predicted), answer_words(truth)
    if not guess or not words:
        return float(guess == words)
    shared = sum((Counter(guess) & Counter(words)).values())
    return 2 * shared / (len(guess) + len(words))


def question_answering(predicted: list[str], truths: list[list[str]]) -> dict[str, float]:
    """F1 and exact match against the best of each question's answers; [""] if it has none.

    Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016.
    """
    f1 = [
        max(answer_f1(guess, truth) for truth in answers)
        for guess, answers in zip(predicted, truths, strict=True)
    ]
    exact = [
        any(normalize_answer(guess) == normalize_answer(truth) for truth in answers)
        for guess, answers in zip(predicted, truths, strict=True)
    ]
    return {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}


def _by_group(groups: Sequence[Any]) -> list[Integers]:
    """Row numbers of each group."""
    rows: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [np.array(numbers) for numbers in rows.values()]
