"""Whether a trial can learn anything: gradients that are numbers, and a loss below a constant's."""

from __future__ import annotations

import math

import numpy as np
import torch

from sft_ray.training.examples import IGNORED, Dataset
from sft_ray.training.losses import LossOptions, span_cross_entropy
from sft_ray.training.tasks import Task
from sft_ray.training.world import World

ASKED_AT_PERCENT = 33
WINDOW = 0.1  # of all steps, up to the one at which it is asked
STEPS_PER_LOOK = 16  # at the gradients of a GPU
FEWEST_STEPS = 5  # a mean over fewer batches says more about the batches


def constant_loss(task: Task, dataset: Dataset, options: LossOptions) -> float | None:
    """Smallest mean training loss of an output that ignores its input; None if a task has none.

    Label smoothing and class weights move the best constant away from the labels' shares, so it
    is minimised from there.
    """
    train = dataset.train
    if task.loss is span_cross_entropy:  # the same for every token of a window is uniform over it
        return float(np.log(train.lengths).mean())
    shares = task.constant(train, dataset.label_set)
    if shares is None:
        return None
    # Rows with the same label have the same loss, and that of probabilities or 0/1 is linear in
    # them: what is asked is one row per label, or the mean one.
    if train.labels.ndim == 2:
        found, counts = train.labels.mean(axis=0, keepdims=True), np.ones(1, dtype=np.intp)
    else:
        labelled = train.labels != IGNORED if task.per_token else slice(None)
        found, counts = np.unique(train.labels[labelled], return_counts=True)
    labels, weights = torch.tensor(found), torch.tensor(counts / counts.sum())
    constant = torch.tensor(shares, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(len(labels), 1, dtype=torch.bool)

    def mean_loss() -> torch.Tensor:
        logits = constant.expand(len(labels), -1)
        if task.per_token:  # one token per item
            return task.loss(logits[:, None], labels[:, None], mask, options) @ weights
        return task.loss(logits, labels, mask, options) @ weights

    def closure() -> float:
        constant.grad = None
        loss = mean_loss()
        loss.backward()
        return float(loss.detach())

    torch.optim.LBFGS([constant], line_search_fn="strong_wolfe").step(closure)
    with torch.no_grad():
        return float(mean_loss())


class GradientWatch:
    """The first step whose gradient is not finite.

    To ask a GPU is to wait until it has done all that it was given.  So it goes on, and is asked
    now and then: a trial that such a gradient went into ends all the same.

    Args:
        waits: whether to ask at every step.
    """

    def __init__(self, device: torch.device, waits: bool) -> None:
        self.waits = waits
        self._never = torch.full((), torch.iinfo(torch.int64).max, device=device)
        self._first_bad = self._never

    def see(self, step: int, norm: torch.Tensor) -> int | None:
        """Take in the norm of a step's gradient; the first step that is known to be at fault."""
        if self.waits:
            return None if math.isfinite(norm) else step
        bad = torch.where(norm.isfinite(), self._never, step)
        self._first_bad = torch.minimum(self._first_bad, bad)
        return self.look() if step % STEPS_PER_LOOK == 0 else None

    def look(self) -> int | None:
        """The first step that was at fault."""
        if self.waits or self._first_bad == self._never:
            return None
        return int(self._first_bad)


class DivergenceWatch:
    """The mean training loss of the last tenth of the steps, looked at once.

    Short schedules, whose tenth is a handful of noisy batches, are not judged.

    Args:
        limit: the loss that a trial that learns something stays below.
        num_steps: of the whole schedule.
    """

    def __init__(self, limit: float | None, num_steps: int, world: World) -> None:
        self.limit, self.world = limit, world
        self.last_step = round(num_steps * ASKED_AT_PERCENT / 100)
        self.first_step = self.last_step - round(num_steps * WINDOW) + 1
        self.is_on = limit is not None and self.last_step - self.first_step + 1 >= FEWEST_STEPS
        self.count = 0
        self.sum = torch.zeros((), dtype=torch.float64, device=world.device)

    def see(self, step: int, loss: torch.Tensor, count: int) -> str | None:
        """Take in this rank's share of a step's loss; what is wrong, the same on all ranks."""
        if not self.is_on or not self.first_step <= step <= self.last_step:
            return None
        self.sum += loss
        self.count += count
        if step < self.last_step:
            return None
        mean = float(self.world.sum(self.sum.clone())) / max(self.count, 1)
        assert self.limit is not None  # it is on
        if mean < self.limit:
            return None
        return (
            f"diverged: training loss {mean:.3f} at {ASKED_AT_PERCENT} % is not below "
            f"{self.limit:.3f}, that of always answering the same"
        )

    def gather(self) -> None:
        """Let rank 0 hold the sum of all, so that its state is the state."""
        total = self.world.sum(self.sum)
        if self.world.rank > 0:
            total.zero_()

    def state_of_all(self) -> dict[str, float]:
        """The state as rank 0 would have it behind `gather`, which changes nothing."""
        return {"sum": float(self.world.sum(self.sum.clone())), "count": self.count}

    def state(self) -> dict[str, float]:
        """Of rank 0, right behind `gather`."""
        return {"sum": float(self.sum), "count": self.count}

    def restore(self, state: dict[str, float]) -> None:
        """Take up a state."""
        self.sum.fill_(state["sum"] if self.world.rank == 0 else 0.0)
        self.count = int(state["count"])
