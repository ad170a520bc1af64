"""Fine-tuning in pure torch and transformers; usable without Ray.

`fit` is the function, whatever was imported before: importing the module of that name would
otherwise hide it.
"""

from sft_ray.training.data import open_dataset, prepare
from sft_ray.training.fit import Progress, fit
from sft_ray.training.forward import evaluate
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
