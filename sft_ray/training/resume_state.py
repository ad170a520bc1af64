"""The state a trial can be taken up from, and its two files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sft_ray.errors import DataError

TENSORS, FACTS = "state.safetensors", "state.json"


@dataclass(frozen=True)
class ResumeState:
    """Everything that a trial needs to go on as if it had not stopped.

    Attributes:
        tensors: trained weights, optimiser state, best weights and outputs, by prefixed name.
        facts: step, mark, seconds, scores: plain values.
    """

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name begins with `prefix`, without it."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def save_resume_state(folder: Path, state: ResumeState) -> None:
    """Write a state into an empty folder; safetensors and JSON, nothing that executes.

    The folder's own checksums tell whether both files belong together.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    safetensors.torch.save_file(tensors, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(state.facts), encoding="utf-8")


def load_resume_state(folder: Path) -> ResumeState:
    """Read what `save_resume_state` wrote.

    Raises:
        DataError: the folder is incomplete or damaged.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / TENSORS)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{folder}: the checkpoint cannot be read: {error}") from None
    return ResumeState(tensors, facts)
