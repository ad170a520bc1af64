"""What is loaded once and serves many trials: data, pretrained model, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sft_ray.config import Experiment
from sft_ray.training.cpu_memory import suit_training
from sft_ray.training.data import load_tokenizer, open_dataset
from sft_ray.training.examples import Dataset
from sft_ray.training.families import reads_segments
from sft_ray.training.micro_batch import Probe
from sft_ray.training.model import Pretrained, load_pretrained
from sft_ray.training.model_facts import resolve_model
from sft_ray.training.tasks import Task, find_task
from sft_ray.training.trunk_cache import TrunkCache
from sft_ray.training.world import World


@dataclass(frozen=True)
class Setup:
    """One worker's share of an experiment, ready for any number of trials.

    Attributes:
        micro_batches: what the probe found for (frozen layers, longest text, number format,
            compiled, recorded, with dropout, with smoothed labels, with class weights; on a GPU
            also batch size, states of the optimiser, most to try).  All that decides what a pass
            keeps, so that it does not matter which trial came first.
        constant_losses: label smoothing and class weights -> loss of the best constant answer.
        trunk_cache: outputs of frozen trunks; None computes them each time.
    """

    task: Task
    dataset: Dataset
    pretrained: Pretrained
    tokenizer: Any
    world: World
    micro_batches: dict[tuple[int | str | bool | None, ...], Probe] = field(default_factory=dict)
    constant_losses: dict[str, float | None] = field(default_factory=dict)
    trunk_cache: TrunkCache | None = None

    def on(self, dataset: Dataset) -> Setup:
        """The same for other rows, of which nothing is known yet."""
        if dataset is self.dataset:
            return self
        return replace(self, dataset=dataset, constant_losses={})


def load_setup(
    experiment: Experiment, dataset_folder: Path, world: World, *, others_per_depth: float = 0.0
) -> Setup:
    """Load what `training.data.prepare` wrote, and the experiment's model onto the device.

    Args:
        others_per_depth: trials, beside one, that freeze a given number of layers, roughly.

    Raises:
        SftError: model or tokenizer cannot be loaded.
    """
    suit_training()
    task, dataset = find_task(experiment.task), open_dataset(dataset_folder)
    model_folder = resolve_model(experiment.model)
    tokenizer = load_tokenizer(model_folder, experiment.revision)
    pretrained = load_pretrained(
        model_folder,
        task,
        dataset.label_set,
        seed=experiment.seed,
        device=world.device,
        # The tokenizer pads with what the model's configuration may not call padding.
        used_tokens=np.union1d(dataset.used_tokens, [tokenizer.pad_token_id]),
        revision=experiment.revision,
    )
    if not reads_segments(pretrained.model):
        parts = {s: replace(getattr(dataset, s), segments=None) for s in ("train", "validation")}
        dataset = replace(dataset, **parts)
    asked = experiment.search.trunk_depths
    depths = [pretrained.num_layers if depth == "all" else depth for depth in asked]
    trunk_cache = TrunkCache(
        pretrained,
        dataset,
        world,
        tokenizer.pad_token_id,
        budget_bytes=experiment.resources.trunk_cache_bytes,
        others_per_depth=others_per_depth,
        depths=tuple(depths),
    )
    return Setup(task, dataset, pretrained, tokenizer, world, trunk_cache=trunk_cache)
