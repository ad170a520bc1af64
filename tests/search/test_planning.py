"""What a search will take, said before it starts: no Ray; most of it without a measurement."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sft_ray import space as spaces
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, SftError
from sft_ray.recipes import default_recipe
from sft_ray.run_store import RESULTS, RunStore, write_experiment
from sft_ray.search import planning
from sft_ray.search.planning import DRAWS, STARTUP_SECONDS, Plan, Speed, drawn_trials, run_plan
from sft_ray.search.preflight import prepare_experiment
from sft_ray.single_trial import run_training
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
    return run_plan(changed(experiment, search, **sections), quiet=True, probe_seconds=0.3)


def trial_seconds(steps: float, looks: float, num_steps: int = NUM_STEPS, epochs: int = 2) -> float:
    """Slot time with two workers, of so many steps and evaluations of a constant configuration."""
    training = steps / num_steps * epochs * NUM_TRAIN * TRAIN_SECONDS
    return (training + looks * NUM_VALIDATION * EVAL_SECONDS) / 2


def hours(slot_seconds: float) -> Any:
    return pytest.approx(slot_seconds * 2 / 3600)


@pytest.mark.usefixtures("known_speed")
def test_one_constant_configuration_by_hand(experiment: Experiment) -> None:
    plan = plan_of(experiment, {"space": CONSTANT, "pruner": "none", "trials": 1})
    assert (plan.trials, plan.slots, plan.workers_per_trial) == (1, 1, 2)
    assert plan.steps == (NUM_STEPS, NUM_STEPS, NUM_STEPS)
    assert plan.marks == (4, 4, 4)
    seconds = trial_seconds(NUM_STEPS, 4)
    assert plan.worker_hours == (hours(seconds), hours(seconds))
    assert plan.wall_seconds[0] == plan.wall_seconds[1] == pytest.approx(STARTUP_SECONDS + seconds)
    assert plan.dollars is None


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
    steps = 2 + (6 - 2) / 2 + (NUM_STEPS - 6) / 4  # of two trials at a rung one goes on
    assert plan.worker_hours.high == hours(recipe + trial_seconds(NUM_STEPS, 4))
    assert plan.worker_hours.low == hours(recipe + trial_seconds(steps, 1 + 1 / 2 + 2 / 4))
    assert (plan.steps.least, plan.steps.most) == (NUM_STEPS, 27)


@pytest.mark.usefixtures("known_speed")
def test_enqueued_configurations_count_as_they_are(experiment: Experiment) -> None:
    space = {"train.epochs": {"int": [1, 9]}, **RATES}
    enqueue = [{"train.epochs": 9, "train.learning_rate": 1e-3}]
    plan = plan_of(experiment, {"space": space, "pruner": "none", "trials": 1, "enqueue": enqueue})
    assert plan.steps.least == plan.steps.most == 9 * STEPS_PER_EPOCH


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
    assert any("`slots: auto`" in note for note in one.notes)
    assert not any("slots: auto" in note for note in two.notes)


@pytest.mark.usefixtures("known_speed")
def test_fewer_trials_than_slots_leave_some_idle(experiment: Experiment) -> None:
    search = {"space": {**CONSTANT, **RATES}, "trials": 2}
    plan = plan_of(experiment, search, resources={"workers_per_trial": 1})
    assert plan.slots == 2
    assert any("2 trials leave 2 of 4 slots idle" in note for note in plan.notes)


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
    assert [n for n in plan.notes if "ends the search after about 25 of 100 trials" in n]
    generous = plan_of(experiment, {**search, "budget": {limit: 1e6}})
    assert generous.worker_hours == free.worker_hours
    assert not [n for n in generous.notes if "budget" in n]


@pytest.mark.usefixtures("known_speed")
def test_a_budget_may_bind_only_where_little_is_pruned(experiment: Experiment) -> None:
    search = {"space": {**CONSTANT, **RATES}, "trials": 100}
    free = plan_of(experiment, search)
    amount = (free.worker_hours.low + free.worker_hours.high) / 2
    plan = plan_of(experiment, {**search, "budget": {"worker_hours": amount}})
    assert plan.worker_hours == (free.worker_hours.low, pytest.approx(amount))
    assert any("of 100 trials if little is pruned" in note for note in plan.notes)


@pytest.mark.usefixtures("known_speed")
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_finite_space_ends_the_search(experiment: Experiment, sampler: str) -> None:
    space = {"train.epochs": {"int": [1, 3]}, "train.batch_size": {"choice": [16, 32]}}
    search = {"space": space, "sampler": sampler, "pruner": "none"}
    plan = plan_of(experiment, {**search, "trials": 50})
    assert plan.trials == 6
    steps = [epochs * per_epoch for epochs in (1, 2, 3) for per_epoch in (18, 9)]
    assert (plan.steps.least, plan.steps.most) == (min(steps), max(steps))
    looks = 2 * (3 + 4 + 4)  # an epoch of three ends within 1 % of a rung
    training = 2 * (1 + 2 + 3) * NUM_TRAIN * TRAIN_SECONDS
    seconds = (training + looks * NUM_VALIDATION * EVAL_SECONDS) / 2
    assert plan.worker_hours.high == hours(seconds)
    assert any("only 6 configurations" in note and "50 trials" in note for note in plan.notes)
    fewer = plan_of(experiment, {**search, "trials": 4})
    assert fewer.trials == 4
    # The default recipe is a trial beside the six: the space lacks its other settings.
    with_recipe = plan_of(experiment, {**search, "trials": 50, "default_recipe": True})
    assert with_recipe.trials == 7


@pytest.mark.usefixtures("known_speed")
def test_confirmation_adds_unpruned_runs(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"space": {**CONSTANT, **RATES}, "trials": 10}
    alone = plan_of(experiment, search)
    assert alone.confirm_runs == 0
    to_confirm = changed(experiment, search).model_copy(
        update={"confirm": SimpleNamespace(top=2, seeds=4)}
    )
    plan = run_plan(to_confirm, quiet=True)
    assert plan.confirm_runs == 12
    added = 12 * trial_seconds(NUM_STEPS, 4)
    for before, after in zip(alone.worker_hours, plan.worker_hours, strict=True):
        assert after - before == hours(added)


def test_what_is_drawn_lies_in_the_space_and_stands_for_all_trials(experiment: Experiment) -> None:
    prepared = prepare_experiment(experiment)
    recipe = default_recipe(prepared.model.num_parameters)
    drawn, note = drawn_trials(prepared.experiment, recipe)
    again, _ = drawn_trials(prepared.experiment, recipe)
    assert drawn == again
    assert note is None
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
            )[0]
        ]
        for trials in (4, 1000)
    )
    near = [np.mean([5e-4 < rate < 2e-3 for rate in rates]) for rates in (few, many)]
    assert near[0] > 0.7
    assert 0.1 < near[1] < 0.4


def test_a_combination_that_does_not_work_is_refused(experiment: Experiment) -> None:
    space = {"train.warmup": {"uniform": [0.0, 0.9]}, "train.cooldown": {"uniform": [0.1, 0.9]}}
    train = {"schedule": "constant_with_cooldown"}
    with pytest.raises(ConfigError, match="not all combinations work: warmup and cooldown"):
        plan_of(experiment, {"space": space}, train=train)


@pytest.mark.parametrize("task", ["regression", "token-classification", "question-answering"])
def test_every_task_can_be_measured_on_few_rows(
    tmp_path: Path, tiny_model: Path, task: str
) -> None:
    tree = {
        "name": "few",
        "model": str(tiny_model),
        "task": task,
        "data": {
            "train": str(write_jsonl(tmp_path / "train.jsonl", task_rows(task, 50, seed=1))),
            "validation": str(write_jsonl(tmp_path / "dev.jsonl", task_rows(task, 12, seed=2))),
            "max_length": 32,
        },
        "search": {"trials": 5},
        "storage": str(tmp_path / "runs"),
    }
    plan = run_plan(Experiment.from_tree(tree), probe_seconds=0.3, quiet=True)
    assert sorted(plan.train_seconds_per_example) == [0, 1, 2]
    assert all(0 < some < 1 for some in plan.train_seconds_per_example.values())
    assert 0 < plan.eval_seconds_per_example < 1
    assert 0 < plan.worker_hours.low < plan.worker_hours.high
    assert STARTUP_SECONDS < plan.wall_seconds.low <= plan.wall_seconds.high
    assert not (tmp_path / "runs").exists()


def test_a_constant_depth_is_measured_alone_and_the_probe_disturbs_nothing(
    experiment: Experiment,
) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    plan = plan_of(experiment, {"space": {**RATES, "train.frozen_layers": "all"}})
    assert list(plan.train_seconds_per_example) == [2]
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_line_leads_through_the_depths_that_were_measured() -> None:
    speed = Speed("CPU", {0: 4.0, 4: 2.0, 6: 1.0}, 1.0)
    assert [speed.per_train_example(depth) for depth in (0, 1, 4, 5, 6)] == [4, 3.5, 2, 1.5, 1]


def test_what_is_predicted_is_what_training_takes(experiment: Experiment) -> None:
    train = {"learning_rate": 1e-3, "batch_size": 16, "epochs": 3}
    search = {"space": {}, "pruner": "none", "trials": 1}
    ratios = []
    for attempt in range(3):  # others may take the processor meanwhile
        single = changed(
            experiment, search, train=train, name=f"single-{attempt}", resources={"slots": 1}
        )
        plan = run_plan(single, probe_seconds=2.0, quiet=True)
        predicted = plan.train_seconds_per_example[0] * NUM_TRAIN * 3
        row = run_training(single, quiet=True).trials[0]
        ratios.append(predicted / row["train_seconds"])
        whole = predicted + plan.eval_seconds_per_example * NUM_VALIDATION * plan.marks.most
        assert plan.worker_hours == (pytest.approx(whole / 3600), pytest.approx(whole / 3600))
        if 1 / 2.5 < ratios[-1] < 2.5:
            return
    pytest.fail(f"predicted / measured training seconds: {ratios}")


@pytest.mark.parametrize(("share", "said"), [(0.4, True), (1.0, False)])
def test_a_busy_machine_is_told(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, share: float, said: bool
) -> None:
    speed = Speed("CPU", {0: TRAIN_SECONDS}, EVAL_SECONDS, share)
    monkeypatch.setattr(planning, "measure", lambda *_: speed)
    notes = run_plan(experiment, quiet=True).notes
    assert any("took about 60% of the processor" in note for note in notes) == said


@pytest.mark.usefixtures("known_speed")
def test_the_default_recipe_bounds_the_wall_time(experiment: Experiment) -> None:
    search = {"space": {**CONSTANT, **RATES}, "default_recipe": True, "trials": 4}
    resources = {"workers_per_trial": 1}
    plan = plan_of(experiment, search, resources=resources)
    assert plan.slots == 4
    longest = 2 * trial_seconds(27, 4, 27, 3)  # with one worker
    assert plan.wall_seconds.low == pytest.approx(STARTUP_SECONDS + longest)


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
def test_a_run_folder_is_looked_at_and_left_alone(experiment: Experiment) -> None:
    store = RunStore(experiment.storage, experiment.name)
    run_plan(experiment, quiet=True)
    assert not store.is_there()
    write_experiment(store, experiment)
    begun = run_plan(experiment, quiet=True)
    assert any("begun: it would go on" in note for note in begun.notes)
    store.write_json(RESULTS, {})
    finished = run_plan(experiment, quiet=True)
    assert any("finished: the same command shows its outcome" in n for n in finished.notes)
    with pytest.raises(ConfigError, match="holds another experiment: seed is 17 there and 3 here"):
        plan_of(experiment, {"default_recipe": True}, seed=3)


@pytest.mark.usefixtures("known_speed")
def test_slots_come_from_a_cluster_if_there_is_one(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "capacity_here", lambda _: None)
    monkeypatch.setattr(planning, "connected", lambda _: nullcontext())
    monkeypatch.setattr(planning, "capacity", lambda: {"CPU": 32.0, "GPU": 8.0})
    resources = {"workers_per_trial": 2}
    plan = plan_of(experiment, {"trials": 20}, resources=resources)
    assert plan.slots == 4
    assert any("while the trials will have GPUs" in note for note in plan.notes)
    without = {**resources, "gpus_per_worker": 0}
    plan = plan_of(experiment, {"trials": 20}, resources=without)
    assert plan.slots == 16
    assert any("8 GPUs would stay idle" in note for note in plan.notes)
    monkeypatch.setattr(planning, "capacity", lambda: {"CPU": 1.0})
    with pytest.raises(ConfigError, match="2 workers need 2 CPUs, the cluster has 1 CPUs"):
        plan_of(experiment, resources=without)


@pytest.mark.usefixtures("known_speed")
def test_the_disk_holds_what_is_kept_running_and_best(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = 4 * prepare_experiment(experiment).model.num_parameters
    sizes = [
        plan_of(experiment, {"trials": 20}, checkpoint={"keep": keep}).disk_bytes for keep in (1, 6)
    ]
    assert sizes[1] - sizes[0] == 5 * model
    assert sizes[0] > 3 * model
    full = SimpleNamespace(free=10)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: full)
    assert any("lower checkpoint.keep" in note for note in plan_of(experiment).notes)


@pytest.mark.usefixtures("known_speed")
def test_a_plan_reads_as_a_page_that_ends_with_the_command(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    run_plan(experiment, price_per_hour=2.0, source="tiny.yaml search.trials=4", address="auto")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  sft-ray search tiny.yaml search.trials=4 --address auto"
    assert len(lines) < 30
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for part in ("1 slot x 2 workers x 1 CPU", "worker hours", "paid per worker and hour"):
        assert part in text
