"""What a search will take, said before it starts: no Ray; most of it without a measurement."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sft_ray import space as spaces
from sft_ray.config import Experiment, Train
from sft_ray.errors import ConfigError, SftError
from sft_ray.recipes import default_recipe
from sft_ray.run_store import ENVIRONMENT, RunStore, write_experiment
from sft_ray.search import cluster, planning
from sft_ray.search import speed as speed_module
from sft_ray.search.draws import DRAWS, drawn_trials
from sft_ray.search.estimate import STARTUP_SECONDS, Plan
from sft_ray.search.layout import plan_layout
from sft_ray.search.planning import _why_slots, run_plan
from sft_ray.search.preflight import prepare_experiment
from sft_ray.search.speed import Speed
from sft_ray.single_trial import run_training
from sft_ray.training import fitting as fit_module
from sft_ray.training import forward as forward_module
from sft_ray.training.batches import Batch
from sft_ray.training.trunk_cache import FREE_SHARE, trunks_root
from tests.models import task_rows, write_jsonl

TRAIN_SECONDS, EVAL_SECONDS = 0.01, 0.001  # per example, where nothing is measured
NUM_TRAIN, NUM_VALIDATION = 280, 80  # of the tiny experiment
RATES = {"train.learning_rate": {"log_uniform": [1.0e-4, 1.0e-2]}}
CONSTANT = {"train.epochs": 2, "train.batch_size": 32}
# 2 epochs of 9 steps; rungs at steps 2 and 6, epochs end at 9 and 18.
STEPS_PER_EPOCH, NUM_STEPS = 9, 18


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four cores without Ray, whatever runs here; tiny models want one thread."""
    monkeypatch.setattr(planning, "capacity_here", lambda _: {"CPU": 4.0, "GPU": 0.0})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed("CPU", {0: TRAIN_SECONDS}, EVAL_SECONDS)
    monkeypatch.setattr(planning, "measure", lambda *_: speed)


def changed(
    experiment: Experiment, search: dict[str, Any] | None = None, **sections: Any
) -> Experiment:
    """The experiment with keys of `search` replaced, and whole sections."""
    tree = experiment.to_tree()
    tree["search"] |= {"default_recipe": False, **(search or {})}
    return Experiment.from_tree({**tree, **sections})


def plan_of(experiment: Experiment, search: dict[str, Any] | None = None, **sections: Any) -> Plan:
    return run_plan(changed(experiment, search, **sections), quiet=True, probe_seconds=0.1)


def trial_seconds(steps: float, looks: float, num_steps: int = NUM_STEPS, epochs: int = 2) -> float:
    """Slot time with two workers, of so many steps and evaluations of a constant configuration."""
    training = steps / num_steps * epochs * NUM_TRAIN * TRAIN_SECONDS
    return (training + looks * NUM_VALIDATION * EVAL_SECONDS) / 2


def hours(slot_seconds: float) -> Any:
    return pytest.approx(slot_seconds * 2 / 3600)


@pytest.mark.usefixtures("known_speed")
def test_one_constant_configuration_by_hand(experiment: Experiment) -> None:
    plan = plan_of(experiment, {"space": CONSTANT, "pruner": "none", "trials": 1})
    assert (plan.trials, plan.layout.slots, plan.layout.workers_per_trial) == (1, 1, 2)
    assert (plan.steps, plan.marks) == ((NUM_STEPS, NUM_STEPS), (4, 4))
    seconds = trial_seconds(NUM_STEPS, 4)
    assert plan.worker_hours == (hours(seconds), hours(seconds))
    assert plan.wall_seconds[0] == plan.wall_seconds[1] == pytest.approx(STARTUP_SECONDS + seconds)
    assert plan.dollars is None


@pytest.mark.usefixtures("known_speed")
def test_what_is_searched_and_what_is_not_used_is_said(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = changed(experiment, {"space": RATES, "trials": 2}, train={"learning_rate": 1e-3})
    run_plan(fixed)
    shown = " ".join(capsys.readouterr().out.split())
    assert " space learning_rate 0.0001 .. 0.01 log not used train.learning_rate as writ" in shown


@pytest.mark.usefixtures("known_speed")
@pytest.mark.parametrize(
    ("pruner", "share"),
    [("successive_halving", 1 / 3), ("hyperband", 1 / 3), ("median", 1 / 2), ("none", 1.0)],
)
def test_pruning_gives_a_range(experiment: Experiment, pruner: str, share: float) -> None:
    space = {**CONSTANT, **RATES}
    plan = plan_of(experiment, {"space": space, "pruner": pruner, "trials": 30})
    steps = 2 + share * (6 - 2) + share**2 * (NUM_STEPS - 6)
    looks = 1 + share + 2 * share**2
    assert plan.worker_hours.high == hours(30 * trial_seconds(NUM_STEPS, 4))
    assert plan.worker_hours.low == hours(30 * trial_seconds(steps, looks))


@pytest.mark.usefixtures("known_speed")
def test_the_default_recipe_runs_to_its_end(experiment: Experiment) -> None:
    search = {"space": {**CONSTANT, **RATES}, "default_recipe": True, "trials": 2}
    plan = plan_of(experiment, search)
    recipe = trial_seconds(27, 4, 27, 3)  # the first epoch ends at a rung
    steps = 2 + (6 - 2) / 3 + (NUM_STEPS - 6) / 9
    assert plan.worker_hours.high == hours(recipe + trial_seconds(NUM_STEPS, 4))
    assert plan.worker_hours.low == hours(recipe + trial_seconds(steps, 1 + 1 / 3 + 2 / 9))
    assert plan.steps == (NUM_STEPS, 27)


@pytest.mark.usefixtures("known_speed")
def test_enqueued_configurations_count_as_they_are(experiment: Experiment) -> None:
    space = {"train.epochs": {"int": [1, 9]}, **RATES}
    enqueue = [{"train.epochs": 9, "train.learning_rate": 1e-3}]
    plan = plan_of(experiment, {"space": space, "pruner": "none", "trials": 1, "enqueue": enqueue})
    assert plan.steps == (9 * STEPS_PER_EPOCH, 9 * STEPS_PER_EPOCH)


@pytest.mark.usefixtures("known_speed")
def test_slots_share_the_time_and_not_the_worker_hours(experiment: Experiment) -> None:
    search = {"space": {**CONSTANT, **RATES}, "pruner": "none", "trials": 10}
    one, two = (
        plan_of(experiment, search, resources={"workers_per_trial": 2, "slots": slots})
        for slots in (1, 2)
    )
    assert one.worker_hours == two.worker_hours
    assert one.wall_seconds.high - STARTUP_SECONDS == pytest.approx(
        2 * (two.wall_seconds.high - STARTUP_SECONDS)
    )


@pytest.mark.usefixtures("known_speed")
def test_a_price_is_per_worker_and_hour(experiment: Experiment) -> None:
    plan = run_plan(experiment, price_per_hour=3.0, quiet=True)
    assert plan.dollars == tuple(3.0 * some for some in plan.worker_hours)


@pytest.mark.usefixtures("known_speed")
@pytest.mark.parametrize("limit", ["wall_minutes", "worker_hours"])
def test_a_budget_that_binds_is_named_and_caps_everything(
    experiment: Experiment, limit: str
) -> None:
    search = {"space": {**CONSTANT, **RATES}, "pruner": "none", "trials": 100}
    free = plan_of(experiment, search)
    if limit == "wall_minutes":
        amount = (STARTUP_SECONDS + (free.wall_seconds.high - STARTUP_SECONDS) / 4) / 60
    else:
        amount = free.worker_hours.high / 4
    plan = plan_of(experiment, {**search, "budget": {limit: amount}})
    assert plan.worker_hours.high == pytest.approx(free.worker_hours.high / 4)
    assert plan.trials_in_budget == pytest.approx((25, 25))
    generous = plan_of(experiment, {**search, "budget": {limit: 1e6}})
    assert generous == free


@pytest.mark.usefixtures("known_speed")
def test_a_budget_may_bind_only_where_little_is_pruned(experiment: Experiment) -> None:
    search = {"space": {**CONSTANT, **RATES}, "trials": 100}
    free = plan_of(experiment, search)
    amount = (free.worker_hours.low + free.worker_hours.high) / 2
    plan = plan_of(experiment, {**search, "budget": {"worker_hours": amount}})
    assert plan.worker_hours == (free.worker_hours.low, pytest.approx(amount))
    assert plan.trials_in_budget == (pytest.approx(100 * amount / free.worker_hours.high), 100)


@pytest.mark.usefixtures("known_speed")
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_finite_space_ends_the_search(experiment: Experiment, sampler: str) -> None:
    space = {"train.epochs": {"int": [1, 3]}, "train.batch_size": {"choice": [16, 32]}}
    search = {"space": space, "sampler": sampler, "pruner": "none"}
    plan = plan_of(experiment, {**search, "trials": 50})
    assert plan.trials == 6
    steps = [epochs * per_epoch for epochs in (1, 2, 3) for per_epoch in (18, 9)]
    assert plan.steps == (min(steps), max(steps))
    looks = 2 * (3 + 4 + 4)  # an epoch of three ends within 1 % of a rung
    training = 2 * (1 + 2 + 3) * NUM_TRAIN * TRAIN_SECONDS
    seconds = (training + looks * NUM_VALIDATION * EVAL_SECONDS) / 2
    assert plan.worker_hours.high == hours(seconds)
    fewer = plan_of(experiment, {**search, "trials": 4})
    assert fewer.trials == 4
    # The default recipe is a trial beside the six: the space lacks its other settings.
    with_recipe = plan_of(experiment, {**search, "trials": 50, "default_recipe": True})
    assert with_recipe.trials == 7


def test_what_is_drawn_lies_in_the_space_and_stands_for_all_trials(experiment: Experiment) -> None:
    prepared = prepare_experiment(experiment)
    recipe = default_recipe(prepared.model.layer_parameters)
    drawn = drawn_trials(prepared.experiment, recipe, 2)
    assert drawn == drawn_trials(prepared.experiment, recipe, 2)
    assert len(drawn) == DRAWS + 1
    assert sum(trial.weight for trial in drawn) == pytest.approx(4)
    assert [trial.prunable for trial in drawn[:2]] == [False, True]
    known = spaces.domains(prepared.experiment.search.domains)
    for name in ("learning_rate", "batch_size", "epochs", "frozen_layers"):
        values = {getattr(trial.train, name) for trial in drawn[1:]}
        assert all(value in known[f"train.{name}"] for value in values)
    assert {trial.train.epochs for trial in drawn} == {1, 2, 3}
    assert len({trial.train.regularization.kind for trial in drawn}) == 3


def test_priors_have_their_say_in_the_draws(experiment: Experiment) -> None:
    narrow = {"log_uniform": [1e-6, 1e-2], "prior": {"center": 1e-3, "spread": 1.1}}
    few, many = (
        [
            trial.train.learning_rate
            for trial in drawn_trials(
                changed(experiment, {"space": {"train.learning_rate": narrow}, "trials": trials}),
                {},
                2,
            )
        ]
        for trials in (4, 1000)
    )
    near = [np.mean([5e-4 < rate < 2e-3 for rate in rates]) for rates in (few, many)]
    assert near[0] > 0.7
    assert 0.1 < near[1] < 0.4


@pytest.mark.parametrize("task", ["regression", "token-classification", "question-answering"])
def test_every_task_can_be_measured_on_few_rows(
    tmp_path: Path, tiny_model: Path, task: str
) -> None:
    tree = {
        "name": "few",
        "model": str(tiny_model),
        "task": task,
        "data": {
            "train": str(write_jsonl(tmp_path / "train.jsonl", task_rows(task, 16, seed=1))),
            "validation": str(write_jsonl(tmp_path / "dev.jsonl", task_rows(task, 12, seed=2))),
            "max_length": 32,
        },
        "search": {"trials": 5},
        "resources": {"slots": 2},
        "storage": str(tmp_path / "runs"),
    }
    plan = run_plan(Experiment.from_tree(tree), probe_seconds=5, quiet=True)
    assert list(plan.speed.train_seconds) == [0, 1, 2]
    assert min([*plan.speed.train_seconds.values(), plan.speed.eval_seconds]) > 0
    assert 0 < plan.worker_hours.low < plan.worker_hours.high
    assert STARTUP_SECONDS < plan.wall_seconds.low <= plan.wall_seconds.high
    assert not (tmp_path / "runs").exists()


def test_all_that_is_wrong_is_said_at_once(experiment: Experiment) -> None:
    wrong = changed(
        experiment,
        {"objective": "acuracy", "space": {"train.frozen_layers": {"int": [0, 9]}}},
        resources={"workers_per_trial": 8},
    )
    with pytest.raises(SftError) as caught:
        run_plan(wrong, quiet=True)
    found = "\n".join(caught.value.problems)
    for part in ("did you mean 'accuracy'", "has 2 layers, got 9", "8 CPUs"):
        assert part in found


@pytest.mark.usefixtures("known_speed")
def test_confirmation_adds_unpruned_runs_within_the_budget(experiment: Experiment) -> None:
    search = {"space": {**CONSTANT, **RATES}, "trials": 10}
    alone, confirmed = (
        plan_of(experiment, search, confirm=confirm) for confirm in (None, {"top": 2, "seeds": 4})
    )
    assert (alone.confirm_runs, confirmed.confirm_runs) == (0, 12)
    added = 12 * trial_seconds(NUM_STEPS, 4)
    for before, after in zip(alone.worker_hours, confirmed.worker_hours, strict=True):
        assert after - before == hours(added)
    # Half of a small budget is the search's.
    limited = {**search, "pruner": "none", "budget": {"worker_hours": alone.worker_hours.high}}
    plan = plan_of(experiment, limited, confirm={"top": 2, "seeds": 4})
    assert plan.worker_hours.high == pytest.approx(alone.worker_hours.high)
    assert plan.trials_in_budget == pytest.approx((5, 5))


def test_a_constant_depth_is_measured_alone_and_threads_stay(experiment: Experiment) -> None:
    torch.set_num_threads(2)
    plan = plan_of(experiment, {"space": {**RATES, "train.frozen_layers": "all"}})
    assert list(plan.speed.train_seconds) == [2]
    assert torch.get_num_threads() == 2


def test_a_container_has_as_many_cpus_as_ray_will_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: 3.0)
    monkeypatch.delenv("RAY_USE_MULTIPROCESSING_CPU_COUNT", raising=False)
    has = cluster.capacity_here("local")
    assert has is not None
    assert has["CPU"] == 3


def test_a_line_leads_through_the_depths_that_were_measured() -> None:
    speed = Speed("CPU", {0: 4.0, 4: 2.0, 6: 1.0}, 1.0)
    depths = (0, 1, 4, 5, 6, "all")
    found = [speed.of_training(Train(frozen_layers=depth)) for depth in depths]
    assert found == [4, 3.5, 2, 1.5, 1, 1]


def test_what_frozen_layers_compute_once_is_spared() -> None:
    speed = Speed("CPU", {0: 4.0, 2: 3.0}, 1.0, {0: 0.0, 2: 0.9})
    frozen, nothing = Train(frozen_layers=2), Train(frozen_layers=0)
    assert speed.spared(frozen, passes=3) == pytest.approx(0.6)
    assert speed.spared(frozen, passes=1) == speed.spared(nothing, passes=3) == 0
    assert Speed("CPU", {2: 3.0}, 1.0).spared(frozen, passes=3) == 0


def test_a_plan_measures_frozen_layers_and_leaves_no_cache(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path / "cache"))
    space = {"train.frozen_layers": {"int": [0, 2]}}
    plan = run_plan(
        changed(experiment, {"space": space, "trials": 12}), probe_seconds=1, quiet=True
    )
    assert list(plan.speed.trunk_seconds) == [1, 2, 0]
    assert all(plan.speed.trunk_seconds[k] > 0 for k in (1, 2))
    assert plan.speed.trunk_bytes > 0
    assert not trunks_root().exists()
    little = changed(
        experiment, {"space": space, "trials": 12}, resources={"slots": 1, "trunk_cache_gb": 1e-6}
    )
    without = run_plan(little, probe_seconds=1, quiet=True)
    assert without.speed.trunk_seconds == {0: 0, 1: 0, 2: 0}
    assert 0 < plan.disk_bytes - without.disk_bytes <= 2 * plan.speed.trunk_bytes
    assert plan.speed.trunk_uses == 1 + 11 / 3  # 12 trials, 3 depths
    room = 1.5 * plan.speed.trunk_bytes / FREE_SHARE  # for one of two trunks
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room))
    tight = run_plan(
        changed(experiment, {"space": space, "trials": 12}), probe_seconds=1, quiet=True
    )
    assert tight.speed.trunk_uses == 2
    assert tight.disk_bytes - without.disk_bytes == int(1.5 * plan.speed.trunk_bytes)
    none = changed(experiment, {"space": space}, resources={"slots": 1, "trunk_cache_gb": 0})
    assert run_plan(none, probe_seconds=1, quiet=True).speed.trunk_seconds == {}


def test_trunks_of_single_epochs_pay_where_many_trials_ask_for_them(
    experiment: Experiment,
) -> None:
    space = {"train.epochs": 1, "train.frozen_layers": {"int": [0, 2]}}
    few, many = (
        run_plan(
            changed(experiment, {"space": space, "trials": trials, "default_recipe": False}),
            probe_seconds=1,
            quiet=True,
        ).speed.trunk_seconds[2]
        for trials in (1, 40)
    )
    assert few == 0 < many


def test_what_is_predicted_is_what_training_takes(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose only work is the model's, so that others' load changes nothing."""
    now, honest = [0.0], forward_module.model_outputs

    def model_outputs(model: Any, batch: Batch) -> torch.Tensor:
        seconds = 0.01 + 1e-4 * batch.inputs["input_ids"].numel()
        now[0] += seconds * (3 if torch.is_grad_enabled() else 1)
        return honest(model, batch)

    monkeypatch.setattr(forward_module, "model_outputs", model_outputs)
    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in (fit_module, speed_module):
        monkeypatch.setattr(module, "time", clock)
    train = {"learning_rate": 1e-3, "batch_size": 16, "epochs": 3}
    search = {"space": {}, "pruner": "none", "trials": 1}
    single = changed(experiment, search, train=train, resources={"slots": 1})
    plan = run_plan(single, quiet=True)
    row = run_training(single, quiet=True).trials[0]
    assert plan.speed.train_seconds[0] * 3 * NUM_TRAIN == pytest.approx(
        row["train_seconds"], rel=0.05
    )
    assert plan.speed.eval_seconds * NUM_VALIDATION * plan.marks.high == pytest.approx(
        row["eval_seconds"], rel=0.1
    )
    assert 3600 * plan.worker_hours.high == pytest.approx(
        row["train_seconds"] + row["eval_seconds"], rel=0.05
    )


@pytest.mark.usefixtures("known_speed")
def test_a_run_folder_is_looked_at_and_left_alone(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    store = RunStore(experiment.storage, experiment.name)
    run_plan(experiment)
    assert "holds this search already" not in capsys.readouterr().out
    assert not store.is_there()
    write_experiment(store, experiment)
    run_plan(experiment)
    assert "holds this search already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds another experiment: seed is 17 there and 3 here"):
        plan_of(experiment, {"default_recipe": True}, seed=3)


@pytest.mark.usefixtures("known_speed")
def test_a_run_folder_is_refused_as_a_search_would(experiment: Experiment) -> None:
    store = RunStore(experiment.storage, experiment.name)
    write_experiment(store, experiment)
    data = {"data_fingerprint": prepare_experiment(experiment).dataset.fingerprint}
    store.write_json(ENVIRONMENT, {"slots": 1, **data})
    assert run_plan(experiment, quiet=True)
    store.write_json(ENVIRONMENT, {"data_fingerprint": "another"})
    with pytest.raises(ConfigError) as caught:
        run_plan(experiment, quiet=True)
    made_by, data_now = caught.value.problems
    assert "was made by `sft-ray train`" in made_by
    assert "was made from other data (fingerprint another, now " in data_now


@pytest.mark.usefixtures("known_speed")
def test_slots_come_from_a_cluster_if_there_is_one(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "capacity_here", lambda _: None)
    monkeypatch.setattr(planning, "connected", lambda _: nullcontext())
    monkeypatch.setattr(planning, "with_room", lambda layout, _: layout)
    monkeypatch.setattr(planning, "capacity", lambda: {"CPU": 32.0, "GPU": 8.0})
    resources = {"workers_per_trial": 2}
    assert plan_of(experiment, {"trials": 20}, resources=resources).layout.slots == 4
    resources["gpus_per_worker"] = 0
    assert plan_of(experiment, {"trials": 20}, resources=resources).layout.slots == 16
    monkeypatch.setattr(planning, "capacity", lambda: {"CPU": 1.0})
    with pytest.raises(SftError) as caught:
        plan_of(experiment, {"warm_start": ["nowhere"]}, resources=resources)
    found = "\n".join(caught.value.problems)
    for part in ("2 workers need 2 CPUs, the cluster has 1 CPUs", "search.warm_start.0: "):
        assert part in found


@pytest.mark.usefixtures("known_speed")
def test_the_disk_holds_what_is_kept_running_and_best(experiment: Experiment) -> None:
    model = 4 * prepare_experiment(experiment).model.num_parameters
    few, many = (
        plan_of(experiment, {"trials": 20}, checkpoint={"keep": keep}).disk_bytes for keep in (1, 6)
    )
    assert many - few == 5 * model
    assert few > 3 * model
    often = plan_of(experiment, {"trials": 20}, checkpoint={"keep": 1, "every_minutes": 1e-6})
    assert often.disk_bytes - few == 4 * model


@pytest.mark.usefixtures("known_speed")
def test_a_plan_reads_as_a_page_that_ends_with_the_command(
    experiment: Experiment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    has = {"CPU": 4.0, "GPU": 4.0}
    monkeypatch.setattr(planning, "capacity_here", lambda _: has)
    search = {
        "space": {"train.epochs": {"int": [1, 3]}},
        "budget": {"worker_hours": 0.001},
    }
    planned = changed(experiment, search, confirm={"top": 2, "seeds": 3})
    run_plan(planned, price_per_hour=2.0, source="tiny.yaml search.trials=4", address="auto")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  sft-ray search tiny.yaml search.trials=4 --address auto"
    assert len(lines) < 35
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for part in (
        "1 slot x 2 workers x 1 CPU and 1 GPU",
        "3, then up to 9 runs to confirm the best",
        "training 100 with nothing frozen",
        "worker hours",
        "price      $0.00",
        "only 3 configurations to try",
        "the budget ends the search after about",
        "the trials will have GPUs",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("gain", "resources", "said"),
    [
        (1.4, {}, "finish more trials"),
        (2.1, {}, "=2 may finish"),
        (1.4, {"slots": 1}, "finish more trials; resources.slots=2"),
        (
            1.4,
            {"slots": 1, "workers_per_trial": 2},
            "trials; resources.slots=2 resources.workers_per_trial=1",
        ),
        (2.1, {"slots": 1}, "one slot finishes as many trials as two"),
    ],
)
def test_a_plan_says_why_so_many_slots(
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gain: float,
    resources: dict[str, int],
    said: str,
) -> None:
    speed = Speed("CPU", {0: TRAIN_SECONDS}, EVAL_SECONDS, gain_of_two=gain)
    monkeypatch.setattr(planning, "measure", lambda *_: speed)
    monkeypatch.setattr(planning, "capacity_here", lambda _: {"CPU": 2.0})
    run_plan(changed(experiment, resources={"workers_per_trial": 1, **resources}))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"trains {gain} times as fast" in shown
    assert said in shown


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_twice_the_cpus_are_measured_whatever_the_slots(experiment: Experiment, slots: int) -> None:
    threads = torch.get_num_threads()
    plan = plan_of(experiment, resources={"workers_per_trial": 1, "slots": slots})
    assert plan.speed.gain_of_two is not None
    assert plan.speed.gain_of_two > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("resources", "proposed"),
    [
        ({"cpus_per_worker": 2}, {"cpus_per_worker": 1}),
        ({"slots": 1}, {"slots": 2}),
        ({"slots": 1, "cpus_per_worker": 2}, {"slots": 2, "cpus_per_worker": 1}),
    ],
)
def test_what_a_plan_proposes_for_more_slots_fits(
    experiment: Experiment, resources: dict[str, Any], proposed: dict[str, Any]
) -> None:
    resources = {"workers_per_trial": 1, "slots": "auto", **resources}
    alone = changed(experiment, resources=resources)
    layout = plan_layout(alone, {"CPU": 2.0})
    assert layout.slots == 1
    words = " ".join(f"resources.{key}={value}" for key, value in proposed.items())
    assert _why_slots(alone.resources, layout, 1.4).endswith(f"more trials; {words}")
    grown = changed(experiment, resources=resources | proposed)
    assert plan_layout(grown, {"CPU": 2.0}).slots == 2


def test_one_trial_needs_no_word_on_slots(experiment: Experiment) -> None:
    assert plan_of(experiment, {"trials": 1}).speed.gain_of_two is None
