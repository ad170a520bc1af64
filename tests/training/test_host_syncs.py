"""How often a step asks its device for a number, which on a GPU is to wait for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from sft_ray.config import Train
from sft_ray.training.divergence import STEPS_PER_LOOK, GradientWatch
from sft_ray.training.examples import Dataset
from sft_ray.training.fitting import Trial
from sft_ray.training.setup import Setup
from sft_ray.training.world import World
from tests.models import CPU, PAD, TASK, load_tiny

ANSWERS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


def questions(model: Path, data: Dataset, steps: int, *, waits: bool, **train: Any) -> int:
    setup = Setup(TASK, data, load_tiny(model, data), SimpleNamespace(pad_token_id=PAD), World())
    settings = {"precision": "fp32", "batch_size": 8, "epochs": 3, **train}
    trial = Trial(Train.model_validate(settings), setup, "accuracy", 17)
    trial.gradients = GradientWatch(CPU, waits=waits)
    trial.optimizer.step = lambda: None  # torch's own on a CPU reads how many steps it has taken
    batches = trial.batches_from(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            assert trial.take_step(next(batches)) is None
    return sum(event.count for event in profiler.key_averages() if event.key in ANSWERS)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"precision": "bf16"},
        {"micro_batch": 3},
        {"frozen_layers": 1},
        {"frozen_layers": "all"},
        {"optimizer": "sgd", "label_smoothing": 0.1, "class_weights": "balanced"},
        *({"regularization": {"kind": k, "strength": 1e-3}} for k in ("l1", "l2", "l2_sp")),
    ],
)
def test_a_step_asks_for_the_norm_of_its_gradient_alone(
    tiny_bert: Path, toy: Dataset, train: dict[str, Any]
) -> None:
    """On a CPU twice, whether it is finite and whether it is too long, where both are free."""
    assert questions(tiny_bert, toy, 4, waits=True, **train) == 2 * 4
    # As on a GPU, which is asked for the first bad step alone, and that now and then.
    steps = STEPS_PER_LOOK + 2
    assert questions(tiny_bert, toy, steps, waits=False, **train) == steps + 1
