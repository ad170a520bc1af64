"""Half precision: fp16 with loss scaling and bf16 train, and stop at what no scale can mend."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_ray.training import backward
from sft_ray.training.examples import Dataset
from sft_ray.training.model import Pretrained
from sft_ray.training.tasks import TASKS
from sft_ray.training.world import resolve_precision
from tests.models import CPU, load_tiny, run_fit, task_dataset

SETTINGS = {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3, "dropout": 0.0}


@pytest.fixture
def pretrained(tiny_bert: Path, toy: Dataset) -> Pretrained:
    return load_tiny(tiny_bert, toy)


@pytest.fixture
def scaler_of(monkeypatch: pytest.MonkeyPatch) -> list[torch.amp.GradScaler]:
    """The scalers that trials make, in their order."""
    made: list[torch.amp.GradScaler] = []
    honest = torch.amp.GradScaler

    def make(*arguments, **options):
        made.append(honest(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", make)
    return made


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 5e-3), ("bf16", 3e-2)])
def test_half_precision_stays_close_to_fp32(pretrained, toy, precision, tolerance) -> None:
    rungs = tuple(range(10, 100, 10))
    exact = run_fit(pretrained, toy, **SETTINGS, rungs=rungs)
    half = run_fit(pretrained, toy, **SETTINGS, rungs=rungs, precision=precision)
    assert [r.fault for r in half] == [None] * 10
    expected = [r.train_loss for r in exact]
    np.testing.assert_allclose([r.train_loss for r in half], expected, atol=tolerance)
    assert [r.train_loss for r in half] != expected
    assert all(p.dtype == torch.float32 for p in pretrained.trainable().values())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_tiny_model_learns_in_half_precision(pretrained, toy, precision: str) -> None:
    settings = {"epochs": 8, "batch_size": 16, "learning_rate": 5e-3}
    last = run_fit(pretrained, toy, **settings, precision=precision)[-1]
    assert last.fault is None
    assert last.best.score > 0.9


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_in_half_precision(name, precision, tmp_path, wide_bert) -> None:
    task = TASKS[name]
    dataset = task_dataset(tmp_path, name, wide_bert, train=32, validation=12)
    pretrained = load_tiny(wide_bert, dataset, task=task)
    reports = run_fit(pretrained, dataset, task=task, **SETTINGS, precision=precision)
    assert [r.fault for r in reports] == [None] * len(reports)
    assert all(math.isfinite(v) for r in reports for v in (r.train_loss, *r.metrics.values()))


def test_an_overflow_halves_the_loss_scale_and_leaves_out_the_step(
    pretrained, toy, monkeypatch, scaler_of
) -> None:
    honest, calls = backward.forward_loss, []

    def overflowing(*arguments):
        loss = honest(*arguments)
        if len(arguments[1].labels) > 2:  # the probe looks at one example, and at two
            calls.append(loss)
        if len(calls) == 4:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(backward, "forward_loss", overflowing)
    settings = {**SETTINGS, "micro_batch": 32, "precision": "fp16", "warmup": 0.0}
    reports = run_fit(pretrained, toy, **settings, rungs=(30, 40, 50))
    assert [r.fault for r in reports] == [None] * 4
    assert reports[-1].finished
    assert scaler_of[0].get_scale() == 2.0**15
    before, after = reports[0], reports[1]
    assert (before.step, after.step) == (3, 4)
    assert after.metrics == before.metrics
    assert reports[2].metrics != before.metrics


def test_an_overflow_in_the_first_step_is_nothing_to_warn_of(pretrained, toy, monkeypatch) -> None:
    make = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(make, init_scale=2.0**24))
    (report,) = run_fit(pretrained, toy, **SETTINGS, precision="fp16", rungs=(), stop_after=1)
    assert report.fault is None


def test_an_overflow_in_the_first_step_does_not_end_the_trial(pretrained, toy, monkeypatch) -> None:
    make = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(make, init_scale=2.0**24))
    settings = {**SETTINGS, "micro_batch": 32, "precision": "fp16"}
    reports = run_fit(pretrained, toy, **settings, rungs=())
    assert [r.fault for r in reports] == [None]
    assert math.isfinite(reports[0].train_loss)


def test_the_loss_scale_is_part_of_the_state(pretrained, toy, monkeypatch) -> None:
    make = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(make, init_scale=2.0**10))
    settings = {**SETTINGS, "precision": "fp16"}
    (first,) = run_fit(pretrained, toy, **settings, stop_after=1)
    state = first.resume_state()
    assert state.facts["loss_scaler"]["scale"] == 2.0**10
    state.facts["loss_scaler"]["scale"] = 2.0**7
    monkeypatch.undo()
    later, *_ = run_fit(pretrained, toy, **settings, resume=state)
    assert later.resume_state().facts["loss_scaler"]["scale"] == 2.0**7


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_loss_that_is_not_finite_ends_the_trial(
    pretrained, toy, monkeypatch, precision: str
) -> None:
    honest, calls = backward.forward_loss, []

    def poisoned(*arguments):
        if len(arguments[1].labels) <= 2:  # the probe looks at one example, and at two
            return honest(*arguments)
        calls.append(1)
        return honest(*arguments) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(backward, "forward_loss", poisoned)
    settings = {**SETTINGS, "micro_batch": 32, "precision": precision}
    reports = run_fit(pretrained, toy, **settings, rungs=())
    assert len(reports) == 1
    assert "loss or gradient not finite at step 3" in reports[0].fault
    assert reports[0].best is None


def test_a_gradient_that_overflows_at_every_scale_ends_the_trial(
    pretrained, toy, monkeypatch
) -> None:
    honest = backward.forward_loss

    def overflowing(*arguments):
        loss = honest(*arguments)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(backward, "forward_loss", overflowing)
    settings = {**SETTINGS, "epochs": 3, "micro_batch": 32, "precision": "fp16"}
    reports = run_fit(pretrained, toy, **settings, rungs=())
    assert "not finite" in reports[-1].fault
    assert reports[-1].step == 17  # the scale falls from 2^16 to 1 in 16 steps


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_a_configured_precision_is_taken_as_it_is(precision: str, dtype: torch.dtype) -> None:
    found, reason = resolve_precision(precision, CPU)
    assert found == dtype
    assert reason.startswith("as configured")


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16", None])
def test_auto_takes_what_the_processor_multiplies_natively(monkeypatch, capability) -> None:
    known = {"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**known, capability: True})
    found, reason = resolve_precision("auto", CPU)
    assert found == (torch.bfloat16 if capability else torch.float32)
    assert ("neither" in reason) == (capability is None)
