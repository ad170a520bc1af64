"""Optimiser and learning-rate schedule of one trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import get_scheduler

from sft_ray.config import Train
from sft_ray.training.model import Pretrained
from sft_ray.training.regularize import is_penalized

SCHEDULES = {"constant": "constant_with_warmup", "constant_with_cooldown": "warmup_stable_decay"}


def build_optimizer(train: Train, pretrained: Pretrained) -> torch.optim.Optimizer:
    """The optimiser over what is trained, one group per learning rate and decay.

    Weight decay is decoupled for every optimiser (Loshchilov and Hutter 2019) and acts on matrices
    only, so `adam` with weight decay is `adamw`.  A layer's learning rate shrinks by `layer_decay`
    for every layer above it, head and pooler at the full rate (Howard and Ruder 2018; the exponents
    of BEiT, Bao et al. 2022); the head's is multiplied by its own factor.
    """
    regularization = train.regularization
    strength = regularization.strength if regularization.kind == "weight_decay" else 0.0
    depths, head = pretrained.depths(), pretrained.head()
    top = max(depths.values())
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in pretrained.trainable().items():
        rate = train.learning_rate * train.layer_decay ** (top - depths[name])
        if name in head:
            rate *= train.head_learning_rate_multiplier
        decay = strength if is_penalized(parameter) else 0.0
        groups.setdefault((rate, decay or 0.0), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=train.learning_rate, fused=True)
    if train.optimizer == "adam":
        return torch.optim.Adam(
            settings, lr=train.learning_rate, decoupled_weight_decay=True, fused=True
        )
    decays = [setting.pop("weight_decay") for setting in settings]  # SGD's own is not decoupled
    optimizer = torch.optim.SGD(
        settings, lr=train.learning_rate, momentum=train.momentum, foreach=True
    )
    optimizer.register_step_pre_hook(lambda *_: _decay(optimizer, decays))
    return optimizer


def num_states(train: Train) -> int:
    """How many numbers the optimiser keeps for each that is trained."""
    if train.optimizer in ("adamw", "adam"):
        return 2
    return 1 if train.momentum else 0


def clip_gradients(trained: Sequence[torch.nn.Parameter], norm: torch.Tensor, most: float) -> None:
    """Shorten gradients of this norm to `most`, if they are longer."""
    # A GPU is not asked whether they are: it would have to be waited for.
    if norm.device.type != "cpu" or norm > most:
        torch.nn.utils.clip_grads_with_norm_(trained, most, norm)


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, decays: list[float]) -> None:
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if decay:
            torch._foreach_mul_(group["params"], 1 - group["lr"] * decay)


def build_schedule(
    train: Train, optimizer: torch.optim.Optimizer, num_steps: int
) -> Callable[[int], None]:
    """A call that sets every group's learning rate after so many steps.

    Warm-up over a fraction of all steps, then the named decay to the last step.  The cooldown of
    `constant_with_cooldown` is linear (Hägele et al., "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations", 2024).  Rates follow from the step alone, so that a trial can
    be taken up at any.
    """
    specific: dict[str, Any] = {}
    if train.schedule == "constant_with_cooldown":
        specific = {
            "num_decay_steps": round(train.cooldown * num_steps),
            "decay_type": "linear",
        }
    schedule = get_scheduler(
        SCHEDULES.get(train.schedule, train.schedule),
        optimizer,
        num_warmup_steps=round(train.warmup * num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=specific,
    )

    def set_rates(step: int) -> None:
        peaks, factors = schedule.base_lrs, schedule.lr_lambdas
        for group, peak, factor in zip(optimizer.param_groups, peaks, factors, strict=True):
            group["lr"] = peak * factor(step)

    return set_rates
