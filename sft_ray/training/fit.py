"""Fine-tune one configuration: the loop, its marks and the step.

Knows a `World` and a `report` callable and nothing of who runs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from sft_ray.config import Train
from sft_ray.training import batches, metrics
from sft_ray.training.batches import Batch
from sft_ray.training.data import Dataset, Examples, IntArray
from sft_ray.training.model import Pretrained
from sft_ray.training.optim import build_optimizer, build_schedule
from sft_ray.training.regularize import bind_penalty
from sft_ray.training.seeds import derived_seed
from sft_ray.training.tasks import Task
from sft_ray.training.world import World, resolve_precision


@dataclass(frozen=True)
class Mark:
    """A point of a trial's own schedule at which it is evaluated and reported."""

    percent: int
    step: int


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; `weights` are the trained weights it was made with (CPU)."""

    percent: int
    score: float
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """What is known at a mark.  Times and counts run from the start of the trial.

    Attributes:
        index: number of the mark, from 0.
        metrics: of the validation split; empty after a fault and on ranks above 0.
        best: of this trial, this mark included; None after a first-mark fault and on ranks
            above 0.
        train_loss: mean task loss since the previous mark, nats per example.
        penalty: lambda R(theta) at this mark.
        fault: why the configuration cannot go on, if so.
    """

    index: int
    percent: int
    step: int
    num_steps: int
    epochs_run: float
    metrics: dict[str, float]
    best: Best | None
    train_loss: float
    penalty: float
    examples_seen: int
    train_seconds: float
    eval_seconds: float
    fault: str | None = None

    @property
    def finished(self) -> bool:
        return self.percent == 100 and self.fault is None


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


def fit(
    train: Train,
    *,
    pretrained: Pretrained,
    dataset: Dataset,
    task: Task,
    objective: str,
    rungs: list[int],
    pad_token: int,
    seed: int,
    world: World,
    report: Report,
) -> None:
    """Train `pretrained` from its pristine weights, reporting at every mark.

    `report` is called on every rank with the same mark and must answer the same on all of them:
    True goes on to the next mark, False ends the trial.  A fault of the configuration (a gradient
    or a prediction that is not finite) is reported once and ends the trial.
    """
    torch.manual_seed(derived_seed(seed, "dropout", world.rank))
    trial = _Trial(train, pretrained, dataset, task, objective, pad_token, world)
    marks = schedule_marks(rungs, train.epochs, trial.steps_per_epoch)
    lengths, size = dataset.train.lengths, train.batch_size
    next_mark = 0
    trial.clock.enter("train")
    for epoch in range(train.epochs):
        for indices in batches.global_batches(lengths, batch_size=size, seed=seed, epoch=epoch):
            fault = trial.take_step(indices)
            if fault is not None:
                mark = Mark(100 * trial.step // trial.num_steps, trial.step)
                report(trial.progress(next_mark, mark, fault))
                return
            while next_mark < len(marks) and marks[next_mark].step == trial.step:
                progress = trial.look(next_mark, marks[next_mark])
                if not report(progress) or progress.fault is not None:
                    return
                next_mark += 1
                trial.clock.enter("train")


class _Trial:
    """What one trial trains with, and what it has done so far."""

    def __init__(
        self,
        train: Train,
        pretrained: Pretrained,
        dataset: Dataset,
        task: Task,
        objective: str,
        pad_token: int,
        world: World,
    ) -> None:
        self.train, self.pretrained, self.dataset = train, pretrained, dataset
        self.task, self.objective, self.pad_token, self.world = task, objective, pad_token, world
        self.clock = _Clock(world)
        self.dtype, _ = resolve_precision(train.precision, world.device)
        pretrained.reset(train.frozen_layers)
        self.model = world.wrap(pretrained.model)
        self.trainable = list(pretrained.trainable().values())
        self.penalty = bind_penalty(train.regularization, pretrained)
        self.steps_per_epoch = batches.steps_per_epoch(len(dataset.train), train.batch_size)
        self.num_steps = self.steps_per_epoch * train.epochs
        self.optimizer = build_optimizer(train, self.trainable)
        self.schedule = build_schedule(train, self.optimizer, self.num_steps)
        self.step = self.examples_seen = 0
        self.best: Best | None = None
        self.last: Progress | None = None
        # Since the previous mark:
        self.examples = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)

    def take_step(self, indices: IntArray) -> str | None:
        """One optimiser step on a global batch; why the configuration cannot go on, or None."""
        world = self.world
        mine = batches.share(indices, world.rank, world.size)
        batch = batches.collate(
            self.dataset.train, mine, pad_token=self.pad_token, device=world.device
        )
        loss = forward_loss(self.model, batch, self.task, self.dtype)
        # Gradients are averaged over workers; the step wants the sum over the global batch
        # divided by its count.
        (loss * (world.size / len(indices))).backward()
        self.penalty.add_gradient()
        norm = nn.utils.clip_grad_norm_(self.trainable, self.train.max_grad_norm)
        self.step += 1
        # The norm is the same on every rank, so all of them stop here or none.
        if not math.isfinite(float(norm)):
            rate = self.optimizer.param_groups[0]["lr"]
            return f"gradient not finite at step {self.step}, learning rate {rate:.3g}"
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.loss_sum += loss.detach()
        self.examples += len(indices)
        self.examples_seen += len(indices)
        return None

    def look(self, index: int, mark: Mark) -> Progress:
        """Evaluate on the validation split; the metrics are computed on rank 0."""
        if self.examples == 0:  # a short schedule: the previous mark fell on this step too
            assert self.last is not None  # no mark comes before the first step
            return replace(self.last, index=index, percent=mark.percent)
        self.clock.enter("eval")
        validation, found = self.dataset.validation, {}
        logits = evaluate(self.pretrained, validation, self.pad_token, self.world, self.dtype)
        self.pretrained.train()
        # Every rank has the same logits, so all of them find a fault or none.
        if not np.isfinite(logits).all():
            return self.progress(index, mark, f"predictions not finite at step {self.step}")
        if self.world.rank == 0:
            table = {name: metric for name, (metric, _) in self.task.metrics.items()}
            found = metrics.score(table, logits, validation.labels)
            score = found[self.objective]
            sign = self.task.sign(self.objective)
            if self.best is None or sign * score > sign * self.best.score:
                trained = self.pretrained.trainable().items()
                weights = {name: p.detach().to("cpu", copy=True) for name, p in trained}
                self.best = Best(mark.percent, score, found, weights)
        return self.progress(index, mark, None, found)

    def progress(
        self, index: int, mark: Mark, fault: str | None, found: dict[str, float] | None = None
    ) -> Progress:
        """The report of a mark; what counts since the previous mark begins anew."""
        train_loss = float(self.world.sum(self.loss_sum)) / max(self.examples, 1)
        penalty = self.penalty.value()
        self.loss_sum, self.examples = torch.zeros_like(self.loss_sum), 0
        self.clock.enter("other")
        self.last = Progress(
            index=index,
            percent=mark.percent,
            step=self.step,
            num_steps=self.num_steps,
            epochs_run=self.step / self.steps_per_epoch,
            metrics=found or {},
            best=self.best,
            train_loss=train_loss,
            penalty=penalty,
            examples_seen=self.examples_seen,
            train_seconds=self.clock.seconds["train"],
            eval_seconds=self.clock.seconds["eval"],
            fault=fault,
        )
        return self.last


def forward_loss(model: nn.Module, batch: Batch, task: Task, dtype: torch.dtype) -> torch.Tensor:
    """Sum of the task's loss over the examples of one share."""
    autocast = torch.autocast(batch.labels.device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        logits = model(**batch.inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (task.loss(logits, batch.labels) * batch.weights.to(logits.dtype)).sum()


@torch.no_grad()
def evaluate(
    pretrained: Pretrained,
    examples: Examples,
    pad_token: int,
    world: World,
    dtype: torch.dtype = torch.float32,
) -> metrics.Logits:
    """Logits of every example in order, [n, classes], the same for any number of workers."""
    model = pretrained.model
    model.eval()
    shape = (len(examples), model.config.num_labels)
    weight_dtype = next(model.parameters()).dtype
    logits_NC = torch.zeros(shape, dtype=weight_dtype, device=world.device)
    for indices in batches.evaluation_shares(examples.lengths, world.rank, world.size):
        batch = batches.collate(examples, indices, pad_token=pad_token, device=world.device)
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(**batch.inputs).logits
        logits_NC[torch.from_numpy(indices).to(world.device)] = logits.to(weight_dtype)
    gathered: metrics.Logits = np.asarray(world.sum(logits_NC).cpu().numpy())
    return gathered


class _Clock:
    """Seconds spent per activity; entering one ends the other."""

    def __init__(self, world: World) -> None:
        self.seconds = {"train": 0.0, "eval": 0.0, "other": 0.0}
        self._world = world
        self._activity, self._since = "other", time.monotonic()

    def enter(self, activity: str) -> None:
        self._world.synchronize()
        now = time.monotonic()
        self.seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now
