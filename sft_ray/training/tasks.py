"""The table of tasks: what a task reads, which loss it trains and which metrics judge it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from sft_ray.training import metrics
from sft_ray.training.metrics import Metric

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Task:
    """One kind of supervised fine-tuning.

    Attributes:
        auto_model: name of the `transformers` auto class that carries the head.
        loss: logits [n, classes] and labels [n] to one loss per example [n].
        metrics: name -> function of logits [n, classes] and labels [n] as arrays and the
            direction that is better; the first is the default objective.
    """

    name: str
    auto_model: str
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    metrics: dict[str, tuple[Metric, Direction]]

    @property
    def default_objective(self) -> str:
        return next(iter(self.metrics))

    def direction(self, objective: str) -> Direction:
        return self.metrics[objective][1]

    def sign(self, objective: str) -> int:
        """1 where a larger value is better, else -1."""
        return 1 if self.direction(objective) == "maximize" else -1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each example's label, [n]."""
    return F.cross_entropy(logits, labels, reduction="none")


TASKS = {
    "text-classification": Task(
        name="text-classification",
        auto_model="AutoModelForSequenceClassification",
        loss=cross_entropy,
        metrics={
            "accuracy": (metrics.accuracy, "maximize"),
            "macro_f1": (metrics.macro_f1, "maximize"),
            "mcc": (metrics.mcc, "maximize"),
            "loss": (metrics.log_loss, "minimize"),
        },
    )
}
