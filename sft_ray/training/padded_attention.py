"""Attention that is a family's own code, in layers whose tokens lie side by side.

The modules named by `Family.own_attention` want padding, and are handed neighbours of like length,
group by group.  Their products with weights, as all else in their layers, see no padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from sft_ray.training.families import OwnAttention
from sft_ray.training.unpadded import Group, Layout

SQUARE = ("attention_mask", "position_bias", "relative_pos")  # [1 or batch, …, length, length]


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The library's own, also of a module that was prepared before."""
    return partial(type(module).forward, module)


class PaddedAttention:
    """Runs instead of an attention module's forward.

    Args:
        own: what the module is made of.
        layout: of the batch that passes at present, or None.
    """

    def __init__(
        self, module: nn.Module, own: OwnAttention, layout: Callable[[], Layout | None]
    ) -> None:
        self._module: Any = module
        self._real, self._layout = own_forward(module), layout
        self._projections = [_Projection(getattr(module, name)) for name in own.projections]
        self._output = None if own.output is None else _Output(getattr(module, own.output), layout)
        _, *self._names = inspect.signature(self._real).parameters

    def __call__(self, packed_1TH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, tokens, width] -> the same, and nothing else that the module may answer with."""
        layout = self._layout()
        if layout is None:
            return self._real(packed_1TH, *args, **kwargs)
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        # DeBERTa v1 masks with the least number of fp32, which fits no half precision.
        in_fp32 = hasattr(self._module, "q_bias")
        kind = packed_1TH.device.type
        with torch.autocast(kind, enabled=False) if in_fp32 else nullcontext():
            packed_1TH = packed_1TH.float() if in_fp32 else packed_1TH
            found_1TH = self._of_groups(layout, packed_1TH, named)
            return (found_1TH if self._output is None else self._output.of(found_1TH)), None

    def _of_groups(
        self, layout: Layout, packed_1TH: torch.Tensor, named: dict[str, Any]
    ) -> torch.Tensor:
        sizes = [group.last - group.first for group in layout.tight_groups]
        sizes.append(layout.positions - sum(sizes))
        projected = [own.of(packed_1TH)[0].split(sizes) for own in self._projections]
        parts = []
        for index, group in enumerate(layout.tight_groups):
            # Only its shape is looked at, where products are asked for.
            tokens_BLH = packed_1TH.new_zeros(()).expand(*group.shape, packed_1TH.shape[-1])
            try:
                for own, tokens in zip(self._projections, projected, strict=True):
                    own.answer(tokens_BLH, group.spread(tokens[index]))
                parts.append(group.gather(self._of_group(tokens_BLH, cut(named, group))))
            finally:  # out of memory, it would hold what all layers below keep
                for own in self._projections:
                    own.forget()
        return layout.join(parts).unsqueeze(0)

    def _of_group(self, tokens_BLH: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
        all_distances = getattr(self._module, "pos_ebd_size", None)
        distances = named.get("rel_embeddings")
        if all_distances is None or distances is None:
            return self._real(tokens_BLH, **named)[0]
        # DeBERTa v2 and v3 project every distance there is; only those within the text are read.
        length = tokens_BLH.shape[1]
        span = nearest_distances(length, all_distances, self._module.position_buckets)
        named["rel_embeddings"] = distances[all_distances - span : all_distances + span]
        self._module.pos_ebd_size = span
        try:
            return self._real(tokens_BLH, **named)[0]
        finally:
            self._module.pos_ebd_size = all_distances


class _Projection:
    """Runs instead of the forward of a product of what comes in, of all tokens at once."""

    def __init__(self, module: Any) -> None:
        self.of: Callable[[torch.Tensor], torch.Tensor] = own_forward(module)
        self._answer: tuple[torch.Tensor, torch.Tensor] | None = None
        module.forward = self

    def answer(self, tokens_BLH: torch.Tensor, found_BLH: torch.Tensor) -> None:
        """What to give, once, for a group's tokens."""
        self._answer = tokens_BLH, found_BLH

    def forget(self) -> None:
        """An answer that was not asked for."""
        self._answer = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        # DeBERTa's distances may go through the same weights.
        if self._answer is None or inputs is not self._answer[0]:
            return self.of(inputs)
        (_, found_BLH), self._answer = self._answer, None
        return found_BLH


class _Output:
    """Runs instead of the forward of the product of what goes out; of all tokens at once, later."""

    def __init__(self, module: Any, layout: Callable[[], Layout | None]) -> None:
        self.of: Callable[[torch.Tensor], torch.Tensor] = own_forward(module)
        self._layout = layout
        module.forward = self

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if self._layout() is not None else self.of(inputs)


class PaddedConvolution:
    """Runs instead of the forward of DeBERTa's convolution behind the first layer."""

    def __init__(self, module: nn.Module, layout: Callable[[], Layout | None]) -> None:
        self._real, self._layout = own_forward(module), layout

    def __call__(
        self, inputs_BLH: torch.Tensor, layer_1TH: torch.Tensor, mask_BL: torch.Tensor
    ) -> torch.Tensor:
        layout = self._layout()
        if layout is None:
            return self._real(inputs_BLH, layer_1TH, mask_BL)
        found_BLH = self._real(inputs_BLH, layout.unpack(layer_1TH[0]), mask_BL)
        return layout.pack(found_BLH).unsqueeze(0)


def cut(named: dict[str, Any], group: Group) -> dict[str, Any]:
    """What a layer hands its attention for the whole padded batch, for one group of it."""
    length = group.shape[1]
    found = dict(named)
    for name in SQUARE:
        if found.get(name) is not None:
            found[name] = _sequences(found[name], group)[..., :length, :length]
    return found


def nearest_distances(length: int, most: int, buckets: int) -> int:
    """How far to either side tokens of a text of this length look, in rows of the embedding.

    Args:
        most: rows there are to either side.
        buckets: rows that distances share; up to half of them each has a row of its own.
    """
    if buckets > 0 and length > buckets // 2:
        return most
    return min(length, most)


def _sequences(value: torch.Tensor, group: Group) -> torch.Tensor:
    return value if len(value) == 1 else value[group.sequence : group.sequence + group.shape[0]]
