"""Many slots ask before any answers: suggestions stay apart and survive restarts."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sft_ray import space as spaces
from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.rows import row_of
from sft_ray.config import Experiment
from sft_ray.search.proposals import suggest
from sft_ray.search.samplers import num_good
from sft_ray.search.study import SearchStudy
from sft_ray.search.trials import PlannedTrial
from sft_ray.training.seeds import derived_seed
from tests.search.test_study import RECIPE, experiment, open_study

SLOTS = 16
SPACE = {
    "train.learning_rate": {"log_uniform": [1e-6, 1e-3]},
    "train.warmup": {"uniform": [0, 0.5]},
    "train.regularization": {
        "one_of": [{"kind": "none"}, {"kind": "weight_decay"}, {"kind": "l2_sp"}]
    },
}


def place(params: dict[str, Any]) -> tuple[float, float]:
    """Where a configuration lies in the unit square."""
    return (math.log10(params["train.learning_rate"]) + 6) / 3, params["train.warmup"] / 0.5


def quality(params: dict[str, Any]) -> float:
    """1 at (0.6, 0.3)."""
    return 1 - math.dist(place(params), (0.6, 0.3))


def to_nearest(configurations: list[dict[str, Any]]) -> list[float]:
    """The distance of each to the one most like it."""
    places = [place(params) for params in configurations]
    return [
        min(math.dist(a, b) for j, b in enumerate(places) if j != i) for i, a in enumerate(places)
    ]


def answer(study: SearchStudy, planned: PlannedTrial) -> None:
    score = 1 - abs(math.log10(planned.train.learning_rate) + 4)
    study.mark(planned.number, 100, score, 1.0)
    study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score))


def with_finished_trials(exp: Experiment, count: int) -> SearchStudy:
    study = SearchStudy(
        exp, optuna.storages.InMemoryStorage(), recipe=RECIPE, num_layers=6, direction="maximize"
    )
    for _ in range(count):
        planned = study.next_trial()
        assert planned is not None
        score = quality(planned.params)
        study.mark(planned.number, 100, score, 1.0)
        study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score))
    return study


def ask(study: SearchStudy, count: int) -> list[PlannedTrial]:
    asked = [study.next_trial() for _ in range(count)]
    return [planned for planned in asked if planned is not None]


def asked_without_a_liar(
    study: SearchStudy, finished: list[FrozenTrial], count: int
) -> list[dict[str, Any]]:
    """The same asks of Optuna's sampler, which does not know what is running."""
    plain = optuna.create_study(direction="maximize")
    plain.add_trials(finished)
    found = []
    for number in range(len(finished), len(finished) + count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental options
            plain.sampler = optuna.samplers.TPESampler(
                seed=derived_seed(study.experiment.seed, "sampler", number),
                multivariate=True,
                group=True,
                constant_liar=False,
                gamma=num_good,
            )
        trial = plain.ask()
        values = spaces.draw(study.space, lambda name, d, t=trial: suggest(t, name, d))
        found.append(spaces.parameters(values))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("finished", [12, 24])
def test_suggestions_without_an_answer_in_between_stay_apart(seed: int, finished: int) -> None:
    exp = experiment(space=SPACE, trials=99, default_recipe=False, pruner="none")
    study = with_finished_trials(exp.model_copy(update={"seed": seed}), finished)
    history = study.study.get_trials()
    ours = to_nearest([planned.params for planned in ask(study, SLOTS)])
    plain = to_nearest(asked_without_a_liar(study, history, SLOTS))
    assert len(ours) == len(plain) == SLOTS
    assert median(ours) > 1.5 * median(plain)
    assert mean(ours) > 1.5 * mean(plain)
    assert min(ours) > 0.01


def test_apart_does_not_mean_anywhere() -> None:
    exp = experiment(space=SPACE, trials=99, default_recipe=False, pruner="none")
    first, asked = [], []
    for seed in range(4):
        study = with_finished_trials(exp.model_copy(update={"seed": seed}), 24)
        first += [quality(t.params) for t in study.trials[:10]]  # before TPE knows anything
        asked += [quality(planned.params) for planned in ask(study, SLOTS)]
    assert mean(asked) > mean(first) + 0.1


def test_answers_may_come_in_any_order() -> None:
    exp = experiment(space=SPACE, trials=60, default_recipe=False, pruner="none")
    study = with_finished_trials(exp, 12)
    running = ask(study, SLOTS)
    while running:
        planned = running.pop(len(running) * 5 // 7)
        study.mark(planned.number, 100, quality(planned.params), 1.0)
        end = Outcome(score=quality(planned.params))
        study.finish(planned.number, TrialState.COMPLETE, end)
        running += ask(study, 1)
    assert study.is_over()
    assert [t.number for t in study.trials] == list(range(60))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    for trial in study.trials:
        assert trial.value == quality(trial.user_attrs["params"])


@pytest.mark.parametrize("seed", range(3))
def test_a_running_trial_counts_for_what_it_has_shown(seed: int) -> None:
    """High learning rates look good, or low ones do, and no trial has ended but at a rung."""
    exp = experiment(space=SPACE, trials=99, default_recipe=False, pruner="none")
    means = []
    for high_is_good in (True, False):
        study = with_finished_trials(exp.model_copy(update={"seed": seed}), 0)
        for planned in ask(study, 12):
            study.mark(planned.number, 10, 0.5, 1.0)
            study.finish(planned.number, TrialState.PRUNED, Outcome(reason="rung 10", score=0.5))
        running = ask(study, SLOTS)
        for planned in running:
            is_high = place(planned.params)[0] > 0.5
            study.mark(planned.number, 10, 0.9 if is_high == high_is_good else 0.1, 1.0)
        means.append(mean(place(planned.params)[0] for planned in ask(study, 8)))
    assert means[0] > means[1] + 0.2


def test_the_study_does_not_hear_of_what_running_trials_count_for() -> None:
    exp = experiment(space=SPACE, trials=99, default_recipe=False, pruner="none")
    study = with_finished_trials(exp, 12)
    running = ask(study, 4)
    for planned in running:
        study.mark(planned.number, 10, 0.9, 1.0)
    running += ask(study, 4)
    assert [t.number for t in study.study.get_trials()] == list(range(20))
    for trial, planned in zip(study.trials[12:], running, strict=True):
        assert trial.state == TrialState.RUNNING
        assert trial.datetime_complete is None
        assert trial.params == planned.params
        assert row_of(trial, 17)["role"] == "sampled"
    for planned in running:
        answer(study, planned)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}


@pytest.mark.parametrize(
    ("sampler", "dies_at"),
    [("tpe", [1]), ("tpe", [3, 6]), ("tpe", [8]), ("random", [5]), ("qmc", [5])],
)
def test_a_restart_brings_the_running_trials_back_and_goes_on_alike(
    tmp_path: Path, sampler: str, dies_at: list[int]
) -> None:
    exp = experiment(trials=22, sampler=sampler, pruner="none")

    def play(study: SearchStudy, dies_at: list[int]) -> list[tuple[int, Any, Any]]:
        running: list[PlannedTrial] = []
        for planned in ask(study, 12):
            answer(study, planned)
        for i in range(9):
            if i in dies_at:  # the driver, while i trials are running
                study = open_study(tmp_path, exp)
                again = ask(study, i)
                assert again == [replace(planned, resumes=True) for planned in running]
                running = again
            running += ask(study, 1) if i < 8 else []
            if i == 2:  # known from then on, also to the study that is reopened
                study.mark(running[0].number, 10, 0.5, 1.0)
        for planned in [*running, *ask(study, 2)]:
            answer(study, planned)
        return [(t.number, t.params, t.value) for t in study.trials]

    straight = with_finished_trials(exp, 0)
    assert play(open_study(tmp_path, exp), dies_at) == play(straight, [])
