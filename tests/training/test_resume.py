"""A trial that is taken up again gives the numbers of one that never stopped, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_ray.config import Regularization, Train
from sft_ray.errors import DataError
from sft_ray.run_store import RunStore
from sft_ray.training import batches
from sft_ray.training.examples import Dataset
from sft_ray.training.last_state import LastState
from sft_ray.training.model import Pretrained
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import ResumeState, load_resume_state, save_resume_state
from sft_ray.training.tasks import TASKS
from tests.models import EveryStep, load_tiny, run_fit, task_dataset

L2_SP = Regularization(kind="l2_sp", strength=1e-3)
DECAY = Regularization(kind="weight_decay", strength=0.1)
SETTINGS = {"epochs": 2, "batch_size": 32, "learning_rate": 3e-3}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"regularization": DECAY},
    "adam": {"optimizer": "adam", "regularization": L2_SP, "schedule": "cosine"},
    "sgd": {"optimizer": "sgd", "regularization": DECAY, "learning_rate": 0.05},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.05},
    "layers": {"layer_decay": 0.7, "frozen_layers": 1, "head_learning_rate_multiplier": 3.0},
    "reinit": {"reinit_layers": 1, "dropout": 0.3, "regularization": L2_SP},
    "cooldown": {"schedule": "constant_with_cooldown", "micro_batch": 5, "warmup": 0.3},
    "loss": {"objective": "loss", "label_smoothing": 0.1, "class_weights": "balanced"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16", "rungs": (10,)},
}
ONE_STEP = {"epochs": 1, "batch_size": 150, "rungs": (1, 2, 10, 33, 49, 60)}


@pytest.fixture
def pretrained(tiny_bert: Path, toy: Dataset) -> Pretrained:
    return load_tiny(tiny_bert, toy)


def facts(reports: list[Progress]) -> list[dict[str, Any]]:
    """All that was reported but for times."""
    return [
        {k: v for k, v in r.facts().items() if not k.endswith("seconds")}
        | {"best": (r.best.percent, r.best.score, r.best.metrics)}
        for r in reports
    ]


def through_files(folder: Path, last: Progress) -> Any:
    folder.mkdir()
    save_resume_state(folder, last.resume_state())
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".safetensors"]
    return load_resume_state(folder)


def check_all_stops(
    pretrained: Pretrained, toy: Dataset, folder: Path, settings: dict[str, Any]
) -> None:
    """Stop after every mark but the last, go on from files, and compare with the whole."""
    whole = run_fit(pretrained, toy, **settings)
    assert [r.fault for r in whole] == [None] * len(whole)
    weights = {n: p.detach().clone() for n, p in pretrained.trainable().items()}
    for k in range(1, len(whole)):
        first = run_fit(pretrained, toy, stop_after=k, **settings)
        assert facts(first) == facts(whole[:k])
        state = through_files(folder / str(k), first[-1])
        run_fit(pretrained, toy, seed=3, epochs=1, learning_rate=0.01, optimizer="sgd")
        torch.manual_seed(k)
        rest = run_fit(pretrained, toy, resume=state, **settings)
        assert facts(rest) == facts(whole[k:])
        assert rest[-1].best.weights.keys() == whole[-1].best.weights.keys()
        for n, weight in whole[-1].best.weights.items():
            assert torch.equal(rest[-1].best.weights[n], weight), n
        assert np.array_equal(rest[-1].best.outputs, whole[-1].best.outputs)
        assert all(torch.equal(weights[n], p) for n, p in pretrained.trainable().items())


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_trial_equals_one_that_never_stopped(
    pretrained, toy, tmp_path: Path, name: str
) -> None:
    check_all_stops(pretrained, toy, tmp_path, {**SETTINGS, **CASES[name]})


def test_a_trial_resumed_between_marks_of_one_step_equals_the_whole(
    pretrained, toy, tmp_path: Path
) -> None:
    check_all_stops(pretrained, toy, tmp_path, {**SETTINGS, **ONE_STEP})


def test_a_trial_resumed_at_the_first_of_several_marks_of_a_step_equals_the_whole(
    pretrained, toy, tmp_path: Path
) -> None:
    settings = {**SETTINGS, **ONE_STEP}
    whole = run_fit(pretrained, toy, **settings)
    first = run_fit(pretrained, toy, stop_after=1, **settings)
    state = through_files(tmp_path / "state", first[-1])
    assert facts(run_fit(pretrained, toy, resume=state, **settings)) == facts(whole[1:])


def test_the_loss_scale_of_a_resumed_trial_grows_at_the_same_steps(
    pretrained, toy, monkeypatch
) -> None:
    make = torch.amp.GradScaler
    patched = partial(make, init_scale=2.0**6, growth_interval=4)
    monkeypatch.setattr(torch.amp, "GradScaler", patched)
    settings = {**SETTINGS, "precision": "fp16"}
    whole = run_fit(pretrained, toy, **settings)
    first = run_fit(pretrained, toy, stop_after=1, **settings)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(make, growth_interval=4))
    rest = run_fit(pretrained, toy, resume=first[-1].resume_state(), **settings)
    scales = [r[-1].resume_state().facts["loss_scaler"]["scale"] for r in (whole, rest)]
    assert scales[0] == scales[1]


def test_marks_of_one_step_are_indeed_marks_of_one_step(pretrained, toy) -> None:
    reports = run_fit(pretrained, toy, **{**SETTINGS, **ONE_STEP})
    assert [r.step for r in reports] == [1, 1, 1, 1, 1, 1, 2]
    assert len({r.train_loss for r in reports}) == 2


def test_a_trial_can_be_resumed_more_than_once(pretrained, toy, tmp_path: Path) -> None:
    whole = run_fit(pretrained, toy, **SETTINGS)
    reports, state = [], None
    while not reports or not reports[-1].finished:
        reports += run_fit(pretrained, toy, stop_after=1, resume=state, **SETTINGS)
        state = through_files(tmp_path / str(len(reports)), reports[-1])
    assert facts(reports) == facts(whole)
    assert run_fit(pretrained, toy, resume=state, **SETTINGS) == []


@pytest.mark.parametrize("name", ["adamw", "fp16"])
def test_a_trial_paused_before_any_step_equals_the_whole(
    pretrained, toy, tmp_path: Path, name: str
) -> None:
    settings = {**SETTINGS, **CASES[name]}
    whole = run_fit(pretrained, toy, **settings)
    for step in range(whole[-1].step):
        left = step

        def ask(activity: str) -> bool:
            nonlocal left
            left -= activity == "training"
            return left < 0

        paused: list[Any] = []
        first = run_fit(pretrained, toy, beat=ask, paused=paused, **settings)
        (state,) = paused
        assert state.facts["step"] == step
        folder = tmp_path / str(step)
        folder.mkdir()
        save_resume_state(folder, state)
        torch.manual_seed(step)
        rest = run_fit(pretrained, toy, resume=load_resume_state(folder), **settings)
        assert facts(first) + facts(rest) == facts(whole)
        for n, weight in whole[-1].best.weights.items():
            assert torch.equal(rest[-1].best.weights[n], weight), n


def test_a_trial_that_nobody_pauses_returns_no_state(pretrained, toy) -> None:
    heard: list[str] = []

    def listen(activity: str) -> bool:
        heard.append(activity)
        return False

    paused: list[Any] = []
    reports = run_fit(pretrained, toy, beat=listen, paused=paused, **SETTINGS)
    assert paused == [None]
    assert heard.count("training") == reports[-1].step
    assert heard.count("evaluation") >= len(reports)


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_pause_breaks_an_evaluation_off_which_is_made_anew(
    pretrained, toy, monkeypatch, number: int
) -> None:
    monkeypatch.setitem(batches.EVAL_TOKENS_PER_BATCH, "cpu", 200)  # several batches
    whole = run_fit(pretrained, toy, **SETTINGS)
    heard: list[str] = []

    def ask(activity: str) -> bool:
        heard.append(activity)
        return heard.count("evaluation") == number

    paused: list[Any] = []
    first = run_fit(pretrained, toy, beat=ask, paused=paused, **SETTINGS)
    assert heard[-1] == "evaluation"  # no further batch, and no step
    assert not pretrained.model.training
    (state,) = paused
    assert state.facts["step"] == whole[len(first)].step
    rest = run_fit(pretrained, toy, resume=state, **SETTINGS)
    assert facts(first) + facts(rest) == facts(whole)
    for name, weight in whole[-1].best.weights.items():
        assert torch.equal(rest[-1].best.weights[name], weight), name


def test_states_written_between_steps_change_nothing_and_lead_to_the_same_end(
    pretrained, toy
) -> None:
    whole = run_fit(pretrained, toy, **SETTINGS)
    last = EveryStep()
    assert facts(run_fit(pretrained, toy, last=last, **SETTINGS)) == facts(whole)
    assert [state.facts["step"] for state in last.states] == [*range(whole[-1].step)]
    for state in last.states[1::3]:
        passed = sum(mark.step <= state.facts["step"] for mark in whole)
        rest = run_fit(pretrained, toy, resume=state, **SETTINGS)
        assert facts(rest) == facts(whole[passed:])


def test_a_state_is_written_when_it_is_due_and_between_marks(
    pretrained, toy, tmp_path: Path, monkeypatch
) -> None:
    now, step_at = 0.0, []
    monkeypatch.setattr("sft_ray.training.last_state.time.monotonic", lambda: now)
    train = Train(precision="fp32", **SETTINGS)
    store = RunStore(str(tmp_path), "run")
    last = LastState(store, "trials/0", 2.0, train, 17, lambda: {"said": len(step_at)})

    def a_minute_later(activity: str) -> bool:
        nonlocal now
        if activity == "training":
            now += 60
            state = last.load()
            step_at.append(None if state is None else state.facts["step"])
        return False

    run_fit(
        pretrained,
        toy,
        beat=a_minute_later,
        last=last,
        epochs=1,
        rungs=(),
        **{k: v for k, v in SETTINGS.items() if k != "epochs"},
    )
    assert step_at[:7] == [None, None, 1, 1, 3, 3, 5]
    state = last.load()
    assert state is not None
    assert state.facts["said"] == state.facts["step"] + 1


def test_seconds_run_on_from_those_of_the_state(pretrained, toy) -> None:
    *_, last = run_fit(pretrained, toy, stop_after=2, **SETTINGS)
    state = last.resume_state()
    state.facts["seconds"] = {"train": 1000.0, "eval": 500.0}
    later, *_ = run_fit(pretrained, toy, resume=state, **SETTINGS)
    assert 1000 < later.train_seconds < 1100
    assert 500 < later.eval_seconds < 600


def test_a_state_is_a_copy_that_training_on_does_not_change(pretrained, toy) -> None:
    states: list[ResumeState] = []
    copies: list[dict[str, torch.Tensor]] = []

    def keep(progress: Progress) -> bool:
        states.append(progress.resume_state())
        copies.append({name: tensor.clone() for name, tensor in states[-1].tensors.items()})
        return True

    run_fit(pretrained, toy, also=keep, **SETTINGS)
    assert len(states) == 4
    for state, copy in zip(states, copies, strict=True):
        assert all(torch.equal(state.tensors[n], tensor) for n, tensor in copy.items())
    assert not torch.equal(
        states[0].tensors["weight/classifier.weight"], copies[1]["weight/classifier.weight"]
    )


def test_a_state_is_not_changed_by_the_trial_that_goes_on_from_it(pretrained, toy) -> None:
    (report,) = run_fit(pretrained, toy, stop_after=1, **SETTINGS)
    state = report.resume_state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    run_fit(pretrained, toy, resume=state, **SETTINGS)
    assert all(torch.equal(state.tensors[n], tensor) for n, tensor in before.items())


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_resumed(name: str, tmp_path: Path, wide_bert: Path) -> None:
    task = TASKS[name]
    dataset = task_dataset(tmp_path / "rows", name, wide_bert, train=40, validation=20)
    pretrained = load_tiny(wide_bert, dataset, task=task)
    settings = {"task": task, "epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
    whole = run_fit(pretrained, dataset, **settings)
    first = run_fit(pretrained, dataset, stop_after=2, **settings)
    state = through_files(tmp_path / "state", first[-1])
    assert facts(run_fit(pretrained, dataset, resume=state, **settings)) == facts(whole[2:])


def test_a_best_mark_before_the_stop_is_kept(pretrained, toy, tmp_path: Path) -> None:
    labels = (toy.validation.labels + 1) % 3
    misleading = replace(toy, validation=replace(toy.validation, labels=labels))
    settings = {**SETTINGS, "epochs": 6, "learning_rate": 5e-3, "batch_size": 16}
    whole = run_fit(pretrained, misleading, **settings)
    assert whole[-1].best.percent < 50
    k = len(whole) - 1
    first = run_fit(pretrained, misleading, stop_after=k, **settings)
    state = through_files(tmp_path / "state", first[-1])
    (last,) = run_fit(pretrained, misleading, resume=state, **settings)
    assert facts([last]) == facts(whole[-1:])
    assert all(torch.equal(last.best.weights[n], w) for n, w in whole[-1].best.weights.items())


def test_a_fault_can_not_be_resumed_from(pretrained, toy) -> None:
    *_, fault = run_fit(pretrained, toy, epochs=1, warmup=0.0, learning_rate=1e30)
    assert fault.fault
    assert fault.resume_state is None


@pytest.mark.parametrize("damage", ["truncated tensors", "no tensors", "cut facts", "no facts"])
def test_a_damaged_state_is_a_data_error_that_names_the_folder(
    pretrained, toy, tmp_path: Path, damage: str
) -> None:
    (report,) = run_fit(pretrained, toy, stop_after=1, **SETTINGS)
    folder = tmp_path / "state"
    through_files(folder, report)
    kind = ".safetensors" if "tensors" in damage else ".json"
    (file,) = folder.glob(f"*{kind}")
    if damage.startswith("no"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{folder}: the checkpoint cannot be read"):
        load_resume_state(folder)
