"""What one trial asks of a GPU that it has to itself: how long its kernels run, what it holds."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft_ray.config import Experiment, Train
from sft_ray.search.sharing import WARMUP_STEPS, WINDOW_STEPS, Findings
from sft_ray.training import batches
from sft_ray.training.examples import Examples
from sft_ray.training.fitting import Trial
from sft_ray.training.forward import evaluate
from sft_ray.training.world import World


def probe(
    tree: dict[str, Any],
    dataset_folder: str,
    train: dict[str, Any],
    objective: str,
    device: str = "cuda",
) -> Findings:
    """Train one configuration for some steps, and evaluate the longest examples once.

    The output of frozen layers is computed, not read from the cache: trials that read it are
    lighter.

    Args:
        tree: of the experiment.
        dataset_folder: of the driver; the data is encoded again where that is not there.

    Raises:
        SftError: model or data cannot be loaded.
        NothingFitsError: not one example fits into the GPU's memory.
    """
    from sft_ray.search.worker import load_here  # brings Ray

    warnings.simplefilter("ignore")
    experiment, world = Experiment.model_validate(tree), World(device=torch.device(device))
    setup = replace(load_here(experiment, Path(dataset_folder), world), trunk_cache=None)
    trial = Trial(Train.model_validate(train), setup, objective, experiment.seed)
    steps = trial.batches_from(0)
    for indices in itertools.islice(steps, WARMUP_STEPS):
        trial.take_step(indices)
    window = list(itertools.islice(steps, WINDOW_STEPS))

    def train_window() -> None:
        for indices in window:
            trial.take_step(indices)
        world.synchronize()

    train_window()  # new shapes are compiled or recorded first, if the trial does so
    # By the clock first: the profiler slows what the CPU does, and not what the GPU does.
    began = time.perf_counter()
    train_window()
    wall_seconds = time.perf_counter() - began
    busy_seconds = kernel_seconds(train_window)
    longest = _longest(setup.dataset.validation)
    evaluate(setup.pretrained.model, setup.task, longest, trial.pad_token, world, trial.dtype)
    return Findings(busy_seconds / wall_seconds, *memory_bytes(world.device))


def _longest(examples: Examples) -> Examples:
    """Those that go through the model together last in an evaluation."""
    most = batches.EVAL_TOKENS_PER_BATCH["cuda"]
    *_, last = batches.evaluation_shares(examples.lengths, 0, 1, most)
    return examples.chosen(np.isin(np.arange(len(examples)), last))


def kernel_seconds(work: Callable[[], None]) -> float:
    """Time that kernels and copies took on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
    return device_seconds(profiler.events())


def device_seconds(events: Iterable[Any]) -> float:
    """Sum over a profile's events on the GPU; what only marks a stretch of them is left out."""
    return sum(
        event.self_device_time_total / 1e6
        for event in events
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def memory_bytes(device: torch.device) -> tuple[int, int, int]:
    """Most that this process has reserved, what else lies on the GPU, and all of its memory."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_reserved(device), others, total
