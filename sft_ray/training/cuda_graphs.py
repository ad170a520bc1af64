"""Passes of training as CUDA graphs: recorded once per shape, then started as a whole.

The kernels of a small model take less time than to start them one by one.  A graph is bound to
the memory it was recorded on, so batches are copied into that of the first one of their shape, and
gradients lie in the same place in all trials.  After "CUDA Graphs" in the notes of torch's
documentation (whole-network capture).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import nn

from sft_ray.training.batches import Batch
from sft_ray.training.micro_batch import is_out_of_memory
from sft_ray.training.world import World

WARM_UPS = 3  # passes before the recorded one, for libraries that set themselves up in the first
MOST_GRAPHS = 512

# Forward and backward of a batch whose loss is multiplied by the number: the summed loss.
ForwardBackward = Callable[[Batch, torch.Tensor], torch.Tensor]
Run = Callable[[], torch.Tensor]


def is_recorded(chosen: bool, world: World, pads: bool) -> bool:
    """Whether a trial records its passes: one worker on a GPU, layers without padding in them."""
    return chosen and world.device.type == "cuda" and world.size == 1 and not pads


class _Recorded(NamedTuple):
    tensors: list[torch.Tensor]
    replay: Run


class RecordedPasses:
    """Runs the passes of one model's trials.

    If one cannot be recorded, all run as they are from then on.

    Args:
        record: a pass on fixed memory -> what runs it again there, any number of times.
    """

    def __init__(self, record: Callable[[Run], Run] | None = None) -> None:
        self._record = record or _Recorder()
        self._graphs: dict[Hashable, _Recorded] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._trial: Hashable = None
        self.works = True

    def begin(self, model: nn.Module, settings: Hashable) -> None:
        """Take up a trial, and give its trained weights gradients of 0.

        Args:
            settings: all but weights and batches that a pass depends on.
        """
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if name not in self._gradients:
                    self._gradients[name] = torch.zeros_like(parameter, requires_grad=False)
                parameter.grad = self._gradients[name].zero_()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        places = tuple((p.data_ptr(), p.requires_grad) for p in model.parameters())
        self._trial = (settings, places)

    def run(
        self, forward_backward: ForwardBackward, batch: Batch, factor: torch.Tensor
    ) -> torch.Tensor:
        """The answer of `forward_backward`, which adds to the gradients.

        Args:
            batch: of fixed shapes, see `batches.collate`.
        """
        if not self.works:
            return forward_backward(batch, factor)
        tensors = [*_tensors(batch), factor]
        layout = batch.one_pass.layout
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        key = (self._trial, shapes, layout.shape, batch.one_pass.depth)
        known = self._graphs.get(key)
        if known is not None:
            for place, tensor in zip(known.tensors, tensors, strict=True):
                place.copy_(tensor)
            return known.replay().clone()
        if len(self._graphs) == MOST_GRAPHS:
            self._graphs.clear()
        gradients: list[Any] = [p.grad for p in self._trained]
        before = [gradient.clone() for gradient in gradients]
        try:
            replay = self._record(lambda: forward_backward(batch, factor))
        except Exception as error:  # what a graph cannot hold is said in many ways
            if is_out_of_memory(error):
                raise
            self.works = False
        torch._foreach_copy_(gradients, before)  # passes that are recorded add to them, too
        if not self.works:
            return forward_backward(batch, factor)
        self._graphs[key] = _Recorded(tensors, replay)
        return replay().clone()


def _tensors(batch: Batch) -> list[torch.Tensor]:
    """All that differs between batches of the same shapes."""
    one_pass = batch.one_pass
    (group,) = one_pass.layout.groups
    layout = one_pass.layout
    maybe = (layout.places, layout.starts, group.mask, one_pass.trunk_TH)
    given = [tensor for tensor in maybe if tensor is not None]
    return [*batch.inputs.values(), batch.labels, batch.weights, *given]


class _Recorder:
    """Records on the current GPU; all graphs share their memory, as only one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Passes before the one that counts must not draw its random numbers.
        state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            loss = run()
        torch.cuda.set_rng_state(state)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay
