"""On CPUs dropout drops what it says, and attention with it is the formula of the textbook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sft_ray.training import cpu_dropout
from sft_ray.training.cpu_attention import SHORT, attend_with_dropout
from sft_ray.training.cpu_dropout import dropped, hasten_dropout
from sft_ray.training.unpadded import Layout, attend
from tests.models import CPU

HEADS, WIDTH = 3, 4
RAGGED = Layout.of(np.array([2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 9]), CPU)  # two groups with padding
EVEN = Layout.of(np.full(5, 6), CPU)


@pytest.mark.parametrize("probability", [0.003, 0.1, 0.5, 0.9])
def test_each_element_is_dropped_by_itself(probability: float) -> None:
    torch.manual_seed(0)
    drops_N4 = dropped((50_000, 4), probability).float()
    # Four standard deviations: one in fifteen thousand runs by chance, and the seed is fixed.
    wide = 4 * (probability * (1 - probability) / 50_000) ** 0.5
    torch.testing.assert_close(drops_N4.mean(0), torch.full((4,), probability), atol=wide, rtol=0)
    correlations = torch.corrcoef(torch.cat([drops_N4.T, drops_N4.T.roll(1, 1)]))
    assert (correlations - torch.eye(8)).abs().max() < 4 / 50_000**0.5


def test_the_same_seed_drops_the_same() -> None:
    torch.manual_seed(3)
    first, second = dropped((5, 7), 0.5), dropped((5, 7), 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, dropped((5, 7), 0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_module_keeps_is_scaled_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Dropout(0.25))
    hasten_dropout(model)
    torch.manual_seed(0)
    x = torch.ones(1000, 30, dtype=dtype, requires_grad=True)
    y = model(x)
    y.sum().backward()
    expected = torch.tensor([0.0, 4 / 3]).to(dtype).tolist()
    assert y.dtype == dtype
    assert sorted(set(y.flatten().tolist())) == expected
    assert torch.equal(x.grad, y.detach())  # type: ignore[arg-type]
    assert y.detach().float().mean().item() == pytest.approx(1, abs=0.01)
    model[0].p = 0.0  # as a trial sets it
    assert model(x) is x
    model[0].p = 0.5
    assert model.eval()(x) is x


@pytest.mark.parametrize("layout", [RAGGED, EVEN])
@pytest.mark.parametrize(("first_tokens", "reach"), [(False, None), (True, None), (False, 2)])
def test_without_drops_attention_is_the_library_s(
    layout: Layout, first_tokens: bool, reach: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_dropout, "dropped", lambda shape, _: torch.zeros(shape).bool())
    monkeypatch.setattr(cpu_dropout, "scale", lambda _: 1.0)
    mine, theirs = (inputs(layout, first_tokens) for _ in range(2))
    how: dict[str, Any] = {"first_tokens": first_tokens, "reach": reach}
    found = attend_with_dropout(layout, *mine, 1e-4, None, **how)
    expected = attend(layout, *theirs, 0.0, None, **how)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("longest", [SHORT, SHORT + 8])  # multiplied in fp32, and in bf16
def test_in_bf16_attention_is_as_near_to_fp32_as_the_library_s(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_dropout, "dropped", lambda shape, _: torch.zeros(shape).bool())
    monkeypatch.setattr(cpu_dropout, "scale", lambda _: 1.0)
    layout = Layout.of(np.array([3, longest - 5, longest]), CPU)

    def answers_and_gradients(how: Any, dropout: float, dtype: torch.dtype) -> list[torch.Tensor]:
        given = inputs(layout, first_tokens=False)
        found = how(layout, *(x.to(dtype) for x in given), dropout, None)
        assert found.dtype == dtype
        (found.float() * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum().backward()
        return [found.detach().float(), *(x.grad for x in given if x.grad is not None)]

    exact = answers_and_gradients(attend, 0.0, torch.float32)
    theirs = answers_and_gradients(attend, 0.0, torch.bfloat16)
    mine = answers_and_gradients(attend_with_dropout, 1e-4, torch.bfloat16)
    assert len(exact) == 4
    for a, b, c in zip(mine, theirs, exact, strict=True):
        assert (a - c).norm() < 2 * (b - c).norm() < 0.05 * c.norm()


def test_with_drops_attention_is_the_formula_with_them() -> None:
    lengths = np.array([3, 5])
    layout, (query, key, value) = Layout.of(lengths, CPU), inputs(Layout.of(lengths, CPU), False)
    torch.manual_seed(1)
    found = attend_with_dropout(layout, query, key, value, 0.4, 0.7)
    torch.manual_seed(1)
    drops = dropped((2 * HEADS, 5, 5), 0.4).view(2, HEADS, 5, 5)
    parts = []
    for i, tokens in enumerate((slice(0, 3), slice(3, 8))):
        q, k, v = (x[0, :, tokens] for x in (query, key, value))
        weights = torch.softmax(0.7 * q @ k.transpose(1, 2), -1)
        kept = ~drops[i, :, : lengths[i], : lengths[i]] * cpu_dropout.scale(0.4)
        parts.append(((weights * kept) @ v).transpose(0, 1))
    expected = torch.cat(parts).unsqueeze(0)
    torch.testing.assert_close(found, expected)
    mine = torch.autograd.grad(found.square().sum(), (query, key, value), retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), (query, key, value))
    torch.testing.assert_close(mine, theirs)


def inputs(layout: Layout, first_tokens: bool) -> list[torch.Tensor]:
    """Queries, keys, values, [1, heads, tokens or sequences, width]."""
    torch.manual_seed(0)
    tokens = len(layout.places) + layout.filler
    shapes = [(len(layout.lengths) if first_tokens else tokens), tokens, tokens]
    rows = [torch.randn(1, n, HEADS, WIDTH).transpose(1, 2) for n in shapes]
    return [x.detach().requires_grad_() for x in rows]
