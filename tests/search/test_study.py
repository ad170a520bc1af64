"""The search over one study, on invented trials: no Ray, no training."""

import dataclasses
import datetime
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.rows import gain_over_default, ranking, row_of
from sft_ray.config import Confirm, Experiment
from sft_ray.errors import ConfigError
from sft_ray.recipes import default_recipe
from sft_ray.run_store import RunStore
from sft_ray.screen import Screen
from sft_ray.search import study as study_module
from sft_ray.search.conductor import Conductor
from sft_ray.search.pruners import RungPruner
from sft_ray.search.study import (
    SearchStudy,
    open_storage,
)
from sft_ray.search.trials import PlannedTrial, is_to_be_saved

RECIPE = default_recipe(22_000_000)
MARKS = (10, 33, 67, 100)


RUNGS = {"rungs": [10, 33], "reduction_factor": 3}


def experiment(**search: Any) -> Experiment:
    space = {
        "train.learning_rate": {"log_uniform": [1e-6, 1e-3]},
        "train.epochs": {"int": [1, 5]},
        "train.regularization": {"one_of": [{"kind": "none"}, {"kind": "weight_decay"}]},
        "train.frozen_layers": {"int": [0, 6]},
    }
    return Experiment.from_tree(
        {
            "name": "x",
            "model": "m",
            "data": {"path": "d"},
            "search": {"space": space, "trials": 12, **RUNGS, **search},
        }
    )


def open_study(folder: Path, exp: Experiment, direction: str = "maximize") -> SearchStudy:
    storage = open_storage(folder / "study.journal")
    return SearchStudy(exp, storage, recipe=RECIPE, num_layers=6, direction=direction)


def quality(planned: PlannedTrial, percent: int) -> float:
    """Best at a learning rate of 1e-4 and little frozen; grows along the schedule."""
    train = planned.train
    distance = abs(math.log10(train.learning_rate) + 4) + 0.1 * int(train.frozen_layers)
    return (1 - 0.2 * distance) * (0.5 + percent / 200)


def run_one(study: SearchStudy, planned: PlannedTrial, stop_after: int = 100) -> None:
    """Play one trial to its end, or leave it running at a mark."""
    scores: list[float] = []
    for percent in MARKS:
        scores.append(quality(planned, percent))
        reason = study.mark(planned.number, percent, scores[-1], slot_seconds=percent / 10)
        end = Outcome(
            reason=reason,
            score=max(scores),
            schedule_percent=percent,
            train_seconds=percent / 10,
            has_checkpoint=True,
        )
        if percent == 100:
            study.finish(planned.number, TrialState.COMPLETE, end)
        elif reason is not None:
            study.finish(planned.number, TrialState.PRUNED, end)
            return
        elif percent >= stop_after:
            return


def run_all(study: SearchStudy, until: Callable[[int], bool] = lambda _: False) -> None:
    while (planned := study.next_trial()) is not None:
        run_one(study, planned)
        if until(planned.number):
            return


def history(study: SearchStudy) -> list[tuple[str, dict[str, Any], dict[int, float]]]:
    return [(t.state.name, t.params, t.intermediate_values) for t in study.trials]


def test_states_values_and_reasons_are_true(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment())
    run_all(study)
    assert study.is_over()
    states = [t.state for t in study.trials]
    assert len(states) == 12
    assert TrialState.COMPLETE in states
    assert TrialState.PRUNED in states
    for trial in study.trials:
        outcome = Outcome.of(trial)
        if trial.state == TrialState.COMPLETE:
            assert trial.value == max(trial.intermediate_values.values())
            assert set(trial.intermediate_values) == set(MARKS)
        else:
            assert outcome.reason in {"rung 10", "rung 33"}
            assert max(trial.intermediate_values) == int(outcome.reason.split()[1])


def test_the_default_recipe_runs_first_to_its_end_and_is_the_yardstick(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment())
    first = study.next_trial()
    assert first is not None
    assert first.params["train.learning_rate"] == 1e-4
    assert first.params["train.regularization.weight_decay.strength"] == 0.01
    assert first.train.warmup == 0.06
    for percent in MARKS[:-1]:  # hopeless all the way, and yet it goes on
        assert study.mark(first.number, percent, 0.0, 1.0) is None
    study.mark(first.number, 100, 0.0, 1.0)
    study.finish(first.number, TrialState.COMPLETE, Outcome(score=0.0, has_checkpoint=True))
    run_all(study)
    best = ranking(study.trials, study.sign)[0]
    assert best is not None
    assert gain_over_default(study.trials, best, study.sign) == pytest.approx(best.value)


def test_a_recipe_outside_the_space_still_runs_as_it_is(tmp_path: Path) -> None:
    exp = experiment(space={"train.epochs": {"int": [1, 2]}})
    first = open_study(tmp_path, exp).next_trial()
    assert first is not None
    assert (first.train.epochs, first.train.batch_size) == (3, 32)
    assert first.params["train.epochs"] == 3


def test_the_recipe_can_be_left_out_and_configurations_put_first(tmp_path: Path) -> None:
    wanted = {"train.learning_rate": 3e-5, "train.regularization": {"kind": "none"}}
    study = open_study(tmp_path, experiment(default_recipe=False, enqueue=[wanted]))
    first = study.next_trial()
    assert first is not None
    assert first.train.learning_rate == 3e-5
    assert first.train.regularization.kind == "none"


@pytest.mark.parametrize("interruptions", [[2], [0, 3, 4, 9], list(range(11))])
def test_a_restarted_search_makes_the_same_suggestions(
    tmp_path: Path, interruptions: list[int]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = open_study(tmp_path / "a", experiment())
    run_all(straight)
    for number in interruptions:
        study = open_study(tmp_path / "b", experiment())
        while (planned := study.next_trial()) is not None:
            dies_here = planned.number == number  # begun, one mark reported, then the driver dies
            run_one(study, planned, stop_after=10 if dies_here else 100)
            if dies_here:
                break
    resumed = open_study(tmp_path / "b", experiment())
    run_all(resumed)
    assert history(resumed) == history(straight)
    numbers = [t.number for t in resumed.trials]
    assert numbers == list(range(12))


def test_a_trial_that_the_last_copy_of_the_journal_lacks_is_taken_up(tmp_path: Path) -> None:
    exp = experiment(trials=3)
    before, after = (tmp_path / name for name in ("before", "after"))
    for folder in (before, after):
        folder.mkdir()
    study = open_study(before, exp)
    run_one(study, study.next_trial())
    shutil.copy(before / "study.journal", after)
    begun = study.next_trial()  # its head is lost before the journal is copied again
    again = open_study(after, exp)
    again.left_behind = frozenset([begun.number])
    assert again.next_trial() == dataclasses.replace(begun, resumes=True)
    assert not again.next_trial().resumes


def test_a_finished_search_goes_on_when_its_trials_grow(tmp_path: Path) -> None:
    run_all(open_study(tmp_path, experiment(trials=5)))
    longer = open_study(tmp_path, experiment(trials=8))
    assert not longer.is_over()
    run_all(longer)
    assert [t.number for t in longer.trials] == list(range(8))


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_rung_keeps_the_best_third_of_those_who_reached_it(direction: str) -> None:
    study = optuna.create_study(direction=direction)
    sign = 1 if direction == "maximize" else -1
    pruner = RungPruner([10, 33], 3)
    decisions = []
    for value in (0.5, 0.6, 0.4, 0.7, 0.55, 0.65):
        trial = study.ask()
        trial.report(sign * value, 10)
        decisions.append(pruner.prune(study, study.trials[trial.number]))
    #          first  better  worse  better  worse  2nd of 6
    assert decisions == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("factor", "value", "is_pruned"),
    [(2, 0.6, False), (2, 0.49, True), (3, 0.875, False), (3, 0.75, True), (8, 0.999, True)],
)
def test_a_larger_reduction_factor_keeps_fewer(factor: int, value: float, is_pruned: bool) -> None:
    study = optuna.create_study(direction="maximize")
    for other in (1.0, 0.875, 0.55, 0.5, 0.25, 0.125, 0.0):
        study.ask().report(other, 10)
    study.ask().report(value, 10)
    # Of 8 survive 4, 2 and 1; who equals the last of them does too.
    assert RungPruner([10], factor).prune(study, study.trials[-1]) is is_pruned


def test_each_rung_knows_its_own_trials_only() -> None:
    study = optuna.create_study(direction="maximize")
    for early, late in ((0.75, 0.25), (0.5, 0.5)):
        trial = study.ask()
        trial.report(early, 10)
        trial.report(late, 33)
    trial = study.ask()
    trial.report(0.25, 10)
    pruner = RungPruner([10, 33], 3)
    assert pruner.prune(study, study.trials[-1])
    trial.report(0.75, 33)
    assert not pruner.prune(study, study.trials[-1])
    trial.report(0.0, 67)  # no rung
    assert not pruner.prune(study, study.trials[-1])


def test_a_search_ends_who_is_not_among_the_best_at_a_rung(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment(default_recipe=False, sampler="random"))
    reasons = {}
    # Six at once, of whom the best two survive.
    waiting = [study.next_trial() for _ in range(6)]
    for planned, score in zip(waiting, (0.625, 0.75, 0.25, 0.0, 0.125, 0.7), strict=True):
        assert planned is not None
        reasons[score] = study.mark(planned.number, 10, score, 1.0)
    assert reasons == {
        0.625: None,
        0.75: None,
        0.25: "rung 10",
        0.0: "rung 10",
        0.125: "rung 10",
        0.7: None,
    }


def test_nobody_is_pruned_off_the_rungs_or_at_the_end(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment(default_recipe=False))
    for score in (0.9, 0.1):
        planned = study.next_trial()
        assert planned is not None
        if score == 0.1:
            assert study.mark(planned.number, 10, 0.95, 1.0) is None
            assert study.mark(planned.number, 50, score, 1.0) is None
            assert study.mark(planned.number, 100, score, 1.0) is None
        else:
            run_one(study, planned)


def test_a_fault_is_a_violated_constraint_that_the_sampler_avoids(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment(trials=40, default_recipe=False))
    while (planned := study.next_trial()) is not None:
        if planned.params["train.frozen_layers"] >= 4:
            fault = Outcome(reason="gradient not finite", fault=True)
            study.finish(planned.number, TrialState.PRUNED, fault)
        else:
            run_one(study, planned)
    diverged = [t.constraints.get("fault", 0) > 0 for t in study.trials]
    assert sum(diverged[:20]) > sum(diverged[20:])
    assert all(
        t.state == TrialState.PRUNED for t, d in zip(study.trials, diverged, strict=True) if d
    )


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2"])
def test_a_fault_whose_end_a_kill_left_untold_is_forgotten(tmp_path: Path, sampler: str) -> None:
    exp = experiment(sampler=sampler, trials=14, default_recipe=False, pruner="none")
    fault = Outcome(reason="gradient not finite", fault=True)
    for is_fault in (False, True):
        folder = tmp_path / str(is_fault)
        folder.mkdir()
        study = open_study(folder, exp)
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 10, 0.5, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study.study, "tell", killed)
            with pytest.raises(KeyboardInterrupt):
                study.finish(planned.number, TrialState.PRUNED, fault)
        again = open_study(folder, exp)
        resumed = again.next_trial()
        assert resumed is not None
        assert (resumed.number, resumed.train) == (planned.number, planned.train)
        if is_fault:
            again.finish(0, TrialState.PRUNED, fault)
        else:
            run_one(again, resumed)
        run_all(again)
        for one in (again, open_study(folder, exp)):
            trial = one.trials[0]
            assert (trial.constraints["fault"] > 0) == is_fault == Outcome.of(trial).fault
            assert len(one.trials) == 14
    # Optuna's word, too, which knows no infeasible winner.
    only = open_study(tmp_path / "False", exp)
    assert only.study.best_value == max(trial.value for trial in only.trials)


FULL = {
    "reason": "gradient not finite",
    "fault": True,
    "score": 0.875,
    "score_percent": 33,
    "metrics": {"accuracy": 0.875, "loss": 0.25},
    "has_checkpoint": True,
    "restarts": 2,
    "schedule_percent": 67,
    "epochs_run": 1.34,
    "examples_seen": 4321,
    "dtype": "bfloat16",
    "trunks_read": "train",
    "micro_batch": 8,
    "padding_share": 0.25,
    "trained_parameters": 21_000_000,
    "memory_bytes": 3_000_000_000,
    "train_seconds": 12.5,
    "eval_seconds": 1.25,
    "overhead_seconds": 0.125,
    "trunk_seconds": 0.0625,
}


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
def test_every_field_of_an_outcome_survives_in_the_study(tmp_path: Path, state: TrialState) -> None:
    end, nothing = Outcome(**FULL), Outcome()
    assert set(FULL) == {field.name for field in dataclasses.fields(Outcome)}
    assert all(value != getattr(nothing, name) for name, value in FULL.items())
    study = open_study(tmp_path, experiment(default_recipe=False))
    for outcome in (end, dataclasses.replace(nothing, score=0.0)):
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 10, 0.5, 1.0)
        study.finish(planned.number, state, outcome)
        assert Outcome.of(study.trials[-1]) == outcome
    reopened = open_study(tmp_path, experiment(default_recipe=False))
    assert Outcome.of(reopened.trials[0]) == end
    assert reopened.trials[0].constraints == {"fault": 1.0}
    assert not reopened.trials[1].constraints
    row = row_of(reopened.trials[0], seed=17)
    told = {name: row[name] for name in FULL if name in row}
    assert told == {name: FULL[name] for name in told}
    assert (row["state"], row["value"]) == (state.name, 0.875)
    assert row["examples_per_second"] == pytest.approx(4321 / 12.5)
    # What the row leaves out: told by state, value and curve, or in other words.
    assert set(FULL) - set(told) == {
        "fault",
        "score",
        "score_percent",
        "has_checkpoint",
        "examples_seen",
    }


def test_with_no_finished_trial_the_furthest_along_wins(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment(trials=3, default_recipe=False))
    for percent, score in ((10, 0.9), (33, 0.3), (33, 0.4)):
        planned = study.next_trial()
        assert planned is not None
        assert planned.save_unfinished
        study.mark(planned.number, percent, score, 1.0)
        end = Outcome("budget", False, score, percent, {}, True, schedule_percent=percent)
        study.finish(planned.number, TrialState.PRUNED, end)
    best = ranking(study.trials, study.sign)[0]
    assert best is not None
    assert best.number == 2
    assert study.kept() == {0, 1, 2}
    assert ranking([], 1) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_a_finished_trial_beats_any_unfinished_one(tmp_path: Path, sign: int) -> None:
    direction = "maximize" if sign == 1 else "minimize"
    study = open_study(tmp_path, experiment(default_recipe=False, trials=3), direction)
    for state, score in (("PRUNED", 0.99), ("COMPLETE", 0.5), ("COMPLETE", 0.6)):
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 100 if state == "COMPLETE" else 10, sign * score, 1.0)
        end = Outcome(score=sign * score, has_checkpoint=True, schedule_percent=10)
        study.finish(planned.number, TrialState[state], end)
    best = ranking(study.trials, study.sign)[0]
    assert best is not None
    assert best.number == 2


def test_only_the_top_models_stay(tmp_path: Path) -> None:
    exp = experiment(pruner="none", trials=8).model_copy(
        update={"checkpoint": experiment().checkpoint.model_copy(update={"keep": 2})}
    )
    study = open_study(tmp_path, exp)
    run_all(study, until=lambda n: n == 6)
    ranked = sorted(study.trials, key=lambda t: -t.value)
    assert study.kept() == {t.number for t in ranked[:2]}
    planned = study.next_trial()
    assert planned is not None
    assert planned.save_above == ranked[1].value
    assert not planned.save_unfinished
    assert planned.number in study.kept()  # while it runs


def test_budgets_end_a_search_and_its_running_trials(tmp_path: Path) -> None:
    for name, limit in (("worker_hours", 25 / 3600), ("target", 0.7), ("wall_minutes", 1e-9)):
        (tmp_path / name).mkdir()
        study = open_study(tmp_path / name, experiment(budget={name: limit}, pruner="none"))
        planned = study.next_trial()
        if name == "wall_minutes":
            assert planned is None
        else:
            assert planned is not None
            run_one(study, planned)
            run_all(study)
            assert 0 < len(study.trials) < 12
        assert study.is_over()


def test_a_running_trial_is_told_when_the_budget_is_used_up(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment(budget={"worker_hours": 8 / 3600}))
    planned = study.next_trial()
    assert planned is not None
    assert study.mark(planned.number, 10, 0.5, slot_seconds=5) is None
    reason = study.mark(planned.number, 33, 0.6, slot_seconds=9)
    assert reason is not None
    assert reason.startswith("budget: ")


@pytest.mark.parametrize(
    ("budget", "scores", "said"),
    [
        ({"target": 0.7}, (0.6, 0.7), "target 0.7 reached"),
        ({"patience": 1}, (0.6, 0.5), "no better trial among the last 1"),
    ],
)
def test_target_and_patience_end_running_trials_at_their_next_mark(
    tmp_path: Path, budget: dict[str, float], scores: tuple[float, float], said: str
) -> None:
    study = open_study(tmp_path, experiment(budget=budget, pruner="none"))
    planned = [study.next_trial() for _ in range(4)]
    recipe, other, first, second = (trial.number for trial in planned if trial is not None)

    def told(percent: int) -> set[str | None]:
        return {study.mark(running, percent, 0.5, 1.0) for running in (recipe, other)}

    def end(number: int, score: float) -> None:
        assert study.mark(number, 100, score, 1.0) is None
        study.finish(number, TrialState.COMPLETE, Outcome(score=score))

    assert told(10) == {None}
    end(first, scores[0])
    assert told(33) == {None}
    end(second, scores[1])
    assert told(67) == {f"budget: {said}"}


def test_what_is_added_to_enqueue_runs_next(tmp_path: Path) -> None:
    first, second, third = ({"train.learning_rate": rate} for rate in (1e-5, 2e-5, 3e-5))

    def rates(trials: int, *enqueue: dict[str, float]) -> list[float]:
        study = open_study(tmp_path, experiment(trials=trials, enqueue=[*enqueue]))
        run_all(study)
        return [trial.params["train.learning_rate"] for trial in study.trials]

    before = rates(4, first)
    assert before[1] == 1e-5  # behind the default recipe
    assert rates(4, first, second) == before  # there is no trial left for it
    assert rates(6, first, second)[:5] == [*before, 2e-5]
    longer = rates(8, first, second, third)
    assert longer[6] == 3e-5
    assert rates(8, first, second, third) == longer


@pytest.mark.parametrize("name", ["target", "wall_minutes", "worker_hours", "patience"])
def test_who_comes_to_no_mark_soon_after_the_end_of_a_budget_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    limits = {"target": 0.7, "wall_minutes": 10, "worker_hours": 0.1, "patience": 1}
    began = now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    study = open_study(tmp_path, experiment(budget={name: limits[name]}, pruner="none"))
    planned = [study.next_trial() for _ in range(4)]
    assert None not in planned

    def end(number: int, state: TrialState, score: float) -> None:
        study.finish(number, state, Outcome(score=score, train_seconds=400))

    now = began + 600
    end(3, TrialState.PRUNED, 0.9)
    now = began + 1000
    assert study.overdue() is None  # any may have to be the winner
    end(2, TrialState.COMPLETE, 0.8)
    end(1, TrialState.PRUNED, 0.1)
    assert (study.ended_by() or [None])[0] == f"search.budget.{name}"
    now = began + 1000
    assert study.overdue() is None
    now = began + 1049
    assert study.overdue() is None
    now = began + 1051
    if name == "patience":
        assert study.overdue() is None  # the running one may be better
    else:
        assert study.overdue() == study.budget_used_up() is not None
        monkeypatch.setattr(study, "wall_seconds", lambda: 1.0)  # what has been said stays
        assert study.overdue() is not None
        assert study.ended_by() is not None


def test_a_trial_that_pauses_when_the_budget_is_over_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "GRACE", 0.0)
    study = open_study(tmp_path, experiment(budget={"target": 0.7}, pruner="none"))
    store = RunStore(str(tmp_path), "run")
    conductor = Conductor(study, store, Screen(quiet=True), "accuracy", 2)
    late, winner = (conductor.next_trial(tune_id) for tune_id in ("late", "winner"))
    assert late is not None
    assert winner is not None
    pause = {"paused": True, "train_seconds": 3.0, "eval_seconds": 0.5, "slot_seconds": 4.0}
    assert not conductor.pauses
    assert not conductor.on_message("late", pause)  # its machine leaves
    conductor.on_slot_free("late")
    again = conductor.next_trial("late")
    assert again is not None
    assert again.number == late.number
    study.mark(winner.number, 100, 0.8, 1.0)
    study.finish(winner.number, TrialState.COMPLETE, Outcome(score=0.8))
    assert not conductor.pauses  # the clock has to go on
    assert conductor.pauses
    assert not conductor.on_message("late", pause)
    row = study.row(late.number)
    assert (row["state"], row["reason"]) == ("PRUNED", "budget: target 0.7 reached")
    assert (row["value"], row["train_seconds"], row["overhead_seconds"]) == (None, 3.0, 0.5)
    conductor.on_slot_free("late")
    assert conductor.next_trial("next") is None
    assert study.is_over()


def test_priors_have_their_share_of_draws_and_fade(tmp_path: Path) -> None:
    prior = {"log_uniform": [1e-6, 1e-3], "prior": {"center": 2e-5, "spread": 1.5}}
    exp = experiment(
        space={"train.learning_rate": prior}, trials=200, sampler="random", default_recipe=False
    )
    study = open_study(tmp_path, exp)
    rates = []
    while (planned := study.next_trial()) is not None:
        rates.append(planned.train.learning_rate)
        study.finish(planned.number, TrialState.FAIL, Outcome(reason="not run"))
    near = [abs(math.log(rate / 2e-5)) < 2 * math.log(1.5) for rate in rates]
    assert sum(near[:20]) / 20 > 1.5 * sum(near[100:]) / 100
    assert all(1e-6 <= rate <= 1e-3 for rate in rates)


def test_of_two_equal_models_the_one_that_stays_is_written(tmp_path: Path) -> None:
    tree = experiment(trials=2, default_recipe=False).to_tree()
    study = open_study(tmp_path, Experiment.from_tree({**tree, "checkpoint": {"keep": 1}}))
    assert [study.next_trial().number for _ in range(2)] == [0, 1]
    study.put_back(0)
    study.finish(1, TrialState.COMPLETE, Outcome(score=0.9, schedule_percent=100))
    planned = study.next_trial()
    assert planned.number == 0
    assert is_to_be_saved(planned.assignment(), 0.9, finished=True)
    assert not is_to_be_saved(planned.assignment(), 0.89, finished=True)
    study.finish(0, TrialState.COMPLETE, Outcome(score=0.9, schedule_percent=100))
    assert study.outdated() == ["trials/1"]


def test_the_wall_time_of_a_session_in_which_nothing_ended_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, now = open_study(tmp_path, experiment(trials=1)), time.monotonic()
    assert study.next_trial() is not None
    monkeypatch.setattr(time, "monotonic", lambda: now + 3000)
    study.put_back(0)
    assert 2999 < open_study(tmp_path, experiment(trials=1)).wall_seconds() < 3001


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc"])
def test_every_sampler_goes_on_as_if_never_closed(tmp_path: Path, sampler: str) -> None:
    search = {"sampler": sampler, "trials": 12, "default_recipe": False}
    straight = open_study(tmp_path, experiment(**search))
    run_all(straight)
    (tmp_path / "again").mkdir()
    for stop_at in (3, 7, 99):
        again = open_study(tmp_path / "again", experiment(**search))
        run_all(again, until=lambda number, stop_at=stop_at: number == stop_at)
    assert history(again) == history(straight)
    assert len({str(t.params) for t in straight.trials}) == 12


def finite() -> dict[str, Any]:
    return {
        "train.learning_rate": {"choice": [1e-5, 1e-4]},
        "train.epochs": {"int": [1, 3]},
        "train.regularization": {
            "one_of": [
                {"kind": "none"},
                {"kind": "l2_sp", "strength": {"choice": [0.1, 0.01]}},
                {"kind": "weight_decay", "strength": 0.01},
            ]
        },
        "train.warmup": 0.1,
    }


def test_a_grid_visits_every_point_once_and_ends(tmp_path: Path) -> None:
    exp = experiment(space=finite(), sampler="grid", trials=1000, default_recipe=False)
    study = open_study(tmp_path, exp)
    run_all(study)
    assert study.is_over()
    seen = [tuple(sorted(t.user_attrs["params"].items(), key=str)) for t in study.trials]
    assert len(seen) == len(set(seen)) == 2 * 3 * (1 + 2 + 1)
    assert {t.user_attrs["role"] for t in study.trials} == {"grid"}
    assert {t.user_attrs["params"]["train.warmup"] for t in study.trials} == {0.1}


def test_a_grid_over_a_range_is_refused() -> None:
    from sft_ray.search.samplers import grid_points

    exp = experiment(sampler="grid")
    with pytest.raises(ConfigError, match=r"train\.learning_rate: a grid needs finitely many"):
        grid_points(exp.search.domains)


@pytest.mark.parametrize("pruner", ["median", "hyperband", "patient", "none"])
def test_other_pruners_are_asked_at_rungs_only(tmp_path: Path, pruner: str) -> None:
    study = open_study(tmp_path, experiment(pruner=pruner, trials=30))
    run_all(study)
    reasons = {Outcome.of(t).reason for t in study.trials}
    assert reasons <= {None, "rung 10", "rung 33"}
    # These trials get better at every mark, which a patient pruner waits for.
    assert (reasons == {None}) == (pruner in ("none", "patient"))
    assert study.trials[0].state == TrialState.COMPLETE  # the default recipe


@pytest.mark.parametrize("sign", [1, -1])
def test_a_patient_pruner_ends_who_falls_and_waits_for_who_rises(tmp_path: Path, sign: int) -> None:
    rungs = [10, 33, 67, 90]
    exp = experiment(pruner="patient", rungs=rungs, default_recipe=False, sampler="random")
    study = open_study(tmp_path, exp, "maximize" if sign == 1 else "minimize")
    reasons = []
    for curve in (
        (0.6, 0.7, 0.8, 0.9),
        (0.1, 0.2, 0.3, 0.4),  # the last at every rung, and yet it rises
        (0.5, 0.4, 0.3, 0.2),
        (0.1, 0.3, 0.2, 0.1),  # falls twice after its second
        (0.99, 0.98, 0.97, 0.96),  # falls, and is the best
    ):
        planned = study.next_trial()
        assert planned is not None
        told = (
            study.mark(planned.number, percent, sign * score, 1.0)
            for percent, score in zip(rungs, curve, strict=True)
        )
        reasons.append(next((reason for reason in told if reason is not None), None))
    assert reasons == [None, None, "rung 67", "rung 90", None]


def test_patience_ends_a_search_that_finds_nothing_better(tmp_path: Path) -> None:
    search = {"trials": 100, "budget": {"patience": 7}, "sampler": "random"}
    study = open_study(tmp_path, experiment(**search))
    run_all(study)
    assert study.is_over()
    assert study.budget_used_up() == "no better trial among the last 7"
    values = [t.value for t in study.trials if t.state == TrialState.COMPLETE]
    best = next(t.number for t in study.trials if t.value == max(values))
    assert len(study.trials) == best + 1 + 7


def test_patience_with_several_objectives_waits_for_the_pareto_set(tmp_path: Path) -> None:
    search = {"trials": 100, "budget": {"patience": 3}, "objective": ["accuracy", "train_seconds"]}
    study = open_study(tmp_path, experiment(default_recipe=False, **search))

    def end(score: float, seconds: float) -> None:
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 100, score, 1.0)
        outcome = Outcome(score=score, train_seconds=seconds)
        study.finish(planned.number, TrialState.COMPLETE, outcome)

    for i in range(6):  # each a little worse, and cheaper
        end(0.9 - i / 100, 60.0 - i)
    assert study.budget_used_up() is None
    for _ in range(3):
        end(0.8, 70.0)
    assert study.budget_used_up() == "no trial of the Pareto set among the last 3"


def test_patience_does_not_look_at_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"trials": 100, "budget": {"patience": 3}, "sampler": "random", "pruner": "none"}
    study = open_study(tmp_path, experiment(default_recipe=False, **search))

    def end(score: float) -> None:
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 100, score, 1.0)
        study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score))

    end(0.5)
    end(0.4)

    class EarlierClock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2020, 1, 1, tzinfo=tz)

    monkeypatch.setattr(optuna.storages.journal._storage, "datetime", EarlierClock)
    end(0.6)
    assert study.trials[2].datetime_complete < study.trials[0].datetime_complete
    assert study.budget_used_up() is None
    for score in (0.1, 0.2):
        end(score)
    assert study.budget_used_up() is None
    end(0.3)
    assert study.budget_used_up() == "no better trial among the last 3"


def test_who_was_stopped_at_a_rung_before_a_kill_is_stopped_again(tmp_path: Path) -> None:
    exp = experiment(default_recipe=False, rungs=[33, 66], reduction_factor=2)
    study = open_study(tmp_path, exp)
    for score in (0.9, 0.7):
        planned = study.next_trial()
        assert planned is not None
        reason = study.mark(planned.number, 33, score, 1.0)
        if reason is None:
            study.mark(planned.number, 100, score, 1.0)
            study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score))
    assert reason == "rung 33"  # and the driver dies before its end is told
    for at in (33, 66):  # taken up from before that mark, or from behind it
        again = open_study(tmp_path, exp)
        planned = again.next_trial()
        assert planned is not None
        assert planned.number == 1
        assert again.mark(1, 20, 0.6, 1.0) is None
        assert again.mark(1, at, 0.7, 1.0) == "rung 33"


def test_a_trial_that_starts_over_ends_with_the_budget_before_its_old_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = experiment(budget={"wall_minutes": 10}, pruner="none")
    study = open_study(tmp_path, exp)
    planned = study.next_trial()
    assert planned is not None
    for percent in (10, 33):
        assert study.mark(planned.number, percent, 0.5, 1.0) is None
    study.put_back(planned.number)
    monkeypatch.setattr(study, "wall_seconds", lambda: 601.0)
    assert study.next_trial() is not None
    assert study.mark(planned.number, 10, 0.5, 1.0) == "budget: wall time of 10 minutes"
    end = Outcome(reason="budget: wall time of 10 minutes", score=0.5, schedule_percent=10)
    study.finish(planned.number, TrialState.PRUNED, end)
    assert study.row(planned.number)["curve"] == [[10, 0.5]]


def test_models_of_trials_that_did_not_finish_are_few_too(tmp_path: Path) -> None:
    study = open_study(tmp_path, experiment(trials=20, default_recipe=False))
    for number in range(12):
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 10, number / 20, 1.0)
        end = Outcome("diverged", True, number / 20, 10, {}, True, schedule_percent=33)
        study.finish(planned.number, TrialState.PRUNED, end)
    running = study.next_trial()
    assert running is not None
    keep = study.experiment.checkpoint.keep
    assert study.kept() == {running.number, *range(12 - keep, 12)}


def to_confirm(exp: Experiment, top: int, seeds: int) -> Experiment:
    return exp.model_copy(update={"confirm": Confirm(top=top, seeds=seeds)})


@pytest.mark.parametrize(
    ("top", "seeds", "started"),
    [
        (None, None, 11),  # of 10 s each: the 11th reaches 105 s on its way
        (1, 2, 7),  # and the default recipe: 4 runs, so the search has 65 s
        (9, 9, 6),  # at most half is kept
    ],
)
def test_worker_hours_keep_a_reserve_for_the_confirmation(
    tmp_path: Path, top: int | None, seeds: int | None, started: int
) -> None:
    exp = experiment(budget={"worker_hours": 105 / 3600}, pruner="none")
    if top is not None and seeds is not None:
        exp = to_confirm(exp, top, seeds)
    study = open_study(tmp_path, exp)
    run_all(study)
    assert study.is_over()
    assert len(study.trials) == started
    assert study.budget_used_up() == "0.0291667 worker hours"
    assert Outcome.of(study.trials[-1]).reason == f"budget: {study.budget_used_up()}"


@pytest.mark.parametrize(
    ("slots", "top", "limit"),
    [(1, 1, 60), (2, 1, 80), (1, 50, 50), (100, 50, 90)],
)
def test_wall_minutes_keep_a_reserve_shared_out_over_the_slots(
    tmp_path: Path, slots: int, top: int, limit: int
) -> None:
    exp = to_confirm(experiment(budget={"wall_minutes": 100 / 60}), top, 2)

    def reopened(seconds: float) -> SearchStudy:
        storage = open_storage(tmp_path / "study.journal")
        study = SearchStudy(
            exp, storage, recipe=RECIPE, num_layers=6, direction="maximize", slots=slots
        )
        study.study.set_user_attr("wall_seconds", seconds)
        return SearchStudy(
            exp, storage, recipe=RECIPE, num_layers=6, direction="maximize", slots=slots
        )

    assert reopened(90.0).budget_used_up() is None  # nothing has finished: nothing is known
    study = reopened(0.0)
    planned = study.next_trial()
    assert planned is not None
    run_one(study, planned)
    assert study.reserved_seconds() == (top + 1) * 2 * 10
    assert reopened(limit - 5.0).budget_used_up() is None
    assert reopened(limit + 1.0).budget_used_up() == "wall time of 1.66667 minutes"
