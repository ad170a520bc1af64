"""How many trials share a GPU: the decision, and all of the measurement that needs no GPU."""

from __future__ import annotations

import os
import pickle
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sft_ray.config import Experiment, Train
from sft_ray.errors import DataError
from sft_ray.screen import Screen
from sft_ray.search import gpu_probe, planning, sharing, worker
from sft_ray.search.gpu_probe import device_seconds, probe
from sft_ray.search.layout import plan_layout
from sft_ray.search.planning import run_plan
from sft_ray.search.preflight import prepare_experiment
from sft_ray.search.sharing import (
    MOST_TRIALS,
    Findings,
    Sharing,
    decide,
    heaviest,
    most_slots,
    shared_layout,
    trains_of_search,
    without_probe,
)
from sft_ray.search.speed import Speed

GB = 10**9
IDLE = Findings(busy_share=0.11, trial_bytes=2 * GB, context_bytes=GB // 2, gpu_bytes=80 * GB)
ROOMY = {"CPU": 64.0, "GPU": 2.0}


def auto(experiment: Experiment, **resources: Any) -> Experiment:
    """The experiment with one worker per trial, whose GPUs are shared by as many as pays."""
    tree = experiment.to_tree()
    tree["resources"] = {"trials_per_gpu": "auto", "workers_per_trial": 1, **resources}
    tree["search"]["trials"] = 100
    return Experiment.from_tree(tree)


def found(**changes: Any) -> Findings:
    return Findings(**{**vars(IDLE), **changes})


@pytest.mark.parametrize(
    ("findings", "has", "cpus_per_worker", "slots", "number", "why"),
    [
        (found(busy_share=0.95), ROOMY, 1, 100, 2, "enough to keep it busy"),
        (found(busy_share=1.0), ROOMY, 1, 100, 1, "enough to keep it busy"),
        (found(busy_share=1.02), ROOMY, 1, 100, 1, "enough to keep it busy"),
        (found(busy_share=1 / 3), ROOMY, 1, 100, 3, "enough to keep it busy"),
        (found(busy_share=0.3), ROOMY, 1, 100, 4, "enough to keep it busy"),
        (found(trial_bytes=20 * GB), ROOMY, 1, 100, 3, "as many as fit into its memory"),
        (found(trial_bytes=79 * GB), ROOMY, 1, 100, 1, "as many as fit into its memory"),
        (IDLE, {"CPU": 8.0, "GPU": 2.0}, 1, 100, 4, "as many as its share of the CPUs allows"),
        (IDLE, {"CPU": 8.0, "GPU": 2.0}, 1.5, 100, 2, "as many as its share of the CPUs allows"),
        (IDLE, {"CPU": 2.0, "GPU": 4.0}, 1, 100, 1, "as many as its share of the CPUs allows"),
        (IDLE, ROOMY, 1, 5, 3, "as many as there are to run at once"),
        (IDLE, ROOMY, 1, 100, MOST_TRIALS, "the most there may be"),
    ],
)
def test_the_tightest_limit_decides_and_is_named(
    findings: Findings,
    has: dict[str, float],
    cpus_per_worker: float,
    slots: int,
    number: int,
    why: str,
) -> None:
    decided = decide(findings, has, cpus_per_worker, slots)
    assert decided.trials_per_gpu == number
    trials = "1 trial" if number == 1 else f"{number} trials"
    assert decided.reason.startswith(f"{trials} per GPU, {why}: one alone keeps it busy ")


def test_the_reason_is_one_sentence_with_what_was_measured() -> None:
    assert decide(found(busy_share=0.3), ROOMY, 1, 100).reason == (
        "4 trials per GPU, enough to keep it busy: one alone keeps it busy 30% of the time and "
        "takes 2.5 of 80.0 GB"
    )


def test_a_profiler_that_sees_nothing_lets_nobody_share() -> None:
    assert decide(found(busy_share=0.0), ROOMY, 1, 100) == Sharing(
        1, "1 trial per GPU: the profiler has seen no kernel run"
    )


@pytest.mark.parametrize(
    ("resources", "has", "said"),
    [
        ({}, {"CPU": 8.0}, "there is no GPU"),
        ({}, {"CPU": 8.0, "GPU": 0.0}, "there is no GPU"),
        ({"workers_per_trial": 2}, ROOMY, "never share a GPU"),
        ({"slots": 2}, ROOMY, "no more trials run at once"),
        ({}, {"CPU": 256.0, "GPU": 100.0}, "no more trials run at once"),
    ],
)
def test_nothing_is_measured_where_nothing_can_be_shared(
    tiny_experiment: Experiment,
    resources: dict[str, Any],
    has: dict[str, float],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment = auto(tiny_experiment, **resources)
    decided = without_probe(experiment, has)
    assert decided is not None
    assert decided.trials_per_gpu == 1
    assert said in decided.reason
    monkeypatch.setattr(sharing, "with_room", lambda layout, _: layout)
    monkeypatch.setattr(sharing, "capacity", lambda: has)
    monkeypatch.setattr(sharing, "ask_the_cluster", pytest.fail)
    prepared = SimpleNamespace(experiment=experiment)
    layout = shared_layout(prepared, [], Screen())  # type: ignore[arg-type]
    assert layout.gpus_per_worker == min(1, has.get("GPU", 0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(decided.reason)


def test_a_written_number_is_taken_without_a_word(
    tiny_experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sharing, "with_room", lambda layout, _: layout)
    monkeypatch.setattr(sharing, "capacity", lambda: ROOMY)
    monkeypatch.setattr(sharing, "ask_the_cluster", pytest.fail)
    for resources, gpus in (
        ({"trials_per_gpu": 4}, 0.25),
        ({"gpus_per_worker": 0.5}, 0.5),
        ({"gpus_per_worker": 0}, 0),
    ):
        prepared = SimpleNamespace(experiment=auto(tiny_experiment, **resources))
        layout = shared_layout(prepared, [], Screen())  # type: ignore[arg-type]
        assert layout.gpus_per_worker == gpus
    assert capsys.readouterr().out == ""


def test_what_was_measured_becomes_the_share_of_a_worker(
    tiny_experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment, asked = auto(tiny_experiment), []

    def ask(*question: Any) -> Sharing:
        asked.append(question)
        return Sharing(5, "5 trials per GPU, because")

    monkeypatch.setattr(sharing, "with_room", lambda layout, _: layout)
    monkeypatch.setattr(sharing, "capacity", lambda: ROOMY)
    monkeypatch.setattr(sharing, "ask_the_cluster", ask)
    prepared = SimpleNamespace(experiment=experiment)
    layout = shared_layout(prepared, [], Screen())  # type: ignore[arg-type]
    assert (layout.slots, layout.gpus_per_worker) == (10, pytest.approx(1 / 5))
    assert len(asked) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("5 trials per GPU, because")


def test_auto_counts_as_one_until_it_is_known(tiny_experiment: Experiment) -> None:
    experiment = auto(tiny_experiment)
    assert plan_layout(experiment, ROOMY).gpus_per_worker == 1
    layout = plan_layout(experiment, ROOMY, 8)
    assert (layout.slots, layout.gpus_per_worker) == (16, 1 / 8)


def test_slots_run_at_once_as_far_as_there_are_trials(tiny_experiment: Experiment) -> None:
    assert most_slots(auto(tiny_experiment)) == 100
    assert most_slots(auto(tiny_experiment, slots=7)) == 7
    tree = auto(tiny_experiment, slots=7).to_tree()
    tree["search"]["trials"] = 3
    assert most_slots(Experiment.from_tree(tree)) == 3


def test_the_heaviest_configuration_is_drawn_from_the_corners(tiny_experiment: Experiment) -> None:
    tree = auto(tiny_experiment).to_tree()
    tree["search"]["space"] |= {
        "train.batch_size": {"choice": [8, 48, 16]},
        "train.frozen_layers": {"int": [1, 2]},
    }
    tree["search"]["default_recipe"] = False
    prepared = prepare_experiment(Experiment.from_tree(tree))
    train = heaviest(trains_of_search(prepared), 2)
    assert (train.batch_size, train.frozen_layers, train.reinit_layers) == (48, 1, 0)
    tree["search"]["default_recipe"] = True  # which freezes nothing
    prepared = prepare_experiment(Experiment.from_tree(tree))
    train = heaviest(trains_of_search(prepared), 2)
    assert (train.batch_size, train.frozen_layers) == (48, 0)


def test_whole_models_frozen_compare_with_numbers() -> None:
    trains = [
        Train(batch_size=8, frozen_layers="all", reinit_layers=0),
        Train(batch_size=4, frozen_layers=5, precision="fp32"),
    ]
    train = heaviest(trains, 6)
    assert (train.batch_size, train.frozen_layers, train.precision) == (8, 5, "auto")


def test_only_what_runs_on_the_gpu_counts_as_busy() -> None:
    events = [
        SimpleNamespace(
            device_type=getattr(torch.autograd.DeviceType, kind),
            is_user_annotation=is_mark,
            self_device_time_total=microseconds,
        )
        for kind, is_mark, microseconds in (
            ("CUDA", False, 1500.0),
            ("CUDA", False, 500.0),
            ("CUDA", True, 7000.0),
            ("CPU", False, 9000.0),
        )
    ]
    assert device_seconds(events) == pytest.approx(0.002)


def test_the_probe_trains_and_evaluates_where_it_is_sent(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the counters of a GPU, on a data set with one step per epoch."""
    steps: list[np.ndarray[Any, Any]] = []
    take_step, threads = gpu_probe.Trial.take_step, torch.get_num_threads()

    def counted(trial: Any, indices: Any) -> Any:
        steps.append(indices)
        return take_step(trial, indices)

    def profiled(work: Any) -> float:
        work()
        return 1e-6

    monkeypatch.setattr(gpu_probe.Trial, "take_step", counted)
    monkeypatch.setattr(gpu_probe, "kernel_seconds", profiled)
    monkeypatch.setattr(gpu_probe, "memory_bytes", lambda device: (1, 2, 3))
    tree = auto(tiny_experiment).to_tree()
    tree["search"]["space"] = {"train.batch_size": {"choice": [512]}}
    prepared = prepare_experiment(Experiment.from_tree(tree))
    question = sharing._question(prepared, trains_of_search(prepared))
    try:
        with warnings.catch_warnings():
            findings = probe(*question, device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert 0 < findings.busy_share < 1
    assert (findings.trial_bytes, findings.context_bytes, findings.gpu_bytes) == (1, 2, 3)
    assert len(steps) == sharing.WARMUP_STEPS + 3 * sharing.WINDOW_STEPS
    timed, profiled_too = steps[-2 * sharing.WINDOW_STEPS :], steps[-sharing.WINDOW_STEPS :]
    assert all((a == b).all() for a, b in zip(timed, profiled_too, strict=False))


def test_questions_and_answers_travel(tiny_experiment: Experiment) -> None:
    prepared = prepare_experiment(auto(tiny_experiment))
    question = sharing._question(prepared, trains_of_search(prepared))
    assert pickle.loads(pickle.dumps((question, IDLE))) == (question, IDLE)
    assert str(pickle.loads(pickle.dumps(DataError("data: none")))) == "data: none"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_gpu_that_does_not_come_lets_nobody_share(tiny_experiment: Experiment) -> None:
    prepared = prepare_experiment(auto(tiny_experiment))
    decided = sharing.ask_the_cluster(prepared, trains_of_search(prepared), ROOMY, seconds=0.5)
    assert decided == Sharing(1, "1 trial per GPU: no GPU has answered within 0 s")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_process_of_the_probe_ends_with_its_answer(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(sharing, "_question", lambda *_: ())
    made, remote = [], ray.remote

    def without_a_gpu(**options: Any) -> Any:
        made.append(options)
        return remote(**{**options, "num_gpus": 0})

    monkeypatch.setattr(ray, "remote", without_a_gpu)
    monkeypatch.setattr(gpu_probe, "probe", lambda: os.getpid())
    monkeypatch.setattr(sharing, "_decided", lambda found, *_: found)
    prepared = SimpleNamespace(experiment=auto(tiny_experiment))
    monkeypatch.setattr(ray, "cancel", lambda *_, **__: pytest.fail("it has answered"))
    first, second = (
        sharing.ask_the_cluster(prepared, [], ROOMY, seconds=240)  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert first != second
    assert made[0]["num_gpus"] == 1


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"CPU": 4.0, "GPU": 0.0}, "1 trial per GPU: there is no GPU to share"),
        ({"CPU": 4.0, "GPU": 2.0}, "trials per GPU are measured when the search starts"),
    ],
)
def test_a_plan_says_what_it_knows(
    experiment: Experiment,
    has: dict[str, float],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(planning, "capacity_here", lambda _: has)
    monkeypatch.setattr(planning, "measure", lambda *_: Speed("CPU", {0: 0.01}, 0.001))
    monkeypatch.setattr(planning.torch.cuda, "device_count", lambda: 0)
    plan = run_plan(auto(experiment))
    assert f"sharing    {said}" in capsys.readouterr().out
    assert plan.layout.gpus_per_worker == min(1, has["GPU"])


def test_a_plan_measures_on_a_gpu_that_is_here(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "capacity_here", lambda _: {"CPU": 16.0, "GPU": 2.0})
    monkeypatch.setattr(planning, "measure", lambda *_: Speed("GPU", {0: 0.01}, 0.001))
    monkeypatch.setattr(planning.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu_probe, "probe", lambda *_: found(busy_share=0.25))
    plan = run_plan(auto(experiment))
    said = capsys.readouterr().out
    assert "4 trials per GPU, enough to keep it busy" in said
    assert "the speed is of one trial that has the GPU to itself" in said
    assert (plan.layout.slots, plan.layout.gpus_per_worker) == (8, 0.25)

    def fails(*_: Any) -> Findings:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it.")

    monkeypatch.setattr(gpu_probe, "probe", fails)
    assert run_plan(auto(experiment)).layout.gpus_per_worker == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "failed with OutOfMemoryError: CUDA out of memory. search by" in said


def test_a_cluster_is_asked_only_for_a_gpu_that_is_free(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = [0.0]
    monkeypatch.setattr(planning, "capacity_here", lambda _: None)
    monkeypatch.setattr(planning, "connected", lambda _: nullcontext())
    monkeypatch.setattr(planning, "with_room", lambda layout, _: layout)
    monkeypatch.setattr(planning, "capacity", lambda: ROOMY)
    monkeypatch.setattr(planning, "free_gpus", lambda: free[0])
    monkeypatch.setattr(planning, "measure", lambda *_: Speed("CPU", {0: 0.01}, 0.001))
    monkeypatch.setattr(planning, "ask_the_cluster", lambda *_: Sharing(3, "3 trials per GPU"))
    assert run_plan(auto(experiment)).layout.gpus_per_worker == 1
    assert "measured when the search starts" in capsys.readouterr().out
    free[0] = 1.0
    assert run_plan(auto(experiment)).layout.gpus_per_worker == pytest.approx(1 / 3)
    assert "3 trials per GPU" in capsys.readouterr().out


def test_who_shares_a_gpu_takes_its_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def loses_its_peer(*_: Any) -> None:
        raise RuntimeError("gloo")  # else it would tell the mailbox, and end

    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(worker, "load", loses_its_peer)
    for device, gpus in (("cuda", 0.25), ("cuda", 1.0), ("cpu", 0.0)):
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="gloo"):
            worker.run_worker({"mailbox": None}, 0, 1, device, None, gpus)  # type: ignore[arg-type]
    assert limits == [pytest.approx(0.9 / 4)]
