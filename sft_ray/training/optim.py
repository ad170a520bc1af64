"""Optimiser and learning-rate schedule of one trial."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from sft_ray.config import Train
from sft_ray.training.regularize import is_penalized


def build_optimizer(train: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused; decay on matrices only."""
    regularization = train.regularization
    decay = regularization.strength if regularization.kind == "weight_decay" else 0.0
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if is_penalized(p)], "weight_decay": decay},
        {"params": [p for p in parameters if not is_penalized(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)


def build_schedule(train: Train, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """Warm-up over a fraction of all steps, then the named decay to the last step."""
    return get_scheduler(
        "constant_with_warmup" if train.schedule == "constant" else train.schedule,
        optimizer,
        num_warmup_steps=round(train.warmup * num_steps),
        num_training_steps=num_steps,
    )
