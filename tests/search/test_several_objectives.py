"""A score and costs to keep small in one search: no Ray, no training."""

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from sft_ray.analysis.importance import importances
from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.rows import gain_over_default, pareto_rows, ranking, row_of
from sft_ray.config import COSTS, Experiment
from sft_ray.errors import ConfigError
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.search.trials import PlannedTrial
from tests.search.test_study import RECIPE, experiment

OBJECTIVES = ["accuracy", "train_seconds", "trained_parameters"]
Ends = list[tuple[float, float, int]]  # score, seconds, parameters


def search_of(**search: Any) -> Any:
    tree = {"name": "x", "model": "m", "data": {"path": "d"}, "search": search}
    return Experiment.from_tree(tree).search


def open_study(
    exp: Experiment, folder: Path | None = None, direction: str = "maximize"
) -> SearchStudy:
    storage = (
        open_storage(folder / "study.journal") if folder else optuna.storages.InMemoryStorage()
    )
    return SearchStudy(exp, storage, recipe=RECIPE, num_layers=6, direction=direction)


def several(**search: Any) -> Experiment:
    return experiment(**{"objective": OBJECTIVES, "default_recipe": False, **search})


def outcome_of(planned: PlannedTrial) -> Outcome:
    """More layers trained: a better score, for more time and parameters."""
    trained = 6 - int(planned.train.frozen_layers)
    return Outcome(
        score=0.5 + 0.05 * trained - 0.01 * abs(planned.train.epochs - 3),
        score_percent=100,
        schedule_percent=100,
        train_seconds=float(planned.train.epochs * (2 + trained)),
        trained_parameters=1000 + 500 * trained,
        has_checkpoint=True,
    )


def run_one(study: SearchStudy, planned: PlannedTrial, outcome: Outcome | None = None) -> None:
    end = outcome or outcome_of(planned)
    assert end.score is not None
    for percent in (10, 33, 100):
        score = end.score * percent / 100 if study.sign > 0 else end.score
        assert study.mark(planned.number, percent, score, 1.0) is None
    study.finish(planned.number, TrialState.COMPLETE, end)


def run_all(study: SearchStudy, until: int | None = None) -> None:
    while (planned := study.next_trial()) is not None:
        run_one(study, planned)
        if planned.number == until:
            return


def run_ends(study: SearchStudy, ends: Ends) -> None:
    for score, seconds, parameters in ends:
        planned = study.next_trial()
        assert planned is not None
        end = Outcome(
            score=score,
            train_seconds=seconds,
            trained_parameters=parameters,
            has_checkpoint=True,
        )
        run_one(study, planned, end)


def test_a_list_of_objectives_is_searched_by_nsga2_without_a_pruner() -> None:
    search = search_of(objective=OBJECTIVES)
    assert (search.sampler, search.pruner) == ("nsga2", "none")
    assert search_of(sampler="nsga2").pruner == "none"  # it breeds finished trials only
    assert search_of(sampler="nsga2", pruner="median").pruner == "median"
    assert (search.score, search.costs) == ("accuracy", ["train_seconds", "trained_parameters"])
    assert search_of(objective=OBJECTIVES, sampler="tpe").sampler == "tpe"
    assert search_of(objective=OBJECTIVES, pruner="none").pruner == "none"


@pytest.mark.parametrize("objective", [None, "accuracy"])
def test_one_objective_keeps_its_defaults(objective: str | None) -> None:
    search = search_of(objective=objective)
    assert (search.sampler, search.pruner) == ("tpe", "successive_halving")
    assert (search.score, search.costs) == (objective, [])


def test_the_written_experiment_reads_back_as_the_same() -> None:
    exp = several()
    assert exp.to_tree()["search"]["objective"] == OBJECTIVES
    assert Experiment.from_tree(exp.to_tree()) == exp


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"objective": ["accuracy", "train_seconds"], "pruner": "successive_halving"},
            "search: several objectives cannot be pruned, got pruner successive_halving; write "
            "`pruner: none`",
        ),
        (
            {"objective": ["accuracy", "memory_bytes"], "pruner": "median"},
            "several objectives cannot be pruned, got pruner median",
        ),
        (
            {"objective": ["accuracy", "train_secnds"]},
            "search.objective: beside the score come train_seconds, trained_parameters, "
            "memory_bytes, got 'train_secnds'; did you mean 'train_seconds'?",
        ),
        ({"objective": ["accuracy", "f1"]}, "got 'f1'; known: train_seconds"),
        ({"objective": ["accuracy"]}, "a list needs a score and different costs, got ['acc"),
        ({"objective": []}, "a list needs a score and different costs, got []"),
        (
            {"objective": ["accuracy", "train_seconds", "train_seconds"]},
            "a list needs a score and different costs",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(
    search: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        search_of(**search)
    (line,) = caught.value.problems
    assert message in line


def test_every_cost_is_a_number_of_an_outcome() -> None:
    for cost in COSTS:
        assert float(getattr(Outcome(), cost)) == 0


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_score_has_its_direction_and_costs_are_small(direction: str) -> None:
    study = open_study(several(trials=1), direction=direction)
    assert study.study.directions == [
        StudyDirection[direction.upper()],
        StudyDirection.MINIMIZE,
        StudyDirection.MINIMIZE,
    ]


def test_values_are_the_score_and_the_costs_and_rows_keep_curves(tmp_path: Path) -> None:
    study = open_study(several(trials=6), tmp_path)
    run_all(study)
    assert study.is_over()
    for trial in study.trials:
        end = Outcome.of(trial)
        assert trial.values == [end.score, end.train_seconds, end.trained_parameters]
        row = row_of(trial, seed=17)
        assert row["state"] == "COMPLETE"
        assert row["value"] == end.score
        assert (row["train_seconds"], row["trained_parameters"]) == tuple(trial.values[1:])
        assert row["curve"] == [
            [10, end.score * 10 / 100],
            [33, end.score * 33 / 100],
            [100, end.score],
        ]


def test_a_trial_is_never_ended_at_a_rung() -> None:
    study = open_study(several(trials=20, reduction_factor=2))
    for score in range(20):
        planned = study.next_trial()
        assert planned is not None
        run_one(study, planned, Outcome(score=1.0 - score / 20, has_checkpoint=True))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}


def test_the_pareto_set_is_what_none_beats_in_every_objective() -> None:
    ends: Ends = [
        (0.90, 50.0, 900),  # the best score: in
        (0.80, 50.0, 900),  # beaten by trial 0
        (0.80, 20.0, 900),  # fast: in
        (0.70, 30.0, 100),  # small: in
        (0.70, 30.0, 200),  # beaten by trial 3
        (0.60, 20.0, 100),  # fast and small: in
        (0.50, 99.0, 999),  # beaten by all
    ]
    study = open_study(several(trials=7))
    run_ends(study, ends)
    assert study.pareto_set() == {0, 2, 3, 5}
    rows = pareto_rows(study.trials, study.pareto_set(), study.costs)
    assert [row["trial"] for row in rows] == [0, 3, 2, 5]  # dearest first
    assert rows[1] == {
        "trial": 3,
        "score": 0.70,
        "train_seconds": 30.0,
        "trained_parameters": 100.0,
        "path": "trials/3",
    }


def test_a_score_to_be_small_turns_the_pareto_set_around() -> None:
    ends: Ends = [(0.90, 50.0, 900), (0.20, 50.0, 900), (0.30, 20.0, 900), (0.95, 50.0, 950)]
    study = open_study(several(trials=4), direction="minimize")
    run_ends(study, ends)
    assert study.pareto_set() == {1, 2}
    assert study.best_score() == 0.20


def test_what_did_not_finish_is_in_no_pareto_set() -> None:
    study = open_study(several(trials=3))
    run_ends(study, [(0.5, 10.0, 10)])
    for state, end in (
        (TrialState.PRUNED, Outcome("gradient not finite", fault=True, score=0.9)),
        (TrialState.FAIL, Outcome("disk full", score=0.99)),
    ):
        end = dataclasses.replace(end, schedule_percent=10)
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 10, 0.9, 1.0)
        study.finish(planned.number, state, end)
    assert study.is_over()
    assert study.pareto_set() == {0}
    row = row_of(study.trials[1], seed=17)
    assert (row["state"], row["reason"], row["curve"]) == (
        "PRUNED",
        "gradient not finite",
        [[10, 0.9]],
    )
    assert study.trials[1].constraints == {"fault": 1.0}


def test_one_objective_has_no_pareto_set() -> None:
    study = open_study(experiment(trials=3, pruner="none"))
    while (planned := study.next_trial()) is not None:
        study.mark(planned.number, 100, 0.5, 1.0)
        study.finish(planned.number, TrialState.COMPLETE, Outcome(score=0.5))
    assert study.pareto_set() == set()
    assert pareto_rows(study.trials, study.pareto_set(), study.costs) == []


def test_models_of_the_pareto_set_stay_beside_the_best() -> None:
    exp = several(trials=8)
    checkpoint = exp.checkpoint.model_copy(update={"keep": 2})
    study = open_study(exp.model_copy(update={"checkpoint": checkpoint}))
    ends: Ends = [
        (0.90, 50.0, 900),
        (0.89, 51.0, 901),  # the second best score, although beaten in everything
        (0.88, 52.0, 902),
        (0.40, 10.0, 900),
        (0.30, 50.0, 100),
        (0.30, 50.0, 101),
    ]
    run_ends(study, ends)
    assert study.pareto_set() == {0, 3, 4}
    assert study.kept() == {0, 1, 3, 4}
    planned = study.next_trial()
    assert planned is not None
    assert planned.save_above is None  # a low score may be cheap enough
    assert planned.number in study.kept()  # while it runs


def test_the_best_is_by_the_score() -> None:
    study = open_study(several(trials=4, default_recipe=True))
    run_ends(study, [(0.7, 1.0, 1), (0.9, 99.0, 999), (0.8, 2.0, 2), (0.6, 0.5, 1)])
    best = ranking(study.trials, study.sign)[0]
    assert best is not None
    assert best.number == 1
    assert study.best_score() == 0.9
    gain = gain_over_default(study.trials, best, study.sign)
    assert gain == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("budget", "trials"), [({"target": 0.8}, 2), ({"target": 0.95}, 8), ({"patience": 3}, 8)]
)
def test_a_target_is_a_score_and_patience_is_with_the_pareto_set(
    budget: dict[str, Any], trials: int
) -> None:
    study = open_study(several(trials=8, budget=budget))
    # Costs get better all the time.
    ends = [(s, 50.0 - i, 900 - i) for i, s in enumerate((0.7, 0.9, 0.8, 0.6, 0.85, 0.5, 0.5, 0.5))]
    for end in ends:
        if study.budget_used_up() is None:
            run_ends(study, [end])
    assert len(study.trials) == trials
    assert study.is_over()
    assert study.next_trial() is None


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random", "qmc"])
def test_a_reopened_search_goes_on_as_if_never_closed(tmp_path: Path, sampler: str) -> None:
    exp = several(trials=16, sampler=sampler)
    straight = open_study(exp)
    run_all(straight)
    for stop_at in (3, 9):
        run_all(open_study(exp, tmp_path), until=stop_at)
    dying = open_study(exp, tmp_path)
    planned = dying.next_trial()
    assert planned is not None
    dying.mark(planned.number, 10, 0.1, 1.0)  # and then the driver dies
    again = open_study(exp, tmp_path)
    run_all(again)
    assert again.is_over()
    assert [row_of(t, 17) for t in again.trials] == [row_of(t, 17) for t in straight.trials]
    assert again.pareto_set() == straight.pareto_set()
    assert again.kept() == straight.kept()


def test_a_grid_can_have_several_objectives() -> None:
    space = {"train.frozen_layers": {"int": [0, 6]}, "train.epochs": {"choice": [1, 3]}}
    study = open_study(several(space=space, sampler="grid", trials=99))
    run_all(study)
    assert study.is_over()
    assert len({str(t.params) for t in study.trials}) == len(study.trials) == 14
    # The score grows with what is trained; of one epoch and three, one is cheaper, one better.
    assert study.pareto_set() == set(range(14))


def test_nsga2_tries_every_point_of_a_finite_space_once() -> None:
    space = {"train.frozen_layers": {"int": [0, 6]}, "train.epochs": {"choice": [1, 3]}}
    study = open_study(several(space=space, trials=99))
    run_all(study)
    assert len({str(t.params) for t in study.trials}) == len(study.trials) == 14
    assert study.is_over()


def test_nsga2_finds_more_of_the_front_as_it_goes_on() -> None:
    study = open_study(several(trials=60, objective=["accuracy", "trained_parameters"]))
    while (planned := study.next_trial()) is not None:
        # Everything but three epochs costs score; any depth is a fair trade.
        off = abs(planned.train.epochs - 3)
        depth = int(planned.train.frozen_layers)
        end = Outcome(score=1 - 0.1 * depth - 0.3 * off, trained_parameters=100 - 10 * depth)
        run_one(study, planned, end)
    off = [abs(t.params["train.epochs"] - 3) for t in study.trials]
    assert sum(off[30:]) < sum(off[:30])


def test_importances_are_of_the_score() -> None:
    study = open_study(several(trials=30, sampler="random"))
    run_all(study)
    found = importances(study.trials, [10, 33])
    assert next(iter(found["finished"]["parameters"])) == "train.frozen_layers"
    assert found["finished"]["trials"] == 30
