"""Recorded passes train as others do, and nothing in them looks at what differs between batches.

No graph is recorded here: a pass is run again on the memory of the first batch of its shape, which
shows all but what a GPU makes of it (tests/test_gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sft_ray.config import Regularization
from sft_ray.errors import TrialError
from sft_ray.training import backward, cuda_graphs
from sft_ray.training.batches import collate
from sft_ray.training.cuda_graphs import RecordedPasses, is_recorded
from sft_ray.training.examples import Dataset
from sft_ray.training.families import FAMILIES
from sft_ray.training.forward import forward_loss
from sft_ray.training.losses import LossOptions
from sft_ray.training.micro_batch import StepOutOfMemoryError
from sft_ray.training.model import Pretrained, load_pretrained
from sft_ray.training.progress import Progress
from sft_ray.training.tasks import TASKS
from sft_ray.training.world import World
from tests.models import CPU, PAD, load_tiny, run_fit, task_dataset, tiny_model_folder, toy_dataset

PACKED = [name for name, family in FAMILIES.items() if not family.pads]
L2_SP = Regularization(kind="l2_sp", strength=0.01)
TRAIN = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "dropout": 0.0}


class Again:
    """Runs a pass again, and counts the recorded ones."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.count += 1
        run()  # as those that warm up
        return run


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("few"), tiny_bert, train=64, validation=16)


@pytest.fixture
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "is_recorded", lambda chosen, world, pads: chosen and not pads)


def losses(reports: list[Progress]) -> list[float]:
    return [report.train_loss for report in reports]


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {"epochs": 1}) for family in PACKED),
        ("bert", {"micro_batch": 5, "frozen_layers": 1}),
        ("bert", {"class_weights": "balanced", "regularization": L2_SP}),
        ("bert", {"precision": "fp16", "frozen_layers": "all", "optimizer": "sgd"}),
    ],
)
def test_recorded_passes_train_as_others(
    tmp_path: Path, few: Dataset, family: str, settings: dict[str, Any]
) -> None:
    folder = tiny_model_folder(tmp_path / "model", family, 2)
    expected = run_fit(load_tiny(folder, few), few, **{**TRAIN, **settings})
    pretrained = load_tiny(folder, few)
    pretrained.recorded = RecordedPasses(Again)
    found = run_fit(pretrained, few, cuda_graphs=True, **{**TRAIN, **settings})
    near = 1e-3 if "precision" in settings else 1e-5
    assert losses(found) == pytest.approx(losses(expected), abs=near)
    assert found[-1].metrics == pytest.approx(expected[-1].metrics, abs=10 * near)


@pytest.mark.usefixtures("_on_a_cpu")
def test_trials_share_what_was_recorded(tiny_bert: Path, few: Dataset) -> None:
    pretrained, again = load_tiny(tiny_bert, few), Again()
    pretrained.recorded = RecordedPasses(lambda: again)

    def train(**settings: Any) -> list[float]:
        chosen = {**TRAIN, "cuda_graphs": True, **settings}
        return losses(run_fit(pretrained, few, **chosen))

    first, shapes = train(), again.count
    assert 1 <= shapes < TRAIN["epochs"] * 64 / TRAIN["batch_size"]
    train(learning_rate=1e-2)
    assert again.count == shapes
    assert train(frozen_layers=1) != first  # other weights have gradients
    assert again.count > shapes
    train(dropout=0.5)
    recorded = again.count
    assert train() == first
    assert again.count == recorded  # its layers are trained where they were
    assert train(cuda_graphs=False) == pytest.approx(first, abs=1e-5)


def refuses(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    run()
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.usefixtures("_on_a_cpu")
def test_what_cannot_be_recorded_is_said_with_the_way_out(tiny_bert: Path, few: Dataset) -> None:
    pretrained = load_tiny(tiny_bert, few)
    pretrained.recorded = RecordedPasses(lambda: refuses)
    with pytest.raises(TrialError, match=r"cuda_graphs: .* not permitted .*; set it to false"):
        run_fit(pretrained, few, cuda_graphs=True, **TRAIN)


@pytest.mark.usefixtures("_on_a_cpu")
def test_no_room_to_record_is_out_of_memory(tiny_bert: Path, few: Dataset) -> None:
    again = Again()

    def has_no_room(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if again.count == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return again(run)

    pretrained = load_tiny(tiny_bert, few)
    pretrained.recorded = RecordedPasses(lambda: has_no_room)
    with pytest.raises(StepOutOfMemoryError):
        run_fit(pretrained, few, cuda_graphs=True, **TRAIN)
    assert not pretrained.recorded._graphs  # their memory is free for what comes next


@pytest.mark.usefixtures("_on_a_cpu")
def test_too_many_graphs_make_room(
    tiny_bert: Path, few: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 1)
    pretrained = load_tiny(tiny_bert, few)
    expected = losses(run_fit(pretrained, few, **TRAIN))
    pretrained.recorded = RecordedPasses(Again)
    found = losses(run_fit(pretrained, few, cuda_graphs=True, **TRAIN))
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(pretrained.recorded._graphs) == 1


class ReadsNothing(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, "a number is read"
        assert "nonzero" not in name, "a shape depends on numbers"
        assert "masked_select" not in name, "a shape depends on numbers"
        return func(*args, **(kwargs or {}))


def loss_reading_nothing(pretrained: Pretrained, dataset: Dataset, task: Any) -> torch.Tensor:
    batch = collate(dataset.train, np.arange(3), pad_token=PAD, device=CPU, fill_to=4)
    pretrained.reset(0, dropout=0.0)
    with ReadsNothing():
        loss = forward_loss(pretrained.model, batch, task, LossOptions(), torch.float32)
        loss.backward()
    return loss.detach()


@pytest.mark.parametrize("family", PACKED)
def test_no_family_reads_a_number_in_a_pass(tmp_path: Path, few: Dataset, family: str) -> None:
    pretrained = load_tiny(tiny_model_folder(tmp_path / "model", family, 2), few)
    assert loss_reading_nothing(pretrained, few, TASKS["text-classification"]).isfinite()


@pytest.mark.parametrize("name", TASKS)
def test_no_task_reads_a_number_in_a_pass(tmp_path: Path, tiny_bert: Path, name: str) -> None:
    dataset, task = task_dataset(tmp_path, name, tiny_bert), TASKS[name]
    pretrained = load_pretrained(str(tiny_bert), task, dataset.label_set, seed=1, device=CPU)
    assert loss_reading_nothing(pretrained, dataset, task).isfinite()


@pytest.mark.parametrize(
    ("chosen", "device", "size", "pads", "expected"),
    [
        (True, "cuda", 1, False, True),
        (False, "cuda", 1, False, False),
        (True, "cpu", 1, False, False),
        (True, "cuda", 2, False, False),
        (True, "cuda", 1, True, False),
    ],
)
def test_one_worker_on_a_gpu_records(
    chosen: bool, device: str, size: int, pads: bool, expected: bool
) -> None:
    world = World(0, size, torch.device(device))
    assert is_recorded(chosen, world, pads) == expected
