"""Attention that is a family's own code, in layers whose tokens lie side by side.

The modules named by `Family.pads_in` project and attend by themselves, and want padding.  They are
handed neighbours of like length, group by group; all else in their layers sees no padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sft_ray.training.unpadded import Group, Layout

SQUARE = ("attention_mask", "position_bias", "relative_pos")  # [1 or batch, …, length, length]


class PaddedAttention:
    """Runs instead of an attention module's forward.

    Args:
        real: its own forward.
        layout: of the batch that passes at present, or None.
    """

    def __init__(
        self, module: nn.Module, real: Callable[..., Any], layout: Callable[[], Layout | None]
    ) -> None:
        self._module: Any = module
        self._real, self._layout = real, layout
        _, *self._names = inspect.signature(real).parameters

    def __call__(self, packed_1TH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, tokens, width] -> the same, and nothing else that the module may answer with."""
        layout = self._layout()
        if layout is None:
            return self._real(packed_1TH, *args, **kwargs)
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        parts = []
        for group in layout.tight_groups:
            padded = group.pad(packed_1TH.unsqueeze(1)).squeeze(1)
            found_BLH = self._of_group(group.shape[1], padded, cut(named, group))
            parts.append(group.unpad(found_BLH.unsqueeze(1)).squeeze(1))
        return layout.join(parts).unsqueeze(0), None

    def _of_group(self, length: int, padded: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
        if hasattr(self._module, "q_bias"):
            # DeBERTa v1 masks with the least number of fp32, which fits no half precision.
            with torch.autocast(padded.device.type, enabled=False):
                return self._real(padded.float(), **named)[0]
        all_distances = getattr(self._module, "pos_ebd_size", None)
        distances = named.get("rel_embeddings")
        if all_distances is None or distances is None:
            return self._real(padded, **named)[0]
        # DeBERTa v2 and v3 project every distance there is; only those within the text are read.
        span = nearest_distances(length, all_distances, self._module.position_buckets)
        named["rel_embeddings"] = distances[all_distances - span : all_distances + span]
        self._module.pos_ebd_size = span
        try:
            return self._real(padded, **named)[0]
        finally:
            self._module.pos_ebd_size = all_distances


class PaddedConvolution:
    """Runs instead of the forward of DeBERTa's convolution behind the first layer."""

    def __init__(self, real: Callable[..., Any], layout: Callable[[], Layout | None]) -> None:
        self._real, self._layout = real, layout

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
