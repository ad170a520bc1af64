"""Attention on GPUs over tokens that lie side by side: nothing is padded.

The kernels are those behind torch's `F.scaled_dot_product_attention`: FlashAttention-2 (Dao 2023)
in half precision, memory-efficient attention (Rabe and Staats 2021) in fp32.  The way to sequences
of several lengths that torch documents, `torch.nn.attention.varlen`, has no dropout.  So they are
called by torch's inner names, and only where a small batch gets the same answers and gradients from
them as from `unpadded.attend`, which runs everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sft_ray.training.micro_batch import is_out_of_memory
from sft_ray.training.unpadded import Layout, attend

HALVES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)  # of the GPU; as FlashAttention-2 wants it
FLASH_MOST_WIDTH, WIDTH_STEP = 256, 8  # of a head
LIKE = 0.05  # relative; bf16 rounds by 0.004, and another formula is off by about 1
TRIED_DROPOUT = 0.5


def is_ours(
    layout: Layout, query: torch.Tensor, dropout: float, reach: int | None, first_tokens: bool
) -> bool:
    """Whether `attend_varlen` can and may answer; arguments as there."""
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if layout.is_fixed or layout.filler:
        # Rows that no sequence has would come back as whatever lay in the memory before.
        return False
    width, drops = query.shape[-1], dropout > 0
    return _works(_Kind(query.device, _dtype(query), width, drops, reach, first_tokens))


def attend_varlen(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    *,
    reach: int | None = None,
    first_tokens: bool = False,
) -> torch.Tensor:
    """What `unpadded.attend` gives; `reach` is of all tokens only."""
    dtype = _dtype(query)
    rows = [x[0].transpose(0, 1).to(dtype) for x in (query, key, value)]  # [tokens, heads, width]
    bounds, longest = layout.bounds, layout.shape[1]
    ends = (layout.first_bounds, bounds) if first_tokens else (bounds, bounds)
    most = (1 if first_tokens else longest, longest)
    if _is_for_flash(query.device, dtype, query.shape[-1]):
        how_far = {} if reach is None else {"window_size_left": reach, "window_size_right": reach}
        found = _flash(*rows, *ends, *most, dropout, False, False, scale=scaling, **how_far)
        return found[0].unsqueeze(0)
    assert reach is None  # `is_ours` said so
    batch = (x.unsqueeze(0) for x in rows)
    wants_gradients = torch.is_grad_enabled()
    return _efficient(*batch, None, *ends, *most, dropout, 0, wants_gradients, scale=scaling)[0]


def _flash(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._flash_attention_forward(*args, **kwargs)


def _efficient(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._efficient_attention_forward(*args, **kwargs)


def _dtype(query: torch.Tensor) -> torch.dtype:
    """What attention computes in; autocast does not know the kernels."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _is_for_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    is_new = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    return is_new and dtype in HALVES and width % WIDTH_STEP == 0 and width <= FLASH_MOST_WIDTH


class _Kind(NamedTuple):
    """Attention that a kernel answers one way or another; `width` is that of a head."""

    device: torch.device
    dtype: torch.dtype
    width: int
    drops: bool
    reach: int | None
    first_tokens: bool


@lru_cache(maxsize=64)
def _works(kind: _Kind) -> bool:
    """Whether a small batch gets from the kernel what padded attention gives it."""
    device, dtype, width = kind[:3]
    if dtype not in (*HALVES, torch.float32) or width % WIDTH_STEP:
        return False
    # With sequences of several lengths the other kernel looks anywhere, and drops other weights
    # backward than forward (pytorch issue 115590).
    if (kind.drops or kind.reach is not None) and not _is_for_flash(device, dtype, width):
        return False
    # What a trial draws must not depend on whether this was asked before.
    devices = [device] if device.type == "cuda" else []
    no_autocast = torch.autocast(device.type, enabled=False)
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), no_autocast:
            return _answers_alike(kind)
    except Exception as error:  # a torch whose kernels are called otherwise, or that has none
        if is_out_of_memory(error):
            raise
        return False


def _answers_alike(kind: _Kind) -> bool:
    device, dtype, width, drops, reach, first_tokens = kind
    torch.manual_seed(0)
    lengths = np.array([3, 17, 2 * (reach or 16) + 9])  # the last does not look at all of itself
    layout, heads, tokens = Layout.of(lengths, device), 8, int(lengths.sum())
    queries = len(lengths) if first_tokens else tokens
    drawn = [torch.randn(1, heads, n, width, device=device) for n in (queries, tokens, tokens)]
    drawn = [x.to(dtype) for x in drawn]
    weights = torch.randn(1, queries, heads, width, device=device)

    def answers(how: Callable[..., torch.Tensor], dropout: float) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in drawn]
        found = how(layout, *leaves, dropout, None, reach=reach, first_tokens=first_tokens)
        found = found[:, :queries].float()
        return [found.detach(), *torch.autograd.grad((found * weights).sum(), leaves)]

    ours = answers(attend_varlen, 0.0)
    with sdpa_kernel(SDPBackend.MATH):  # by the formula, and not by a third library's kernel
        theirs = answers(attend, 0.0)
    pairs = zip(ours, theirs, strict=True)
    if not all(bool((a - b).norm() <= LIKE * b.norm()) for a, b in pairs):
        return False
    if not drops:
        return True
    # Of every head: answers are linear in values if forward and backward drop the same weights.
    found, _, _, of_values = answers(attend_varlen, TRIED_DROPOUT)
    forward = (found * weights).sum(dim=(0, 1, 3))
    backward = (drawn[2].float() * of_values.float()).sum(dim=(0, 2, 3))
    return bool((forward - backward).norm() <= LIKE * forward.norm())
