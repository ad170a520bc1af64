"""Layers of a model as torch.compile makes them.

Compiled code fits one shape, so batches are filled up to shapes that come again (see
`unpadded.Layout`).  What was compiled lives as long as the model: later trials run it as it is, on
weights of their own.  Only the passes of training are compiled, not evaluation.  CUDA graphs are of
whole passes, see `cuda_graphs`, and not the compiler's.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sft_ray.training.micro_batch import is_out_of_memory

# Of all shapes, number formats and values of dropout together; a search over dropout has many.
MOST_COMPILED = 2048


def is_compiled(chosen: bool | Literal["auto"], pads: bool) -> bool:
    """Whether a trial compiles its layers.

    `auto` is off: on CPUs compiling costs more than most trials take, and on GPUs it has not been
    measured yet.  Layers with padding in them have too many shapes, and are never compiled.
    """
    return chosen is True and not pads


class CompiledLayers:
    """Runs the layers of one model, the library's own code, compiled once per shape.

    All layers of a kind share what was compiled.  If anything in it fails, all layers run
    uncompiled from then on: no compiler on the machine, a torch that is too old, more than
    `MOST_COMPILED` to compile.

    Args:
        backend: what compiles, by torch's name for it or as a function.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self._backend = backend
        self._of_shape: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.works = True

    def run(self, layer: nn.Module, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        """The answer of a layer.

        Args:
            shape: decides, with the class of the layer, all shapes inside of it.
        """
        real = type(layer).forward
        if self.works:
            try:
                with _settings():
                    return self._compiled(real, shape)(layer, *args, **kwargs)
            except Exception as error:  # a compiler fails in many ways
                if is_out_of_memory(error):
                    raise
                self.works = False
        return real(layer, *args, **kwargs)

    def _compiled(self, real: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., Any]:
        key = (real, shape)
        if key not in self._of_shape:
            # Finds what fits without trying all shapes, where torch can.
            can_isolate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
            alone: Any = {"isolate_recompiles": True} if can_isolate else {}
            self._of_shape[key] = torch.compile(
                real, backend=self._backend, dynamic=False, fullgraph=True, **alone
            )
        return self._of_shape[key]


@contextmanager
def _settings() -> Iterator[None]:
    """What torch shall keep to while it compiles."""
    # Imported here: they bring the compiler, which few trials ask for.
    from torch._dynamo import config as dynamo_config
    from torch._functorch import config as functorch_config

    # The backward pass is compiled with the forward pass, where failing is harmless.
    ahead = functorch_config.patch(force_non_lazy_backward_lowering=True)
    dynamo = dynamo_config.patch(
        optimize_ddp=False,  # a layer is small enough for workers to average it whole
        recompile_limit=MOST_COMPILED,
        accumulated_recompile_limit=MOST_COMPILED,
    )
    # The compiler warns of what it does itself.
    with ahead, dynamo, warnings.catch_warnings(action="ignore"):
        yield
