"""Gradients of one trial's micro-batches: how many examples each has, and how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from sft_ray.config import Train
from sft_ray.training import batches, micro_batch
from sft_ray.training.batches import Batch, Trunk
from sft_ray.training.compiled import is_compiled
from sft_ray.training.cuda_graphs import is_recorded
from sft_ray.training.encoding import IntArray
from sft_ray.training.forward import forward_loss
from sft_ray.training.losses import LossOptions
from sft_ray.training.micro_batch import Probe
from sft_ray.training.optim import num_states
from sft_ray.training.setup import Setup


class Backward:
    """Forward and backward passes of a model that was reset for a trial.

    Args:
        halvings, most_examples: of the micro-batch, see `sft_ray.training.fitting.fit`.

    Attributes:
        most: examples of a micro-batch.
        compiles: whether layers are compiled.
        records: whether passes are recorded; gradients then stay where they are.
        model: gives the sum or mean over all workers behind its backward pass, see `World.wrap`.

    Raises:
        NothingFitsError: one example is too much for a worker's memory.
        StepOutOfMemoryError: later than at the probe.
    """

    def __init__(
        self,
        train: Train,
        setup: Setup,
        dtype: torch.dtype,
        options: LossOptions,
        halvings: int = 0,
        most_examples: int | None = None,
    ) -> None:
        self._train, self._setup, self._dtype, self._options = train, setup, dtype, options
        self.world, self.pretrained = setup.world, setup.pretrained
        pads = self.pretrained.family.pads
        self.compiles = is_compiled(train.compile, pads)
        self.records = is_recorded(train.cuda_graphs, self.world, pads)
        self.model: nn.Module = self.pretrained.model
        share = -(-train.batch_size // self.world.size)
        self._probe = self._probed(share, most_examples)
        fits = self._probe.fits if train.micro_batch == "auto" else train.micro_batch
        self.most = micro_batch.limited(min(share, fits), most_examples, halvings)
        if self.world.device.type == "cuda":  # what the probe tried is not the trial's
            torch.cuda.reset_peak_memory_stats(self.world.device)
        with micro_batch.raised_as_out_of_memory(self.most):
            self.model = self.world.wrap(self.model)
        if self.records:
            weights = options.class_weights
            values = None if weights is None else weights.tolist()
            fields = ("frozen_layers", "dropout", "label_smoothing", "compile")
            settings = repr([dtype, values, *(getattr(train, field) for field in fields)])
            self.pretrained.recorded.begin(self.pretrained.model, settings, options)

    def collate(self, items: IntArray, trunk: Trunk | None) -> Batch:
        """A micro-batch of some training examples."""
        has_layers = trunk is None or trunk.depth < self.pretrained.num_layers
        compiles = self.compiles and has_layers
        batch = self._collate(items, trunk, self.most if compiles or self.records else None)
        if not compiles:
            return batch
        one_pass = replace(batch.one_pass, compiled=self.pretrained.compiled)
        return replace(batch, one_pass=one_pass)

    def add_gradients(self, batch: Batch, factor: torch.Tensor) -> torch.Tensor:
        """Add the gradients of the summed loss times `factor`; that loss."""
        if self.records:
            return self.pretrained.recorded.run(self._add_gradients, batch, factor)
        return self._add_gradients(batch, factor)

    def memory_bytes(self, states: Sequence[torch.Tensor]) -> int:
        """Most that this worker's device has held for the trial so far.

        On a CPU, whose process keeps what it once had: weights, gradients, the optimiser's states
        and what a full micro-batch of the longest examples keeps for its backward pass.
        """
        device = self.world.device
        if device.type == "cuda":
            if self.records:  # what a recorded pass writes to is not allocated anew
                return torch.cuda.max_memory_reserved(device)
            return torch.cuda.max_memory_allocated(device)
        gradients = self.pretrained.trainable().values()
        held = [*self.pretrained.model.parameters(), *gradients, *states]
        return micro_batch.bytes_of(held) + self._probe.kept_bytes(self.most)

    def _collate(self, items: IntArray, trunk: Trunk | None, fill_to: int | None) -> Batch:
        return batches.collate(
            self._setup.dataset.train,
            items,
            pad_token=self._setup.tokenizer.pad_token_id,
            device=self.world.device,
            trunk=trunk,
            fill_to=fill_to,
        )

    def _loss(self, batch: Batch) -> torch.Tensor:
        return forward_loss(self.model, batch, self._setup.task, self._options, self._dtype)

    def _add_gradients(self, batch: Batch, factor: torch.Tensor) -> torch.Tensor:
        loss = self._loss(batch)
        (loss * factor).backward()
        return loss.detach()

    def _probed(self, share: int, most_examples: int | None) -> Probe:
        """What was found of the micro-batch, once per kind of trial."""
        on_gpu = self.world.device.type == "cuda"
        if on_gpu and self._train.micro_batch != "auto":
            return Probe(self._train.micro_batch)
        longest = self._setup.dataset.train.longest
        dropout, options = self._train.dropout, self._options
        # A mask takes the same however much it drops.
        drops = None if dropout is None else dropout > 0
        changes = (drops, options.label_smoothing > 0, options.class_weights is not None)
        how = (str(self._dtype), self.compiles, self.records, *changes)
        most = min(share, most_examples or share)
        # What an example keeps on a CPU does not depend on how many there are, nor on these.
        tried = (self._train.batch_size, num_states(self._train), most) if on_gpu else ()
        key = (self._train.frozen_layers, longest, *how, *tried)
        known = self._setup.micro_batches
        if key not in known:
            known[key] = self._find(share, most)
        return known[key]

    def _find(self, share: int, most: int) -> Probe:
        """The same on all ranks: the least that one of them found.

        Args:
            share: of a batch, which may go through the model in parts.
            most: examples to try.
        """
        longest = np.argsort(-self._setup.dataset.train.lengths, kind="stable")
        is_fixed = self.compiles or self.records

        def loss_of(items: IntArray) -> torch.Tensor:
            return self._loss(self._collate(items, None, len(items) if is_fixed else None))

        def attempt(size: int) -> None:
            # What comes up with the first step: the optimiser's states and, where a step has
            # several micro-batches or workers, gradients that lie there while one passes; twice
            # where workers sum them in buckets, and while a pass is recorded.
            trained = list(self.pretrained.trainable().values())
            is_part, is_alone = size < share, self.world.size == 1
            copies = num_states(self._train) + (self.records or (is_part and not is_alone))
            held = [torch.empty_like(weight) for weight in trained for _ in range(copies)]
            try:
                if is_part or self.records or not is_alone:
                    for weight in trained:
                        weight.grad = torch.zeros_like(weight)
                loss_of(longest[:size]).backward()
            finally:
                self.model.zero_grad()
                del held

        def kept(size: int) -> int:
            like = np.repeat(longest[:1], size)
            return micro_batch.kept_bytes(lambda: loss_of(like), self.model.parameters())

        try:
            if self.world.device.type == "cuda":
                if not self.compiles:  # where another shape costs more than a pass
                    # First, so that libraries set themselves up while there is room.
                    with suppress(micro_batch.NothingFitsError):
                        micro_batch.largest_that_fits(attempt, 1)
                fits = micro_batch.largest_that_fits(attempt, most)
                torch.cuda.empty_cache()  # neighbours, and who asks what is reserved
                # A pass that is recorded keeps its memory while another warms up.
                found = Probe(max(1, fits // 2) if self.records and fits < most else fits)
            else:
                found = micro_batch.probe_on_a_cpu(kept)
        except micro_batch.NothingFitsError:
            found = Probe(0)
        fits = self.world.minimum(found.fits)
        if fits == 0:
            raise micro_batch.NothingFitsError("out of memory at micro-batch 1")
        return replace(found, fits=fits)
