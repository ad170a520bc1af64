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

from sft_ray.errors import TrialError
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
    kept: Any


class RecordedPasses:
    """Runs the passes of one model's trials.

    Args:
        recorder: makes of a pass on fixed memory what runs it again there, any number of times.
    """

    def __init__(self, recorder: Callable[[], Callable[[Run], Run]] | None = None) -> None:
        self._new_recorder = recorder or _Recorder
        self._gradients: dict[str, torch.Tensor] = {}
        self._trained: list[nn.Parameter] = []
        self._trial: Hashable = None
        self._kept: Any = None
        self._forget()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded, so that no place in memory has to be kept."""
        return not self._graphs

    def begin(self, model: nn.Module, settings: Hashable, kept: Any = None) -> None:
        """Take up a trial, and give its trained weights gradients of 0.

        Args:
            settings: all but weights and batches that a pass depends on.
            kept: holds further tensors that a pass reads; their values follow from `settings`.
        """
        self._trained = [p for p in model.parameters() if p.requires_grad]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if name not in self._gradients:
                    self._gradients[name] = torch.zeros_like(parameter, requires_grad=False)
                parameter.grad = self._gradients[name].zero_()
        places = tuple((p.data_ptr(), p.requires_grad) for p in model.parameters())
        self._trial, self._kept = (settings, places), kept

    def run(
        self, forward_backward: ForwardBackward, batch: Batch, factor: torch.Tensor
    ) -> torch.Tensor:
        """The answer of `forward_backward`, which adds to the gradients.

        Args:
            batch: of fixed shapes, see `batches.collate`.

        Raises:
            TrialError: the pass cannot be recorded.
        """
        tensors = [*_tensors(batch), factor]
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        one_pass = batch.one_pass
        key = (self._trial, shapes, one_pass.layout.shape, one_pass.depth)
        if key in self._graphs:
            for place, tensor in zip(self._graphs[key].tensors, tensors, strict=True):
                place.copy_(tensor)
        else:
            replay = self._record(lambda: forward_backward(batch, factor))
            self._graphs[key] = _Recorded(tensors, replay, self._kept)
        return self._graphs[key].replay().clone()

    def _record(self, run: Run) -> Run:
        if len(self._graphs) == MOST_GRAPHS:
            self._forget()
        gradients: list[Any] = [p.grad for p in self._trained]
        before = [gradient.clone() for gradient in gradients]
        try:
            return self._recorder(run)
        except Exception as error:
            self._forget()  # to make room; what is left of a recording serves no other
            for found in (error, error.__context__):  # the end of a recording may fail in turn
                if found is not None and is_out_of_memory(found):
                    raise found from None
            raise TrialError(
                f"train.cuda_graphs: a pass of this model cannot be recorded: {error}; set it to "
                "false"
            ) from error
        finally:
            torch._foreach_copy_(gradients, before)  # what is recorded runs, and adds to them

    def _forget(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # one may still be running
        self._graphs: dict[Hashable, _Recorded] = {}
        self._recorder = self._new_recorder()


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
        self._stream: Any = None  # memory is shared within a stream only

    def __call__(self, run: Run) -> Run:
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        current, state = torch.cuda.current_stream(), torch.cuda.get_rng_state()
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                loss = run()
        finally:
            torch.cuda.set_stream(current)  # which a recording that fails may not do
            # The pass that counts draws what it would have drawn without those before it.
            torch.cuda.set_rng_state(state)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay
