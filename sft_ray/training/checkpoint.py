"""A trained model as a Hugging Face folder: safetensors, tokenizer, label names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sft_ray.training.model import Pretrained


def save_model(
    folder: Path, pretrained: Pretrained, trained: dict[str, torch.Tensor], tokenizer: Any
) -> None:
    """Write the whole model with `trained` weights; `from_pretrained(folder)` reads it back."""
    state = pretrained.full_state(trained)
    pretrained.model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
