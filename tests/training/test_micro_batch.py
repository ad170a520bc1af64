"""How many examples go through the model at once: tried on a GPU, measured on a CPU."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sft_ray.config import Train
from sft_ray.training import fitting, forward, micro_batch, trunk_cache
from sft_ray.training.backward import Backward
from sft_ray.training.beat import no_beat
from sft_ray.training.examples import Dataset
from sft_ray.training.losses import LossOptions
from sft_ray.training.micro_batch import (
    NothingFitsError,
    StepOutOfMemoryError,
    is_out_of_memory,
    kept_bytes,
    largest_that_fits,
    probe_on_a_cpu,
)
from sft_ray.training.setup import Setup
from sft_ray.training.trunk_cache import TrunkCache
from sft_ray.training.world import World
from tests.models import PAD, TASK, load_tiny, run_fit, tiny_model_folder

MIB = 2**20


class Memory:
    """An attempt that runs out of memory above a size, and what was tried."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error, self.tried = room, error, []

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.room:
            raise self.error


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("most", "room", "tried"),
    [
        (32, 32, [32]),
        (32, 9, [32, 16, 8]),
        (32, 1, [32, 16, 8, 4, 2, 1]),
        (7, 2, [7, 3, 1]),
        (1, 5, [1]),
    ],
)
def test_the_size_is_halved_until_it_fits(error, most: int, room: int, tried: list[int]) -> None:
    memory = Memory(room, error)
    assert largest_that_fits(memory, most) == tried[-1]
    assert memory.tried == tried


def test_nothing_fits_if_one_example_does_not() -> None:
    memory = Memory(0, torch.OutOfMemoryError("full"))
    with pytest.raises(NothingFitsError, match="out of memory at micro-batch 1"):
        largest_that_fits(memory, 4)
    assert memory.tried == [4, 2, 1]


def test_other_errors_pass_through() -> None:
    memory = Memory(1, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        largest_that_fits(memory, 4)
    assert memory.tried == [4]


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("CUDA error"), KeyError("a")])
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_gpu_says_in_many_ways_that_it_is_full(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(ValueError(said))


STARVED = """
import resource, torch
from sft_ray.training.micro_batch import is_out_of_memory, largest_that_fits
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20,) * 2)
try:
    torch.ones(2**32, dtype=torch.float32)
except Exception as error:
    print(is_out_of_memory(error), type(error).__name__)
else:
    print("no error")
print(largest_that_fits(lambda size: torch.ones(size, 16, 2**20), 64) < 16)
"""


def test_a_real_lack_of_memory_is_recognised_and_survived() -> None:
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "RuntimeError", "True"], done.stderr[-2000:]


def keeping(nbytes: int):
    """A forward pass that keeps so many bytes for the backward pass."""
    return torch.ones(nbytes // 4, requires_grad=True).exp


@pytest.mark.parametrize(
    ("memory", "per_pass", "fits"),
    [(64, 0, 32), (64, 7, 25), (8, 0, 4), (8, 1, 3), (8, 5, 1), (2, 0, 1), (10**6, 20, 499_980)],
)
def test_a_cpu_takes_as_many_as_half_of_its_memory_holds(monkeypatch, memory, per_pass, fits):
    monkeypatch.setattr(micro_batch, "worker_memory_bytes", lambda: memory * MIB)
    asked = []

    def kept(size: int) -> int:
        asked.append(size)
        return kept_bytes(keeping((per_pass + size) * MIB), [])

    probe = probe_on_a_cpu(kept)
    assert probe.fits == fits
    assert probe.kept_bytes(1) == (per_pass + 1) * MIB
    if asked == [1]:  # two would not fit
        assert 2 * (per_pass + 1) > memory / 2
    else:
        assert probe.kept_bytes(7) == (per_pass + 7) * MIB


def test_a_pass_that_keeps_nothing_fits_at_any_size() -> None:
    assert kept_bytes(lambda: torch.ones(4), []) == 0
    probe = probe_on_a_cpu(lambda size: 0)
    assert probe.fits > MIB
    assert probe.kept_bytes(1000) == 0


def test_weights_do_not_count_for_every_example() -> None:
    layer = torch.nn.Linear(1024, 1024)  # 4 MiB
    found = kept_bytes(lambda: layer(layer(torch.ones(1, 1024))), layer.parameters())
    assert 0 < found < MIB


def test_a_worker_has_its_share_of_the_containers_memory(monkeypatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(f"{1024 * MIB}\n")
    monkeypatch.setattr(micro_batch, "CGROUP_LIMIT", limit)
    monkeypatch.setattr(micro_batch, "CGROUP_CPUS", tmp_path / "none")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert micro_batch.worker_memory_bytes() == 256 * MIB
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert micro_batch.worker_memory_bytes() == 1024 * MIB
    limit.write_text("max\n")
    assert micro_batch.worker_memory_bytes() > 1024 * MIB
    monkeypatch.setattr(micro_batch, "CGROUP_LIMIT", tmp_path / "none")
    assert micro_batch.worker_memory_bytes() > 1024 * MIB


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("400000 100000", 4), ("350000 100000", 3), ("50000 100000", 1), ("max 100000", 64)],
)
def test_a_containers_memory_is_shared_by_the_cpus_of_its_quota(
    monkeypatch, tmp_path: Path, quota: str, cpus: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    limits = {name: tmp_path / name for name in ("memory.max", "cpu.max")}
    limits["memory.max"].write_text(f"{1024 * MIB}\n")
    limits["cpu.max"].write_text(f"{quota}\n")
    monkeypatch.setattr(micro_batch, "CGROUP_LIMIT", limits["memory.max"])
    monkeypatch.setattr(micro_batch, "CGROUP_CPUS", limits["cpu.max"])
    assert micro_batch.num_cpus() == cpus
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert micro_batch.worker_memory_bytes() == 1024 * MIB / cpus


# -- in a trial ----------------------------------------------------------------------------------

SETTINGS = {"rungs": (), "epochs": 1, "dropout": 0.0}


def test_a_trial_follows_the_memory_and_learns_the_same(tiny_bert, toy, monkeypatch) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    found = {}
    for mebibytes in (4000, 0.6, 0.1):
        monkeypatch.setattr(micro_batch, "worker_memory_bytes", lambda m=mebibytes: m * MIB)
        (report,) = run_fit(pretrained, toy, **SETTINGS)
        found[report.micro_batch] = report.train_loss
    sizes = list(found)
    assert len(sizes) == 3
    assert sizes[0] == 32  # the whole batch: it needs no padding
    assert 1 < sizes[1] < 32
    assert sizes[2] == 1
    assert list(found.values()) == pytest.approx([found[sizes[0]]] * 3, abs=1e-5)


def test_a_configured_size_is_taken_and_never_exceeds_the_batch(tiny_bert, toy: Dataset) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    for configured, taken in ((5, 5), (32, 32), (500, 32)):
        (report,) = run_fit(pretrained, toy, **SETTINGS, micro_batch=configured)
        assert report.micro_batch == taken


@pytest.mark.parametrize("configured", ["auto", 20])
def test_it_is_halved_after_running_out_of_memory(tiny_bert, toy: Dataset, configured) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    (report,) = run_fit(pretrained, toy, **SETTINGS, micro_batch=configured, halvings=2)
    assert report.micro_batch == (8 if configured == "auto" else 5)
    (report,) = run_fit(pretrained, toy, **SETTINGS, micro_batch=configured, halvings=9)
    assert report.micro_batch == 1


@pytest.mark.parametrize("configured", ["auto", 4, 20])
def test_no_more_are_taken_than_may_fit(tiny_bert, toy: Dataset, configured) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    (report,) = run_fit(pretrained, toy, **SETTINGS, micro_batch=configured, most_examples=8)
    assert report.micro_batch == (4 if configured == 4 else 8)


@pytest.mark.parametrize("name", ["mpnet", "bert"])
def test_little_is_computed_on_padding(tmp_path, toy: Dataset, name: str) -> None:
    pretrained = load_tiny(tiny_model_folder(tmp_path, name), toy)
    (report,) = run_fit(pretrained, toy, **SETTINGS)
    assert report.micro_batch == 32
    assert 0 < report.padding_share < (0.05 if name == "bert" else 0.15)


def test_the_probe_leaves_no_trace_in_the_trial(tiny_bert, toy: Dataset) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    settings = {"rungs": (), "epochs": 1, "dropout": 0.3}
    probed, told = (run_fit(pretrained, toy, **settings, micro_batch=m)[0] for m in ("auto", 32))
    assert probed.train_loss == told.train_loss
    assert probed.metrics == told.metrics


def test_a_trial_of_which_not_one_example_fits_is_one_fault(tiny_bert, toy, monkeypatch) -> None:
    def full(forward, weights) -> int:
        raise NothingFitsError("out of memory at micro-batch 1")

    monkeypatch.setattr(micro_batch, "kept_bytes", full)
    pretrained = load_tiny(tiny_bert, toy)
    reports = run_fit(pretrained, toy, epochs=2)
    assert [r.fault for r in reports] == ["out of memory at micro-batch 1"]
    assert (reports[0].step, reports[0].best, reports[0].resume_state) == (0, None, None)
    monkeypatch.undo()
    assert run_fit(pretrained, toy, epochs=1)[-1].finished


def test_the_memory_of_a_trial_shrinks_with_what_is_trained(tiny_bert, toy) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    all_of_it, head = (run_fit(pretrained, toy, epochs=1, frozen_layers=k)[-1] for k in (0, "all"))
    model = sum(p.numel() * p.element_size() for p in pretrained.model.parameters())
    # Weights, gradients and the two moments of AdamW, and what activations keep beside them.
    assert all_of_it.memory_bytes > model + 3 * 4 * all_of_it.trained_parameters
    assert head.trained_parameters < all_of_it.trained_parameters / 5
    assert model < head.memory_bytes < all_of_it.memory_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_pass_keeps_grows_by_examples_and_not_by_casts(tmp_path, toy, precision) -> None:
    pretrained = load_tiny(tiny_model_folder(tmp_path, hidden=128), toy)
    settings = {**SETTINGS, "precision": precision}
    (few, many) = (
        run_fit(pretrained, toy, **settings, micro_batch=size)[0].memory_bytes for size in (1, 32)
    )
    weights = sum(p.numel() for p in pretrained.trainable().values())
    # 31 more examples of a dozen tokens, not 31 times the weights in bf16.
    assert 31 * 10_000 < many - few < 31 * weights


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("sgd", 1)])
def test_the_probe_of_a_gpu_holds_what_comes_up_with_the_first_step(
    tiny_bert, toy: Dataset, monkeypatch, optimizer: str, states: int
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    setup = Setup(TASK, toy, pretrained, SimpleNamespace(pad_token_id=PAD), World())
    pretrained.reset(0)
    train = Train(precision="fp32", batch_size=8, optimizer=optimizer)
    backward = Backward(train, setup, torch.float32, LossOptions(0.0))
    collate = backward._collate
    on_a_gpu = World(device=SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    held, passes, empty_like = [], [], torch.empty_like

    def holding(weight: torch.Tensor) -> torch.Tensor:
        held.append(weight.numel())
        return empty_like(weight)

    def on_the_cpu(items, trunk, fill_to):
        lying = sum(p.grad.numel() for p in pretrained.trainable().values() if p.grad is not None)
        passes.append((len(items), sum(held), lying))
        held.clear()
        if len(items) == 8:
            raise torch.OutOfMemoryError("full")
        backward.world = World()
        batch = collate(items, trunk, fill_to)
        backward.world = on_a_gpu
        return batch

    monkeypatch.setattr(torch, "empty_like", holding)
    monkeypatch.setattr(backward, "_collate", on_the_cpu)
    backward.world = on_a_gpu
    assert backward._find(8, 8).fits == 4
    weights = sum(p.numel() for p in pretrained.trainable().values())
    kept = states * weights
    assert passes == [(1, kept, weights), (8, kept, 0), (4, kept, weights)]
    assert all(p.grad is None for p in pretrained.trainable().values())


def test_a_cpu_is_asked_once_whatever_the_batch_size_and_the_optimiser(
    tiny_bert, toy: Dataset
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    setup = Setup(TASK, toy, pretrained, SimpleNamespace(pad_token_id=PAD), World())
    pretrained.reset(0)
    for settings in ({"batch_size": 16}, {"batch_size": 32}, {"optimizer": "sgd"}):
        train = Train.model_validate({"precision": "fp32", **settings})
        Backward(train, setup, torch.float32, LossOptions(0.0), most_examples=8)
    assert len(setup.micro_batches) == 1


@pytest.mark.parametrize(
    "changes", [{"dropout": 0.1}, {"label_smoothing": 0.1}, {"class_weights": "balanced"}]
)
def test_what_a_trial_keeps_does_not_depend_on_who_came_before(
    tiny_bert, toy: Dataset, changes: dict
) -> None:
    pretrained = load_tiny(tiny_bert, toy)

    def kept(setup: Setup, settings: dict) -> int:
        train = Train.model_validate({"precision": "fp32", "dropout": 0.0, **settings})
        pretrained.reset(0, dropout=train.dropout)
        options = forward.loss_options(train, setup)
        return Backward(train, setup, torch.float32, options).memory_bytes([])

    def setup() -> Setup:
        return Setup(TASK, toy, pretrained, SimpleNamespace(pad_token_id=PAD), World())

    alone, shared = [kept(setup(), settings) for settings in ({}, changes)], setup()
    assert alone[0] < alone[1]
    assert [kept(shared, settings) for settings in ({}, changes, {})] == [*alone, alone[0]]


def of_graphs() -> int:
    """How many tensors there are that passes have made, and may want back."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    return sum(tensor.grad_fn is not None for tensor in tensors)


def test_looking_at_what_a_pass_keeps_keeps_nothing(tiny_bert, toy: Dataset) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    setup = Setup(TASK, toy, pretrained, SimpleNamespace(pad_token_id=PAD), World())
    pretrained.reset(0)
    before = of_graphs()
    Backward(Train(precision="fp32"), setup, torch.float32, LossOptions(0.0))
    assert len(setup.micro_batches) == 1
    assert of_graphs() <= before


def test_an_evaluation_that_does_not_fit_is_done_in_parts(
    tiny_bert, toy: Dataset, monkeypatch
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    (whole,) = run_fit(pretrained, toy, **SETTINGS)
    honest, sizes = forward.model_outputs, []

    def few(model, batch):
        size = len(batch.inputs["attention_mask"])
        if not model.training:
            sizes.append(size)
            if size > 10:
                raise torch.OutOfMemoryError("full")
        return honest(model, batch)

    monkeypatch.setattr(forward, "model_outputs", few)
    (parts,) = run_fit(pretrained, toy, **SETTINGS)
    assert max(sizes) > 10
    assert sum(size for size in sizes if size <= 10) == len(toy.validation)
    np.testing.assert_allclose(parts.best.outputs, whole.best.outputs, atol=1e-5)


def full(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("place", ["evaluate", "bind_penalty"])
def test_a_lack_of_memory_beside_the_steps_is_handled_like_one_in_them(
    tiny_bert, toy: Dataset, monkeypatch, place: str
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    monkeypatch.setattr(fitting, place, full)
    with pytest.raises(StepOutOfMemoryError, match="out of memory at micro-batch 16"):
        run_fit(pretrained, toy, epochs=1, halvings=1)


@pytest.mark.parametrize("configured", ["auto", 4])
def test_a_lack_of_memory_before_the_steps_tells_what_they_would_have_had(
    tiny_bert, toy: Dataset, monkeypatch, configured
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    monkeypatch.setattr(World, "wrap", full)
    size = 4 if configured == 4 else 8
    with pytest.raises(StepOutOfMemoryError, match=f"out of memory at micro-batch {size}"):
        run_fit(pretrained, toy, epochs=1, micro_batch=configured, most_examples=8)


def test_a_trunk_that_does_not_fit_into_memory_is_computed_each_time(
    tiny_bert, toy: Dataset, monkeypatch
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    cache = TrunkCache(pretrained, toy, World(), PAD)
    monkeypatch.setattr(trunk_cache, "RATES", {})  # so that they are measured
    monkeypatch.setattr(trunk_cache, "trunk_output", full)
    assert not cache.pays("train", 1, torch.float32, passes=100)
    assert cache.open(["train"], 1, torch.float32, no_beat) == {}
    assert not cache.folder("train", 1, torch.float32).exists()
