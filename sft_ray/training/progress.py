"""Where a trial is evaluated, and what it tells there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sft_ray.training.metrics import Floats
from sft_ray.training.resume_state import ResumeState


@dataclass(frozen=True)
class Mark:
    """A point of a trial's own schedule at which it is evaluated and reported."""

    percent: int
    step: int


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        weights: the trained weights it was made with (CPU).
        outputs: of the whole validation split.
    """

    percent: int
    score: float
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor] = field(repr=False)
    outputs: Floats = field(repr=False)


@dataclass(frozen=True)
class Progress:
    """What is known at a mark.  Times and counts run from the start of the trial.

    Attributes:
        index: number of the mark, from 0.
        metrics: of the validation split; empty after a fault and on ranks above 0.
        best: of this trial, this mark included; None after a first-mark fault and on ranks
            above 0.
        train_loss: mean task loss since the previous mark, nats per example or labelled token.
        penalty: lambda R(theta) at this mark.
        dtype: number format of matrix products; a trial that is taken up on other hardware may go
            on in another one.
        micro_batch: most examples that one worker puts through the model at once.
        padding_share: of what this worker's layers computed in training (`Layout.positions`).
        trunks_read: which splits' outputs of frozen layers are read, train+validation or one of
            them, instead of computed at every step (none); None if no layer is frozen.
        trunk_seconds: making and opening the outputs of frozen layers (`TrunkCache`).
        trained_parameters: how many numbers are trained.
        memory_bytes: most that this worker's device has held so far (`Backward.memory_bytes`).
        fault: why the configuration cannot go on, if so.
        resume_state: a call that copies what the trial needs to go on from here; rank 0 only.
    """

    index: int = 0
    percent: int = 0
    step: int = 0
    num_steps: int = 0
    epochs_run: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    train_loss: float = 0.0
    penalty: float = 0.0
    examples_seen: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    trunk_seconds: float = 0.0
    dtype: str | None = None
    trunks_read: str | None = None
    micro_batch: int = 0
    padding_share: float = 0.0
    trained_parameters: int = 0
    memory_bytes: int = 0
    fault: str | None = None
    resume_state: Callable[[], ResumeState] | None = field(default=None, compare=False, repr=False)

    @property
    def finished(self) -> bool:
        return self.percent == 100 and self.fault is None

    def facts(self) -> dict[str, Any]:
        """Every field that is a plain value."""
        skipped = ("best", "resume_state")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}

    def message(self, saved_percent: int | None, restarts: int = 0) -> dict[str, Any]:
        """What is known at this mark as plain values that JSON can say.

        Args:
            saved_percent: mark whose weights lie in the run folder.
            restarts: of the trial so far.
        """
        # After a fault the last loss and penalty need not be finite.
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self.facts().items()
        }
        best = self.best
        return {
            **plain,
            "finished": self.finished,
            "score": None if best is None else best.score,
            "score_percent": None if best is None else best.percent,
            "best_metrics": {} if best is None else best.metrics,
            "has_checkpoint": best is not None and best.percent == saved_percent,
            "restarts": restarts,
        }


Report = Callable[[Progress], bool]


def schedule_marks(rungs: list[int], epochs: int, steps_per_epoch: int) -> list[Mark]:
    """The sorted unique percents of rungs and epoch ends of a schedule.

    An epoch end within 1 of a rung is that rung; a rung that falls on step 0 is the first step.
    """
    num_steps = epochs * steps_per_epoch
    step_at = {rung: max(1, round(rung * num_steps / 100)) for rung in rungs}
    for epoch in range(1, epochs + 1):
        exact = 100 * epoch / epochs
        near = [rung for rung in rungs if abs(exact - rung) <= 1]
        if not near or epoch == epochs:
            step_at[round(exact)] = epoch * steps_per_epoch
    for rung in rungs:  # the nearest of several epoch ends
        epoch = round(rung * epochs / 100)
        if 1 <= epoch < epochs and abs(100 * epoch / epochs - rung) <= 1:
            step_at[rung] = epoch * steps_per_epoch
    return [Mark(percent, step_at[percent]) for percent in sorted(step_at)]
