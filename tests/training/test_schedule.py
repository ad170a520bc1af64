"""Marks, learning rates and optimiser groups."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from sft_ray.config import Regularization, Train
from sft_ray.training.examples import Dataset
from sft_ray.training.optim import build_optimizer, build_schedule
from sft_ray.training.progress import Mark, schedule_marks
from tests.models import load_tiny

RUNGS = [10, 33]


def as_pairs(marks: list[Mark]) -> list[tuple[int, int]]:
    return [(mark.percent, mark.step) for mark in marks]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [(10, 10), (33, 33), (100, 100)]),
        (2, [(10, 20), (33, 66), (50, 100), (100, 200)]),
        (3, [(10, 30), (33, 100), (67, 200), (100, 300)]),
        (10, sorted([*((10 * e, 100 * e) for e in range(1, 11)), (33, 330)])),
    ],
)
def test_marks_are_rungs_and_epoch_ends(epochs: int, expected: list[tuple[int, int]]) -> None:
    assert as_pairs(schedule_marks(RUNGS, epochs, steps_per_epoch=100)) == expected


def test_an_epoch_end_within_1_of_a_rung_is_that_rung_at_the_epoch_end() -> None:
    assert as_pairs(schedule_marks([34], 3, 100)) == [(34, 100), (67, 200), (100, 300)]
    assert as_pairs(schedule_marks([35], 3, 100)) == [(33, 100), (35, 105), (67, 200), (100, 300)]


def test_the_end_is_never_merged_into_a_rung() -> None:
    assert as_pairs(schedule_marks([99], 1, 100)) == [(99, 99), (100, 100)]


def test_a_rung_that_falls_on_step_0_is_the_first_step() -> None:
    assert as_pairs(schedule_marks(RUNGS, 1, 1)) == [(10, 1), (33, 1), (100, 1)]
    assert as_pairs(schedule_marks(RUNGS, 1, 3)) == [(10, 1), (33, 1), (100, 3)]


def test_without_rungs_every_epoch_end_is_a_mark() -> None:
    assert as_pairs(schedule_marks([], 4, 5)) == [(25, 5), (50, 10), (75, 15), (100, 20)]


@pytest.mark.parametrize("rungs", [[], [1], [10, 33], [32, 33, 34], [49, 50, 51], [1, 50, 99]])
def test_every_mark_is_reached_in_order_and_the_last_is_the_end(rungs: list[int]) -> None:
    for epochs, steps_per_epoch in itertools.product(range(1, 130), (1, 2, 3, 7, 10, 313)):
        marks = schedule_marks(rungs, epochs, steps_per_epoch)
        percents = [mark.percent for mark in marks]
        steps = [mark.step for mark in marks]
        assert percents == sorted(set(percents))
        assert steps == sorted(steps)
        assert steps[0] >= 1
        assert as_pairs(marks)[-1] == (100, epochs * steps_per_epoch)
        assert set(rungs) <= set(percents)


def rates(train: Train, num_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], lr=train.learning_rate)
    set_rates = build_schedule(train, optimizer, num_steps)
    found = []
    for step in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        set_rates(step + 1)
    return found


def follow(optimizer: torch.optim.Optimizer, schedule, num_steps: int) -> list[float]:
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.25])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_transformers(name: str, warmup: float) -> None:
    num_steps, peak = 40, 3e-4
    theirs = torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], lr=peak)
    steps = round(warmup * num_steps)
    schedule = {
        "linear": lambda: get_linear_schedule_with_warmup(theirs, steps, num_steps),
        "cosine": lambda: get_cosine_schedule_with_warmup(theirs, steps, num_steps),
        "constant": lambda: get_constant_schedule_with_warmup(theirs, steps),
    }[name]()
    train = Train(schedule=name, warmup=warmup, learning_rate=peak)
    assert rates(train, num_steps) == pytest.approx(follow(theirs, schedule, num_steps), abs=0)


def test_linear_rises_over_the_warmup_and_falls_to_zero_after_the_last_step() -> None:
    found = rates(Train(schedule="linear", warmup=0.2, learning_rate=1e-3), 20)
    up = [1e-3 * step / 4 for step in range(4)]
    down = [1e-3 * (20 - step) / 16 for step in range(4, 20)]
    assert found == pytest.approx(up + down)


def decayed_names(tiny_bert: Path, toy: Dataset, train: Train, k: int = 0) -> dict[str, float]:
    pretrained = load_tiny(tiny_bert, toy)
    pretrained.reset(k)
    named = pretrained.trainable()
    name_of = {id(parameter): name for name, parameter in named.items()}
    optimizer = build_optimizer(train, pretrained)
    decay = {
        name_of[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == named.keys()
    return decay


@pytest.mark.parametrize("k", [0, 1, 2])
def test_weight_decay_is_on_matrices_and_not_on_biases_or_normalisation(tiny_bert, toy, k) -> None:
    train = Train(regularization=Regularization(kind="weight_decay", strength=0.2))
    decay = decayed_names(tiny_bert, toy, train, k)
    spared = {name for name in decay if name.endswith("bias") or "LayerNorm" in name}
    assert spared
    assert {name for name, value in decay.items() if value == 0} == spared
    assert {value for name, value in decay.items() if name not in spared} == {0.2}


@pytest.mark.parametrize("kind", ["none", "l1", "l2", "l2_sp"])
def test_other_kinds_of_regularization_decay_nothing(tiny_bert, toy, kind: str) -> None:
    strength = None if kind == "none" else 0.2
    train = Train(regularization=Regularization(kind=kind, strength=strength))
    assert set(decayed_names(tiny_bert, toy, train).values()) == {0.0}
