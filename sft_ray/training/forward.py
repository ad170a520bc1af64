"""From examples to losses and outputs: what a model is asked, for training and for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from sft_ray.config import Train
from sft_ray.training import batches
from sft_ray.training.batches import Batch, Trunk
from sft_ray.training.beat import EVALUATION, Beat, no_beat
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import IGNORED, Examples
from sft_ray.training.losses import LossOptions
from sft_ray.training.metrics import Floats
from sft_ray.training.micro_batch import in_parts
from sft_ray.training.passes import passing
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import Task
from sft_ray.training.unpadded import to_device
from sft_ray.training.world import World


def loss_options(train: Train, setup: Setup) -> LossOptions:
    """Label smoothing and class weights; `balanced` weighs a class by 1 / its training share.

    Balanced weights average 1 over the training labels, so the size of the loss stays.
    """
    names, chosen = setup.dataset.label_names, train.class_weights
    if chosen is None:
        return LossOptions(train.label_smoothing)
    if chosen == "balanced":
        truth = setup.dataset.train.labels
        if truth.ndim == 2:
            counts = truth.sum(axis=0)
        else:
            counts = np.bincount(truth[truth != IGNORED], minlength=len(names)).astype(float)
        present = counts > 0  # smoothing and soft labels look at absent classes too
        weights = np.zeros(len(names))
        weights[present] = counts.sum() / counts[present] / present.sum()
    else:
        weights = np.array([chosen[name] for name in names])
    found = torch.tensor(weights, dtype=torch.float32, device=setup.world.device)
    return LossOptions(train.label_smoothing, found)


def model_outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [n, classes], or per token [n, length, classes]; start and end count as classes."""
    with passing(batch.one_pass):
        found = model(**batch.inputs)
    if "start_logits" in found:
        return torch.stack([found.start_logits, found.end_logits], dim=-1)
    return found.logits


def forward_loss(
    model: nn.Module, batch: Batch, task: Task, options: LossOptions, dtype: torch.dtype
) -> torch.Tensor:
    """Sum of the task's loss over the examples of one micro-batch."""
    autocast = torch.autocast(batch.labels.device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        logits = model_outputs(model, batch)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = batch.inputs["attention_mask"].bool()
    losses = task.loss(logits, batch.labels, mask, options)
    return (losses * batch.weights.to(logits.dtype)).sum()


class BrokenOffError(Exception):
    """An evaluation that gave way to a pause."""


@torch.no_grad()
def evaluate(
    model: Any,
    task: Task,
    examples: Examples,
    pad_token: int,
    world: World,
    dtype: torch.dtype = torch.float32,
    beat: Beat = no_beat,
    trunk: Trunk | None = None,
) -> Floats:
    """Outputs of every item or token in order, [n or total, classes], for any number of workers.

    Args:
        beat: called before every batch; one that does not fit into memory is halved.
        trunk: what the first layers make of the examples, if it is known.

    Raises:
        BrokenOffError: on all workers, if `beat` has asked one of them for a pause.
    """
    model.eval()
    rows = len(examples.tokens) if task.per_token else len(examples)
    weight_dtype = next(model.parameters()).dtype
    outputs = torch.zeros((rows, model.config.num_labels), dtype=weight_dtype, device=world.device)

    def put(indices: IntArray) -> None:
        batch = batches.collate(
            examples,
            indices,
            pad_token=pad_token,
            device=world.device,
            with_labels=False,
            trunk=trunk,
        )
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            found = model_outputs(model, batch)
        places = indices
        if task.per_token:
            found = found.flatten(0, 1)[batch.one_pass.layout.places]
            places = batches.token_positions(examples, indices)
        outputs[to_device(places, world.device)] = found.to(weight_dtype)

    most, is_asked = batches.EVAL_TOKENS_PER_BATCH[world.device.type], False
    for indices in batches.evaluation_shares(examples.lengths, world.rank, world.size, most):
        if is_asked := beat(EVALUATION):
            break
        in_parts(put, indices)
    if world.minimum(0 if is_asked else 1) == 0:
        raise BrokenOffError
    gathered: Floats = np.asarray(world.sum(outputs).cpu().numpy())
    return gathered
