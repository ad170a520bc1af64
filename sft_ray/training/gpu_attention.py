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
from typing import Any

import numpy as np
import torch

from sft_ray.training.micro_batch import is_out_of_memory
from sft_ray.training.unpadded import Layout, attend

HALVES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)  # of the GPU; as FlashAttention-2 wants it
FLASH_MOST_WIDTH, WIDTH_STEP = 256, 8  # of a head
LIKE = 0.05  # relative; bf16 rounds by 0.004, and another formula is off by about 1
TRIED_LENGTHS, TRIED_HEADS = (3, 17, 40), 2


def is_ours(layout: Layout, query: torch.Tensor, reach: int | None, first_tokens: bool) -> bool:
    """Whether `attend_varlen` can and may answer; arguments as there."""
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if layout.is_fixed or layout.filler:
        # Rows that no sequence has would come back as whatever lay in the memory before.
        return False
    return _works(query.device, _dtype(query), query.shape[-1], reach, first_tokens)


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


@lru_cache(maxsize=64)
def _works(
    device: torch.device, dtype: torch.dtype, width: int, reach: int | None, first_tokens: bool
) -> bool:
    """Whether a small batch gets from the kernel what padded attention gives it."""
    has_kernel = dtype in (*HALVES, torch.float32) and width % WIDTH_STEP == 0
    if not has_kernel or (reach is not None and not _is_for_flash(device, dtype, width)):
        return False
    layout = Layout.of(np.array(TRIED_LENGTHS), device)
    # Its own generator: what a trial draws must not depend on whether this was asked before.
    source = torch.Generator(device).manual_seed(0)
    counts = [len(TRIED_LENGTHS) if first_tokens else sum(TRIED_LENGTHS), *2 * [sum(TRIED_LENGTHS)]]
    drawn = [
        torch.randn(1, TRIED_HEADS, n, width, device=device, generator=source).to(dtype)
        for n in counts
    ]

    def answers(how: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in drawn]
        found = how(layout, *leaves, 0.0, None, reach=reach, first_tokens=first_tokens)
        return [found.detach(), *torch.autograd.grad(found.float().square().sum(), leaves)]

    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            pairs = zip(answers(attend_varlen), answers(attend), strict=True)
            return all(bool((a - b).norm() <= LIKE * b.norm()) for a, b in pairs)
    except Exception as error:  # a torch whose kernels are called otherwise, or that has none
        if is_out_of_memory(error):
            raise
        return False
