"""Attention on GPUs hands its kernels what they ask for; what they answer, a GPU has to show.

The kernels stand here as loops over their contract: rows of the sequences between two bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sft_ray.training import gpu_attention
from sft_ray.training.gpu_attention import attend_varlen, is_ours
from sft_ray.training.unpadded import Layout, attend
from tests.models import CPU

HEADS, WIDTH = 2, 8
LENGTHS = np.array([1, 3, 3, 7, 12])


def flash(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    most_queries: int,
    most_keys: int,
    dropout: float,
    is_causal: bool,
    wants_mask: bool,
    *,
    scale: float | None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, None]:
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    assert most_queries == query_bounds.diff().max()
    assert most_keys == key_bounds.diff().max()
    assert not is_causal
    assert not wants_mask
    parts = []
    spans = zip(pairwise(query_bounds.tolist()), pairwise(key_bounds.tolist()), strict=True)
    for (first, last), (first_key, last_key) in spans:
        q = query_THD[first:last].transpose(0, 1)
        k, v = (x[first_key:last_key].transpose(0, 1) for x in (key_THD, value_THD))
        at = torch.arange(last_key - first_key)
        is_near = torch.ones(last - first, len(at), dtype=torch.bool)
        if window_size_left is not None:
            assert window_size_right == window_size_left
            is_near = (at[: last - first, None] - at).abs() <= window_size_left
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=is_near, dropout_p=dropout, scale=scale
        )
        parts.append(found.transpose(0, 1))
    return torch.cat(parts), None


def efficient(*args: Any, scale: float | None) -> tuple[torch.Tensor, None]:
    rows, (bias, *bounds_and_most) = args[:3], args[3:8]
    dropout, causal, wants_gradients = args[8:]
    assert bias is None
    assert causal == 0
    assert wants_gradients == torch.is_grad_enabled()
    found, _ = flash(*(x[0] for x in rows), *bounds_and_most, dropout, False, False, scale=scale)
    return found.unsqueeze(0), None


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_attention, "_flash", flash)
    monkeypatch.setattr(gpu_attention, "_efficient", efficient)
    gpu_attention._works.cache_clear()
    yield
    gpu_attention._works.cache_clear()


def of_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def works(*kind: Any) -> bool:
    return gpu_attention._works(gpu_attention._Kind(*kind))


@pytest.mark.parametrize(
    ("capability", "dtype", "reach", "first_tokens"),
    [
        ((7, 5), torch.float32, None, False),
        ((9, 0), torch.float32, None, True),
        ((7, 5), torch.float16, None, True),
        ((9, 0), torch.bfloat16, None, False),
        ((9, 0), torch.bfloat16, None, True),
        ((9, 0), torch.bfloat16, 2, False),
    ],
)
def test_the_kernels_get_the_rows_of_every_sequence(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    reach: int | None,
    first_tokens: bool,
) -> None:
    of_capability(monkeypatch, capability)
    layout, rows = Layout.of(LENGTHS, CPU), int(LENGTHS.sum())
    torch.manual_seed(0)
    counts = [len(LENGTHS) if first_tokens else rows, rows, rows]
    given = [torch.randn(1, HEADS, n, WIDTH, dtype=dtype, requires_grad=True) for n in counts]
    found, expected = (
        how(layout, *given, 0.0, 0.3, reach=reach, first_tokens=first_tokens)[:, : counts[0]]
        for how in (attend_varlen, attend)
    )
    assert found.shape == (1, counts[0], HEADS, WIDTH)
    near = {"atol": 1e-5 if dtype == torch.float32 else 0.05, "rtol": 0.0}
    torch.testing.assert_close(found, expected, **near)
    mine, theirs = (torch.autograd.grad(x.float().sum(), given) for x in (found, expected))
    torch.testing.assert_close(mine, theirs, **near)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "drops", "reach", "expected"),
    [
        ((9, 0), torch.bfloat16, 32, False, None, True),
        ((9, 0), torch.bfloat16, 32, True, None, True),
        ((9, 0), torch.bfloat16, 32, True, 4, True),
        ((9, 0), torch.float32, 32, False, None, True),
        ((7, 5), torch.float16, 32, False, None, True),
        ((7, 5), torch.float16, 32, False, 4, False),  # no kernel of such a GPU looks near only
        ((9, 0), torch.float32, 32, False, 4, False),
        ((9, 0), torch.float32, 32, True, None, False),  # nor drops backward what it did forward
        ((7, 5), torch.float16, 32, True, None, False),
        ((9, 0), torch.bfloat16, 12, False, None, False),  # of heads of 8, 16, 24, …
        ((9, 0), torch.float64, 32, False, None, False),
    ],
)
def test_kernels_are_asked_for_what_they_know(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    drops: bool,
    reach: int | None,
    expected: bool,
) -> None:
    of_capability(monkeypatch, capability)
    asked = (CPU, dtype, width, drops, reach)
    assert works(*asked, False) == expected
    if reach is None:
        assert works(*asked, True) == expected


def missing(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("_flash_attention_forward() got an unexpected keyword argument")


def of_another_scale(*args: Any, **kwargs: Any) -> Any:
    return flash(*args, **{**kwargs, "scale": 1.0})


def looking_too_near(*args: Any, **kwargs: Any) -> Any:
    return flash(*args, **{**kwargs, "window_size_left": 3, "window_size_right": 3})


class _DroppingAnew(torch.autograd.Function):
    """Attention that drops other weights backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.args = args
        ctx.save_for_backward(*args[:3])
        return flash(*args, scale=None)[0]

    @staticmethod
    def backward(ctx: Any, *of_answers: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            found, _ = flash(*leaves, *ctx.args[3:], scale=None)
        return *torch.autograd.grad(found, leaves, of_answers), *7 * [None]


def dropping_anew(*args: Any, scale: float | None, **window: Any) -> Any:
    return _DroppingAnew.apply(*args), None


@pytest.mark.parametrize("kernel", [missing, of_another_scale, looking_too_near, dropping_anew])
def test_a_kernel_that_answers_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any]
) -> None:
    reach = 5 if kernel is looking_too_near else None
    of_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(gpu_attention, "_flash", kernel)
    assert not works(CPU, torch.bfloat16, 32, True, reach, False)


def test_trying_a_kernel_draws_none_of_a_trial_s_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_capability(monkeypatch, (9, 0))
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu"):  # as in an evaluation
        assert works(CPU, torch.bfloat16, 32, True, None, False)
    assert torch.equal(before, torch.get_rng_state())


def test_on_a_cpu_none_is_asked_for() -> None:
    layout = Layout.of(LENGTHS, CPU)
    query = torch.zeros(1, HEADS, int(LENGTHS.sum()), WIDTH)
    assert not is_ours(layout, query, 0.0, None, False)


def test_torch_s_kernels_are_called_as_this_torch_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(gpu_attention, "_dtype", lambda query: query.dtype)
    of_capability(monkeypatch, (9, 0))
    meta, rows = torch.device("meta"), int(LENGTHS.sum())
    layout = Layout.of(LENGTHS, meta)
    for dtype, reach in ((torch.bfloat16, None), (torch.bfloat16, 3), (torch.float32, None)):
        leaves = [
            torch.empty(1, HEADS, rows, WIDTH, dtype=dtype, device=meta, requires_grad=True)
            for _ in "qkv"
        ]
        found = attend_varlen(layout, *leaves, 0.1, None, reach=reach)
        assert (found.shape, found.dtype) == ((1, rows, HEADS, WIDTH), dtype)
        assert found.requires_grad  # torch knows its gradient


def test_answers_are_compared_with_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeing(*args: Any, **kwargs: Any) -> torch.Tensor:
        kernels.append(
            (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled())
        )
        return attend(*args, **kwargs)

    kernels: list[tuple[bool, bool]] = []
    of_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(gpu_attention, "attend", seeing)
    assert works(CPU, torch.bfloat16, 32, False, None, False)
    assert kernels == [(True, False)]
