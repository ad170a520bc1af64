"""Compiled layers, and batches filled up for them, train as the library's own code does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from sft_ray.training import compiled
from sft_ray.training.batches import Batch, Trunk, collate
from sft_ray.training.compiled import CompiledLayers, is_compiled
from sft_ray.training.examples import Dataset
from sft_ray.training.families import FAMILIES
from sft_ray.training.forward import model_outputs
from sft_ray.training.model import Pretrained
from sft_ray.training.passes import trunk_output
from sft_ray.training.progress import Progress
from sft_ray.training.tasks import TASKS
from sft_ray.training.unpadded import CPU_TOKEN_STEPS, TOKEN_STEPS, Layout, filled
from tests.models import (
    CPU,
    PAD,
    load_tiny,
    run_fit,
    task_dataset,
    tiny_model_folder,
    toy_dataset,
)

LAYERS = 3
PACKED = [name for name, family in FAMILIES.items() if not family.pads]
TRAIN = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "dropout": 0.0}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("few"), tiny_bert, train=32, validation=16)


@pytest.fixture(scope="module", params=PACKED)
def pretrained(
    request: pytest.FixtureRequest, few: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Pretrained:
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny(tiny_model_folder(folder, request.param, LAYERS), few)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("bert"), "bert", LAYERS)


class Counting:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def fails(graph: Any, inputs: Any) -> Callable[..., Any]:
    raise RuntimeError("no compiler")


def batch_of(few: Dataset, fill_to: int | None, trunk: Trunk | None = None) -> Batch:
    items = np.arange(15)
    return collate(few.train, items, pad_token=PAD, device=CPU, trunk=trunk, fill_to=fill_to)


def answers(pretrained: Pretrained, batch: Batch) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of all that is trained."""
    logits = model_outputs(pretrained.model, batch)[batch.weights == 1]
    logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in pretrained.trainable().items() if p.grad is not None}
    pretrained.model.zero_grad()
    return {"logits": logits.detach(), **found}


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, found in mine.items():
        torch.testing.assert_close(found, theirs[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("k", [0, 2])
def test_neither_filling_up_nor_compiling_changes_logits_or_gradients(
    pretrained: Pretrained, few: Dataset, k: int
) -> None:
    pretrained.reset(k, dropout=0.0)
    theirs = answers(pretrained, batch_of(few, None))
    batch = batch_of(few, fill_to=16)
    layout = batch.one_pass.layout
    assert len(layout.places) > layout.lengths.sum()
    assert_equal(answers(pretrained, batch), theirs)
    layers = CompiledLayers("eager")
    one_pass = replace(batch.one_pass, compiled=layers)
    assert_equal(answers(pretrained, replace(batch, one_pass=one_pass)), theirs)
    assert layers.works


@pytest.mark.parametrize("k", [1, 3])
def test_what_the_lower_layers_gave_is_filled_up_too(
    pretrained: Pretrained, few: Dataset, k: int
) -> None:
    pretrained.reset(k, dropout=0.0)
    plain = batch_of(few, None)
    with torch.no_grad():
        trunk_TH = trunk_output(pretrained.model, plain.inputs, replace(plain.one_pass, stop=k))
    theirs = answers(pretrained, plain)
    layers = CompiledLayers("eager")
    trunk = Trunk(
        k, [trunk_TH.numpy()], np.zeros(15, dtype=int), plain.one_pass.layout.starts.numpy()
    )
    batch = batch_of(few, 16, trunk)
    one_pass = replace(batch.one_pass, compiled=layers)
    assert_equal(answers(pretrained, replace(batch, one_pass=one_pass)), theirs)
    assert layers.works


def test_few_numbers_are_filled_up_to_and_little_is() -> None:
    numbers = range(1, 5000)
    found = [filled(number, TOKEN_STEPS) for number in numbers]
    assert all(n <= f < n + max(1, n / TOKEN_STEPS) for n, f in zip(numbers, found, strict=True))
    assert len({f for f in found if 1024 < f <= 2048}) == TOKEN_STEPS
    assert [filled(n, 2, 16) for n in (1, 16, 17, 40, 65, 128, 130)] == [
        16, 16, 32, 48, 96, 128, 192,
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [[3, 1, 5, 9, 4], [16] * 8, [1], [16, 16, 16, 15]])
def test_a_fixed_layout_packs_and_unpacks_what_it_was_given(lengths: list[int]) -> None:
    layout = Layout.of(np.array(lengths), CPU, fill_below=16)
    size, length = layout.shape
    padded_BLH = torch.randn(size, length, 4)
    mask = torch.arange(length)[None, :] < torch.tensor(lengths)[:, None]
    packed_TH = layout.pack(padded_BLH)
    assert torch.equal(packed_TH[: sum(lengths)], padded_BLH[mask])
    assert torch.equal(layout.unpack(packed_TH)[mask], padded_BLH[mask])
    assert torch.equal(packed_TH[layout.starts], padded_BLH[:, 0])
    assert len(set(layout.places.tolist())) == len(packed_TH) <= size * length
    (group,) = layout.groups
    assert (group.shape, group.last) == (layout.shape, len(packed_TH))
    assert torch.equal(group.mask[:, 0, 0], mask)
    padded = group.pad(packed_TH[None, None])
    assert torch.equal(padded[:, 0][mask], padded_BLH[mask])


def test_a_fixed_layout_is_no_longer_than_the_longest_text() -> None:
    lengths = np.array([3, 70])
    assert Layout.of(lengths, CPU, fill_below=128).shape == (2, 96)
    assert Layout.of(lengths, CPU, fill_below=80).shape == (2, 80)  # all positions there may be


def test_batches_of_the_same_shape_differ_in_their_tensors_alone(few: Dataset) -> None:
    batches = [
        collate(few.train, items, pad_token=PAD, device=CPU, fill_to=16)
        for items in (np.arange(16), np.arange(16)[::-1], np.array([3]))
    ]
    like, other, lone = (batch.one_pass.layout for batch in batches)
    assert (like.shape, len(like.places)) == (other.shape, len(other.places))
    assert lone.shape[0] == like.shape[0] == 16
    assert batches[2].weights.tolist() == [1.0] + 15 * [0.0]


def losses(reports: list[Progress]) -> list[float]:
    return [report.train_loss for report in reports]


def test_trials_share_what_was_compiled_and_train_as_without(bert: Path, few: Dataset) -> None:
    plain = run_fit(load_tiny(bert, few), few, **TRAIN)
    counting, pretrained = Counting(), load_tiny(bert, few)
    pretrained.compiled = CompiledLayers(counting)
    first = run_fit(pretrained, few, compile=True, **TRAIN)
    assert losses(first) == pytest.approx(losses(plain), abs=1e-5)
    assert plain[-1].padding_share < 1 / CPU_TOKEN_STEPS
    assert plain[-1].padding_share < first[-1].padding_share < 1 / TOKEN_STEPS
    shapes = counting.count / 2  # the last layer, which looks at first tokens only, has its own
    assert 1 <= shapes <= 3
    again = run_fit(pretrained, few, compile=True, **{**TRAIN, "learning_rate": 1e-4})
    assert losses(again) != losses(first)
    assert losses(run_fit(pretrained, few, compile=True, **TRAIN)) == losses(first)
    assert counting.count == 2 * shapes
    assert pretrained.compiled.works


@pytest.mark.parametrize("settings", [{"compile": "auto"}, {"frozen_layers": "all"}])
def test_nothing_is_compiled_unless_asked_and_then_by_all_layers(
    bert: Path, few: Dataset, settings: dict[str, Any]
) -> None:
    counting, pretrained = Counting(), load_tiny(bert, few)
    pretrained.compiled = CompiledLayers(counting)
    run_fit(pretrained, few, **{"compile": True, **TRAIN, **settings})
    assert (counting.count > 0) == ("frozen_layers" in settings)


def test_labels_per_token_micro_batches_and_bf16_train_the_same(bert: Path, tmp_path: Path) -> None:
    task = TASKS["token-classification"]
    dataset = task_dataset(tmp_path, task.name, bert, train=16, validation=8)
    found = []
    for compile_ in (False, True):
        pretrained = load_tiny(bert, dataset, task=task)
        pretrained.compiled = CompiledLayers("aot_eager")
        settings = {**TRAIN, "compile": compile_, "micro_batch": 9, "precision": "bf16"}
        found.append(losses(run_fit(pretrained, dataset, task=task, **settings)))
        assert pretrained.compiled.works
    assert found[1] == pytest.approx(found[0], abs=1e-2)


@pytest.mark.parametrize(
    "backend",
    [
        fails,
        aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward), bw_compiler=fails),
        "nobody",
    ],
    ids=["forward", "backward", "missing"],
)
def test_what_cannot_be_compiled_runs_as_it_is(bert: Path, few: Dataset, backend: Any) -> None:
    plain = run_fit(load_tiny(bert, few), few, **TRAIN)
    pretrained = load_tiny(bert, few)
    pretrained.compiled = CompiledLayers(backend)
    found = run_fit(pretrained, few, compile=True, **TRAIN)
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)
    assert not pretrained.compiled.works


def test_too_much_to_compile_runs_as_it_is(
    bert: Path, few: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MOST_COMPILED", 1)
    counting, pretrained = Counting(), load_tiny(bert, few)
    pretrained.compiled = CompiledLayers(counting)
    for dropout in (0.0, 0.1, 0.2):
        run_fit(pretrained, few, compile=True, **{**TRAIN, "dropout": dropout})
    assert not pretrained.compiled.works


def test_running_out_of_memory_is_no_failure_to_compile(bert: Path, few: Dataset) -> None:
    layers = CompiledLayers("eager")
    layers._compiled = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA"))
    with pytest.raises(torch.OutOfMemoryError):
        layers.run(torch.nn.Linear(1, 1), (1,), torch.ones(1, 1))
    assert layers.works


@pytest.mark.parametrize(
    ("chosen", "pads", "expected"),
    [("auto", False, False), (True, False, True), (True, True, False), (False, False, False)],
)
def test_only_layers_without_padding_are_compiled_and_only_if_asked(
    chosen: Any, pads: bool, expected: bool
) -> None:
    assert is_compiled(chosen, pads) == expected


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_torchs_own_compiler_trains_the_same(bert: Path, few: Dataset) -> None:
    plain = run_fit(load_tiny(bert, few), few, **TRAIN)
    pretrained = load_tiny(bert, few)
    found = run_fit(pretrained, few, compile=True, **TRAIN)
    assert pretrained.compiled.works
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)
    wet = {**TRAIN, "compile": True, "dropout": 0.1}
    once = run_fit(pretrained, few, **wet)
    assert losses(run_fit(pretrained, few, **wet)) == losses(once)
    assert losses(once) != losses(found)
    assert losses(once) == pytest.approx(losses(found), abs=0.1)
    assert pretrained.compiled.works
