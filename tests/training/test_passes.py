"""Without padding, and in two halves, every family answers as the library's own code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sft_ray.training.batches import Batch, collate
from sft_ray.training.examples import Dataset
from sft_ray.training.families import FAMILIES
from sft_ray.training.forward import model_outputs
from sft_ray.training.model import Pretrained
from sft_ray.training.padded_attention import PaddedAttention, _Projection
from sft_ray.training.passes import Pass, passing, trunk_output
from sft_ray.training.unpadded import CPU_TOKEN_STEPS, Group, Layout
from tests.models import CPU, PAD, load_tiny, tiny_model_folder, toy_dataset

LAYERS = 3
PADDING = [name for name, family in FAMILIES.items() if family.pads]
CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("few"), tiny_bert, train=24, validation=24)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pretrained(
    request: pytest.FixtureRequest, few: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Pretrained:
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny(tiny_model_folder(folder, request.param, LAYERS), few)


def ragged_batch(few: Dataset) -> Batch:
    """Texts of several lengths, the first group without padding, not sorted as a whole."""
    order = np.argsort(few.train.lengths, kind="stable")
    return collate(few.train, np.concatenate([order[12:], order[:9]]), pad_token=PAD, device=CPU)


def gradients(pretrained: Pretrained, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in pretrained.trainable().items() if p.grad is not None}
    pretrained.model.zero_grad()
    return found


@pytest.mark.parametrize("k", [0, 2])
def test_a_pass_gives_the_logits_and_gradients_of_the_library(
    pretrained: Pretrained, few: Dataset, k: int
) -> None:
    assert_answers_like_the_library(pretrained, few, k)


@pytest.mark.parametrize(
    "changes", [CONVOLUTION, {"position_buckets": 40}, {"position_buckets": -1}]
)
def test_deberta_with_a_convolution_or_few_of_its_distances_answers_like_the_library(
    few: Dataset, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tiny_model_folder(tmp_path, "deberta-v2", LAYERS, **changes)
    assert_answers_like_the_library(load_tiny(folder, few), few, 0)


def assert_answers_like_the_library(pretrained: Pretrained, few: Dataset, k: int) -> None:
    pretrained.reset(k, dropout=0.0)
    batch = ragged_batch(few)
    mine = model_outputs(pretrained.model, batch)
    my_gradients = gradients(pretrained, mine)
    with passing(None):
        theirs = pretrained.model(**batch.inputs).logits
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    their_gradients = gradients(pretrained, theirs)
    assert my_gradients.keys() == their_gradients.keys()
    for name, gradient in my_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_upper_half_on_the_output_of_the_lower_is_the_whole(
    pretrained: Pretrained, few: Dataset, k: int
) -> None:
    pretrained.reset(k)
    pretrained.model.eval()
    batch = ragged_batch(few)
    layout = batch.one_pass.layout
    with torch.no_grad():
        whole = model_outputs(pretrained.model, batch)
        below = trunk_output(pretrained.model, batch.inputs, Pass(layout, stop=1))
        upper = Pass(layout, depth=1, trunk_TH=below, stop=k)
        trunk_TH = below if k == 1 else trunk_output(pretrained.model, batch.inputs, upper)
        assert trunk_TH.shape == (int(batch.inputs["attention_mask"].sum()), 32)
        with passing(Pass(layout, depth=k, trunk_TH=trunk_TH)):
            halves = pretrained.model(**batch.inputs).logits
    torch.testing.assert_close(halves, whole, atol=1e-5, rtol=1e-5)


def test_in_bf16_layers_hand_each_other_bf16(pretrained: Pretrained, few: Dataset) -> None:
    pretrained.reset(0, dropout=0.0)
    batch = ragged_batch(few)
    layout = batch.one_pass.layout
    with torch.no_grad():
        whole = model_outputs(pretrained.model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = model_outputs(pretrained.model, batch)
            between = [
                trunk_output(pretrained.model, batch.inputs, Pass(layout, stop=k)) for k in (1, 2)
            ]
    torch.testing.assert_close(found.float(), whole, atol=0.1, rtol=0.1)
    assert {hidden_TH.dtype for hidden_TH in between} == {torch.bfloat16}


def test_in_bf16_the_upper_half_on_a_trunk_that_was_kept_is_the_whole(
    pretrained: Pretrained, few: Dataset
) -> None:
    pretrained.reset(2)
    pretrained.model.eval()
    batch = ragged_batch(few)
    layout = batch.one_pass.layout
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model_outputs(pretrained.model, batch)
        trunk_TH = trunk_output(pretrained.model, batch.inputs, Pass(layout, stop=2))
        with passing(Pass(layout, depth=2, trunk_TH=trunk_TH)):
            halves = pretrained.model(**batch.inputs).logits
    torch.testing.assert_close(halves, whole, atol=0, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_see_tokens_without_padding_and_the_last_one_those_that_are_read(
    name: str, few: Dataset, tmp_path: Path
) -> None:
    pretrained = load_tiny(tiny_model_folder(tmp_path / name, name, 2), few)
    seen = []
    for module in pretrained.model.modules():
        if isinstance(module, nn.Linear) and module.in_features == 64:  # the way back to the width
            module.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].shape[:2]))
    batch = ragged_batch(few)
    with torch.no_grad():
        model_outputs(pretrained.model, batch)
    tokens = int(batch.inputs["attention_mask"].sum())
    assert batch.inputs["attention_mask"].numel() > tokens
    filled = tokens + batch.one_pass.layout.filler
    assert tokens <= filled < tokens * (1 + 1 / CPU_TOKEN_STEPS)
    narrows = FAMILIES[name].narrows and name not in PADDING
    assert seen == [(1, filled), (1, len(batch.labels) if narrows else filled)]


@pytest.mark.parametrize("name", PADDING)
def test_attention_of_its_own_sees_neighbours_of_like_length_and_its_products_no_padding(
    name: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = load_tiny(tiny_model_folder(tmp_path / name, name, 1), few)
    [attention] = [m for m in pretrained.model.modules() if isinstance(m.forward, PaddedAttention)]
    attended: list[torch.Size] = []
    *_, drop = (module for module in attention.children() if isinstance(module, nn.Dropout))
    drop.register_forward_hook(lambda m, inputs, output: attended.append(inputs[0].shape))
    multiplied: list[torch.Size] = []
    linear = F.linear

    def seen(inputs: torch.Tensor, *args: Any) -> torch.Tensor:
        multiplied.append(inputs.shape[:-1])
        return linear(inputs, *args)

    monkeypatch.setattr(F, "linear", seen)
    order = np.argsort(few.train.lengths, kind="stable")
    batch = collate(few.train, order, pad_token=PAD, device=CPU)
    with torch.no_grad():
        model_outputs(pretrained.model, batch)
    tokens, layout = int(few.train.lengths.sum()), batch.one_pass.layout
    shapes = [group.shape for group in layout.tight_groups]
    assert [(shape[0], shape[-1]) for shape in attended] == shapes
    assert len(shapes) > 1
    padded = sum(size * length for size, length in shapes)
    assert tokens < padded <= tokens / 0.75
    assert layout.positions == tokens + layout.filler
    # The layer's: three or one going in, one coming out, two of the feed-forward network.
    every = multiplied.count(torch.Size((1, layout.positions)))
    assert every == len(pretrained.family.own_attention.projections) + 3  # type: ignore[union-attr]
    assert not set(multiplied) & {torch.Size(shape) for shape in shapes}


@pytest.mark.parametrize("name", ["deberta-v2", "mpnet"])
def test_what_ran_out_of_memory_in_attention_holds_nothing(
    name: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that was never asked for would keep the graph of all layers below."""
    pretrained = load_tiny(tiny_model_folder(tmp_path / name, name, 1), few)
    batch = ragged_batch(few)
    spread, calls = Group.spread, []

    def full(group: Group, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(tokens)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("full")
        return spread(group, tokens)

    monkeypatch.setattr(Group, "spread", full)
    with pytest.raises(torch.OutOfMemoryError):
        model_outputs(pretrained.model, batch)
    held = [
        module.forward._answer
        for module in pretrained.model.modules()
        if isinstance(module.__dict__.get("forward"), _Projection)
    ]
    assert held == [None] * len(held)
    assert held


@pytest.mark.parametrize("lengths", [[6, 6], [2, 6, 4]])
def test_with_a_reach_a_token_sees_its_neighbours_and_padding_itself(lengths: list[int]) -> None:
    [group] = Layout.of(np.array(lengths), CPU).groups
    seen = group.visible(2, CPU).expand(len(lengths), 1, 6, 6)
    at = torch.arange(6)
    for sequence, length in enumerate(lengths):
        near = ((at[:, None] - at).abs() <= 2) & (at < length)
        assert torch.equal(seen[sequence, 0], near | torch.eye(6).bool())
    assert group.visible(5, CPU) is group.mask
    elsewhere = torch.device("meta")
    [unpadded] = Layout.of(np.array([6, 6]), CPU).groups
    assert unpadded.visible(2, elsewhere).device == elsewhere


def test_tight_groups_begin_anew_before_they_are_a_quarter_padding() -> None:
    layout = Layout.of(np.array([3, 3, 4, 6, 6, 12]), CPU)
    assert [group.shape for group in layout.tight_groups] == [(3, 4), (2, 6), (1, 12)]
    assert [(g.first, g.last, g.sequence) for g in layout.tight_groups] == [
        (0, 10, 0),
        (10, 22, 3),
        (22, 34, 5),
    ]


def test_few_numbers_of_tokens_occur_and_what_fills_up_is_zero() -> None:
    layouts = [Layout.of(np.array([tokens]), CPU) for tokens in range(65, 257)]
    filled = {len(layout.places) + layout.filler for layout in layouts}
    assert filled == {*range(68, 128, 4), *range(128, 257, 8)}
    layout = next(layout for layout in layouts if layout.filler)
    packed_TH = layout.pack(torch.ones(*layout.shape, 4))
    assert packed_TH[-layout.filler :].eq(0).all()
    assert layout.own(packed_TH).eq(1).all()


def test_a_layout_packs_and_unpacks_what_it_was_given() -> None:
    lengths = np.array([3, 3, 1, 4, 2, 2, 2, 2, 5, 5])
    layout = Layout.of(lengths, CPU)
    padded_BLH = torch.randn(10, 5, 4)
    mask = torch.arange(5)[None, :] < torch.from_numpy(lengths)[:, None]
    packed_TH = layout.pack(padded_BLH)
    assert torch.equal(packed_TH, padded_BLH[mask])
    assert torch.equal(layout.unpack(packed_TH), padded_BLH * mask[:, :, None])
    assert [(group.first, group.last, group.shape) for group in layout.groups] == [
        (0, 19, (8, 4)),
        (19, 29, (2, 5)),
    ]
    assert [group.mask is None for group in layout.groups] == [False, True]
