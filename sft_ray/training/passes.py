"""One pass of a batch through a model of the library: without padding, and in two halves.

The model's own code runs; only what its embeddings, layers and attention are handed changes, and
only inside `passing`.  Outside, the model does what it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_ray.training import cpu_dropout, gpu_attention
from sft_ray.training.compiled import CompiledLayers
from sft_ray.training.cpu_attention import attend_with_dropout
from sft_ray.training.families import OwnAttention, module_at
from sft_ray.training.gpu_attention import attend_varlen
from sft_ray.training.padded_attention import PaddedAttention, PaddedConvolution, own_forward
from sft_ray.training.unpadded import Layout, attend

ATTENTION = "sft_ray_unpadded"


@dataclass(frozen=True)
class Pass:
    """How a batch goes through a model.

    Attributes:
        layout: where its tokens lie.
        depth: layers that are left out, with the embeddings; their output is `trunk_TH`.
        trunk_TH: output of the first `depth` layers, [tokens, width]; None begins at the
            embeddings.
        stop: layers after which to stop; None runs all.
        compiled: runs the layers; None runs them as the library does.
    """

    layout: Layout
    depth: int = 0
    trunk_TH: torch.Tensor | None = None  # noqa: N815
    stop: int | None = None
    compiled: CompiledLayers | None = None


@dataclass(frozen=True)
class _Packed:
    """What attention is told of a layer's tokens, by the layer's arguments.

    Attributes:
        all_1TH: what the layer may look at while it is asked for first tokens only.
    """

    layout: Layout
    all_1TH: torch.Tensor | None = None  # noqa: N815


_now: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextmanager
def passing(one: Pass | None) -> Iterator[None]:
    """Models that were prepared run as `one` says; None lets them run as they are."""
    token = _now.set(one)
    try:
        yield
    finally:
        _now.reset(token)


class _Stopped(Exception):  # noqa: N818
    """Carries the output of the layer after which to stop, [tokens, width]."""

    def __init__(self, hidden_TH: torch.Tensor) -> None:
        super().__init__()
        self.hidden_TH = hidden_TH


def prepare_model(
    model: Any,
    embeddings: Sequence[nn.Module],
    layers: Sequence[nn.Module],
    *,
    own_attention: OwnAttention | None,
    convolution: nn.Module | None,
    gives_tuples: bool,
    narrows: bool,
) -> None:
    """Let a model look at `passing`; its parameters and their names stay as they are.

    Args:
        embeddings: all that runs before the first layer.
        own_attention: of the layers, if it is a family's own code; else it asks the library's
            registry how.  Nothing but attention looks at more than one token, except
        convolution: between the first and the second layer, or None.
        gives_tuples: whether the layers answer with more than the hidden states.
        narrows: whether the last layer, if its attention asks the registry, computes the first
            token of every sequence only, and keys and values of the others; right where the head
            reads no other.
    """
    for module in embeddings:
        module.forward = _Embeddings(own_forward(module))
    if own_attention is not None:
        for layer in layers:
            attention = module_at(layer, own_attention.path)
            attention.forward = PaddedAttention(attention, own_attention, _layout)
    if convolution is not None:
        convolution.forward = PaddedConvolution(convolution, _layout)
    asks = own_attention is None
    for index, layer in enumerate(layers):
        is_last = index + 1 == len(layers)
        narrow = is_last and asks and narrows
        layer.forward = _Layer(layer, index, is_last, gives_tuples, asks, narrow)
    if asks:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
        model.set_attn_implementation(ATTENTION)


def trunk_output(model: Any, inputs: dict[str, torch.Tensor], one: Pass) -> torch.Tensor:
    """What the first `one.stop` layers give, [tokens, width]; nothing above them runs."""
    try:
        with passing(one):
            model(**inputs)
    except _Stopped as stopped:
        return stopped.hidden_TH
    raise AssertionError("the model has fewer layers")


class _Embeddings:
    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = _now.get()
        if now is None or now.trunk_TH is None:
            return self._real(*args, **kwargs)
        # Only its shape is looked at until the first layer that runs, and its number format: the
        # embeddings' own, which positions are told in, and not what a trunk is kept in.
        dtype = torch.promote_types(now.trunk_TH.dtype, torch.float32)
        nothing = now.trunk_TH.new_zeros((), dtype=dtype)
        return nothing.expand(*now.layout.shape, now.trunk_TH.shape[-1])


class _Layer:
    def __init__(
        self,
        layer: nn.Module,
        index: int,
        is_last: bool,
        gives_tuples: bool,
        asks: bool,
        narrows: bool,
    ) -> None:
        self._layer, self._real = layer, own_forward(layer)
        self._index, self._is_last, self._gives_tuples = index, is_last, gives_tuples
        self._asks, self._narrows = asks, narrows

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        now = _now.get()
        if now is None:
            return self._real(hidden, *args, **kwargs)
        if self._index < now.depth:
            return self._left_out(now, hidden)
        if self._index == now.depth:
            hidden = self._first(now, hidden)
        hidden = _in_bf16(hidden)
        if self._narrows and now.stop is None:
            # Queries, and all behind attention, of the first tokens; see `_attention`.
            first_1BH = hidden.index_select(1, now.layout.starts)
            first_1BH = self._run(now, first_1BH, hidden, *args, **kwargs)
            return first_1BH.transpose(0, 1)
        found = self._run(now, hidden, None, *args, **kwargs)
        hidden, *others = found if self._gives_tuples else (found,)
        if self._index + 1 == now.stop:
            raise _Stopped(_in_bf16(now.layout.own(hidden[0])))
        if self._is_last:
            hidden = now.layout.unpack(_in_bf16(hidden[0]))
        return (hidden, *others) if self._gives_tuples else hidden

    def _run(
        self,
        now: Pass,
        hidden: torch.Tensor,
        all_1TH: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._asks:
            kwargs["packed"] = _Packed(now.layout, all_1TH)
            if rows := kwargs.get("position_embeddings"):
                kwargs["position_embeddings"] = tuple(_packed(now.layout, part) for part in rows)
        if now.compiled is None:
            return self._real(hidden, *args, **kwargs)
        shape = (*hidden.shape, *now.layout.groups[0].shape, now.layout.groups[0].last)
        return now.compiled.run(self._layer, shape, hidden, *args, **kwargs)

    def _first(self, now: Pass, hidden: torch.Tensor) -> torch.Tensor:
        """What the first layer that runs is handed, [1, tokens, width]."""
        if now.trunk_TH is None:
            return now.layout.pack(hidden).unsqueeze(0)
        return now.layout.fill(now.trunk_TH).unsqueeze(0)

    def _left_out(self, now: Pass, hidden: torch.Tensor) -> Any:
        if self._is_last:
            assert now.trunk_TH is not None  # only a given output leaves layers out
            hidden = now.layout.unpack(now.trunk_TH)
        return (hidden, None) if self._gives_tuples else hidden


@lru_cache(maxsize=4)  # for all layers: cosines and sines of those that look far and near
def _packed(layout: Layout, rows_1LD: torch.Tensor) -> torch.Tensor:
    """What belongs to the positions of a text, for every token of the batch, [1, tokens, width]."""
    return layout.pack(rows_1LD.expand(layout.shape[0], -1, -1)).unsqueeze(0)


def _layout() -> Layout | None:
    now = _now.get()
    return None if now is None else now.layout


def _in_bf16(hidden: torch.Tensor) -> torch.Tensor:
    """Between layers, where their products are in bf16 too: half the bytes, and no casts."""
    kind = hidden.device.type
    in_bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return hidden.bfloat16() if in_bf16 else hidden


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Nobody looks at a mask while tokens are packed."""
    return sdpa_mask(*args, **kwargs) if _now.get() is None else None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: _Packed | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if packed is None:
        assert _now.get() is None  # a layer hands its arguments on
        how_far = {"sliding_window": sliding_window, "dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **how_far, **kwargs
        )
    narrow = packed.all_1TH is not None
    if narrow:
        names = ("key", "value") if hasattr(module, "key") else ("k_lin", "v_lin")
        key, value = (
            getattr(module, name)(packed.all_1TH).unflatten(-1, (-1, key.shape[-1])).transpose(1, 2)
            for name in names
        )
    reach = None if sliding_window is None else sliding_window - 1  # the window counts the token
    if cpu_dropout.is_ours(query, dropout):
        how = attend_with_dropout
    elif gpu_attention.is_ours(packed.layout, query, dropout, reach, narrow):
        how = attend_varlen
    else:
        how = attend
    found = how(
        packed.layout, query, key, value, dropout, scaling, reach=reach, first_tokens=narrow
    )
    return found, None
