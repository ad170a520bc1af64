"""Metrics: arrays in, floats out.  `logits` are [n, classes], `labels` are [n]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]
Metric = Callable[[Logits, Labels], float]


def accuracy(logits: Logits, labels: Labels) -> float:
    """Share of examples whose largest logit is the label's."""
    return float((logits.argmax(axis=1) == labels).mean())


def macro_f1(logits: Logits, labels: Labels) -> float:
    """Unweighted mean of the F1 of every class that occurs in labels or predictions."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, logits.argmax(axis=1), average="macro", zero_division=0))


def mcc(logits: Logits, labels: Labels) -> float:
    """Matthews correlation coefficient; 0 is chance, whatever the class balance."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(axis=1)))


def log_loss(logits: Logits, labels: Labels) -> float:
    """Mean cross-entropy in nats."""
    from scipy.special import log_softmax

    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def score(metrics: Mapping[str, Metric], logits: Logits, labels: Labels) -> dict[str, float]:
    """Every metric of a table by name."""
    return {name: metric(logits, labels) for name, metric in metrics.items()}
