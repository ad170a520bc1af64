"""Fine-tuning in pure torch and transformers; usable without Ray."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft_ray.training.data import open_dataset, prepare
    from sft_ray.training.fitting import fit
    from sft_ray.training.forward import evaluate
    from sft_ray.training.progress import Progress
    from sft_ray.training.setup import Setup, load_setup
    from sft_ray.training.tasks import TASKS, find_task
    from sft_ray.training.world import World

__all__ = [
    "TASKS",
    "Progress",
    "Setup",
    "World",
    "evaluate",
    "find_task",
    "fit",
    "load_setup",
    "open_dataset",
    "prepare",
]
_HOMES = {
    "TASKS": "tasks",
    "Progress": "progress",
    "Setup": "setup",
    "World": "world",
    "evaluate": "forward",
    "find_task": "tasks",
    "fit": "fitting",
    "load_setup": "setup",
    "open_dataset": "data",
    "prepare": "data",
}


def __getattr__(name: str) -> object:
    """Import on first use: a search's driver trains nothing, and models take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
