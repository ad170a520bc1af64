"""Dropout on CPUs, where torch draws a random number for every element, one after the other.

Four elements share 64 random bits here, and dropout takes a third of the time.  A probability is
rounded to a multiple of 2^-16, and what is kept is scaled by just that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LEVELS = 2**16  # that 16 random bits have
PER_DRAW = 4


def is_ours(x: torch.Tensor, probability: float) -> bool:
    """Whether the functions here are for such a tensor."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and 0 < _level(probability) < LEVELS


def scale(probability: float) -> float:
    """What is kept is multiplied by it, so that sums stay as they are on average."""
    return LEVELS / (LEVELS - _level(probability))


def dropped(shape: Sequence[int], probability: float) -> torch.Tensor:
    """True where an element is dropped, by torch's own generator."""
    count = math.prod(shape)
    draws = torch.empty(-(-count // PER_DRAW), dtype=torch.int64)
    draws.random_(torch.iinfo(torch.int64).min, None)
    levels = draws.view(torch.int16)[:count].view(*shape)
    return levels < _level(probability) - LEVELS // 2


def hasten_dropout(model: nn.Module) -> None:
    """Let every `nn.Dropout` of a model draw as `dropped` does, whatever its probability."""
    modules: list[Any] = [module for module in model.modules() if type(module) is nn.Dropout]
    for module in modules:
        module.forward = _Dropout(module)


class _Dropout:
    def __init__(self, module: nn.Dropout) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        probability = self._module.p
        if not self._module.training or not is_ours(x, probability):
            return F.dropout(x, probability, self._module.training)
        return (x * scale(probability)).masked_fill_(dropped(x.shape, probability), 0)


def _level(probability: float) -> int:
    return round(probability * LEVELS)
