"""Finite spaces are never repeated, priors have their share: no Ray, no training."""

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from sft_ray import space as spaces
from sft_ray.analysis.outcome import Outcome
from sft_ray.config import Experiment, Search, Train
from sft_ray.errors import ConfigError
from sft_ray.search import proposals
from sft_ray.search.finite_space import MOST_POINTS, FiniteSpace, num_points
from sft_ray.search.proposals import PRIOR_STRENGTH, as_seen_now, rehearsal_of
from sft_ray.search.study import SearchStudy
from sft_ray.search.trials import PlannedTrial
from tests.search.test_study import RECIPE, experiment, finite, history, open_study, run_all

SMALL = {
    "train.learning_rate": {"choice": [1e-5, 1e-4]},
    "train.epochs": {"int": [1, 3]},
    "train.warmup": {"choice": [0.0, 0.06]},
}
NUM_SMALL = 2 * 3 * 2
PRIORS = {
    "train.learning_rate": {
        "log_uniform": [1e-5, 1e-4],
        "prior": {"center": 2e-5, "spread": 3.0},
    },
    "train.epochs": {"int": [2, 5], "prior": {"center": 3, "spread": 2}},
    "train.batch_size": {"log_int": [8, 64], "prior": {"center": 8, "spread": 2}},
    "train.warmup": {"uniform": [0, 0.2], "prior": {"center": 0.2, "spread": 0.1}},
    "train.frozen_layers": {"int": [0, 6]},
}


def in_memory(exp: Experiment) -> SearchStudy:
    storage = optuna.storages.InMemoryStorage()
    return SearchStudy(exp, storage, recipe=RECIPE, num_layers=6, direction="maximize")


def configuration(train: dict[str, Any]) -> str:
    return json.dumps(train, sort_keys=True)


def trained(study: SearchStudy) -> list[str]:
    return [configuration(t.user_attrs["train"]) for t in study.trials]


def answer(study: SearchStudy, planned: PlannedTrial) -> None:
    """One mark: warm-up and many epochs do well."""
    score = planned.train.warmup + 0.1 * planned.train.epochs
    study.mark(planned.number, 100, score, slot_seconds=1.0)
    study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score, has_checkpoint=True))


@pytest.mark.parametrize(
    ("raw", "points"),
    [
        ({"train.epochs": {"int": [1, 3]}}, 3),
        ({"train.epochs": {"log_int": [2, 5]}}, 4),
        ({"train.epochs": 3}, 1),
        ({**SMALL, "train.cooldown": {"uniform": [0.2, 0.2]}}, NUM_SMALL),
        (SMALL, NUM_SMALL),
        (finite(), 2 * 3 * (1 + 2 + 1)),
        ({**finite(), "train.warmup": {"uniform": [0, 0.1]}}, math.inf),
        ({"train.regularization": {"one_of": [{"kind": "none"}, {"kind": "l2"}]}}, math.inf),
    ],
)
def test_the_points_of_a_space_are_counted(raw: dict[str, Any], points: float) -> None:
    space = spaces.parse_space(raw)
    assert num_points(space) == points
    known = FiniteSpace.of(Search(space=raw), Train())
    assert (known is None) == (points == math.inf)
    if known is not None:
        assert len(known.points) == points


def test_points_that_differ_in_what_they_do_not_read_are_one() -> None:
    space = {
        "train.optimizer": {"choice": ["adamw", "sgd"]},
        "train.momentum": {"choice": [0.8, 0.9]},
        "train.schedule": {"choice": ["linear", "constant_with_cooldown"]},
        "train.cooldown": {"choice": [0.1, 0.2, 0.3]},
    }
    exp = experiment(space=space, sampler="grid", trials=99, default_recipe=False)
    study = in_memory(exp)
    run_all(study)
    assert len(study.trials) == (1 + 2) * (1 + 3)


def test_the_points_of_a_large_space_are_not_listed() -> None:
    raw = {"train.epochs": {"int": [1, 100]}, "train.batch_size": {"int": [1, MOST_POINTS // 100]}}
    assert FiniteSpace.of(Search(space=raw), Train()) is not None
    raw["train.batch_size"] = {"int": [1, MOST_POINTS // 100 + 1]}
    assert FiniteSpace.of(Search(space=raw), Train()) is None


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "gp", "nsga2"])
def test_no_configuration_runs_twice_and_the_last_one_ends_the_search(sampler: str) -> None:
    # A Gaussian process is fitted from the eleventh trial on, which takes seconds.
    space = SMALL if sampler != "gp" else {**SMALL, "train.epochs": {"int": [1, 2]}}
    study = in_memory(experiment(space=space, sampler=sampler, trials=99, default_recipe=False))
    while (planned := study.next_trial()) is not None:
        assert not study.is_over()
        answer(study, planned)
    assert study.is_over()
    points = num_points(study.space)
    assert len(trained(study)) == len(set(trained(study))) == points


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "nsga2"])
def test_a_space_too_large_to_be_listed_is_not_repeated_either(sampler: str) -> None:
    space = {
        "train.learning_rate": {"choice": [2e-6 * 2**i for i in range(12)]},
        "train.batch_size": {"choice": [8, 16, 32, 64, 128]},
        "train.epochs": {"int": [1, 6]},
        "train.frozen_layers": {"int": [0, 6]},
        "train.schedule": {"choice": ["linear", "cosine", "constant"]},
        "train.max_grad_norm": {"choice": [0.5, 1.0]},
    }
    exp = experiment(space=space, sampler=sampler, trials=68, default_recipe=False, pruner="none")
    study = in_memory(exp)
    assert study.finite is None
    run_all(study, until=lambda number: number == 59)
    assert None not in [study.next_trial() for _ in range(8)]  # all at once
    assert len(trained(study)) == len(set(trained(study))) == 68


def test_a_sequence_in_a_finite_space_goes_on_behind_the_points_it_has_drawn() -> None:
    space = {"train.epochs": {"int": [1, 64]}, "train.batch_size": {"choice": [8, 16]}}
    study = in_memory(experiment(space=space, sampler="qmc", trials=32, default_recipe=False))
    run_all(study)
    epochs = [trial.params["train.epochs"] for trial in study.trials[:16]]
    assert sorted((epoch - 1) // 4 for epoch in epochs) == list(range(16))  # one in each part
    assert len(set(trained(study))) == 32


def test_a_sequence_hears_the_priors_of_a_finite_space() -> None:
    space = {
        "train.epochs": {"int": [1, 60], "prior": {"center": 3, "spread": 1}},
        "train.batch_size": {"int": [1, 100]},
    }
    study = in_memory(experiment(space=space, sampler="qmc", trials=12, default_recipe=False))
    run_all(study)
    assert sum(trial.params["train.epochs"] <= 6 for trial in study.trials) >= 6


def test_a_gaussian_process_does_not_repeat_itself_either() -> None:
    space = {**SMALL, "train.epochs": {"int": [1, 6]}}
    study = in_memory(experiment(space=space, sampler="gp", trials=12, default_recipe=False))
    run_all(study)
    assert len(trained(study)) == len(set(trained(study))) == 12


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_conditional_choices_are_told_apart_by_what_they_train(sampler: str) -> None:
    study = in_memory(experiment(space=finite(), sampler=sampler, trials=99, default_recipe=False))
    run_all(study)
    assert study.is_over()
    assert len(trained(study)) == len(set(trained(study))) == 24
    for trial in study.trials:  # the study's own parameters are those that were trained
        params = trial.user_attrs["params"]
        assert trial.params.items() <= params.items()
        assert params["train.warmup"] == 0.1


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
@pytest.mark.parametrize("slots", [4, NUM_SMALL + 3])
def test_several_slots_never_share_a_configuration(sampler: str, slots: int) -> None:
    study = in_memory(experiment(space=SMALL, sampler=sampler, trials=99, default_recipe=False))
    running: list[PlannedTrial] = []
    for _ in range(NUM_SMALL):
        if len(running) == slots:
            answer(study, running.pop(0))
        planned = study.next_trial()
        assert planned is not None
        running.append(planned)
    assert study.next_trial() is None
    while running:  # nothing is left to ask, but the search ends with its last trial
        assert not study.is_over()
        answer(study, running.pop())
    assert study.is_over()
    assert len(trained(study)) == len(set(trained(study))) == NUM_SMALL


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_reopened_study_knows_what_was_tried(tmp_path: Path, sampler: str) -> None:
    exp = experiment(space=SMALL, sampler=sampler, trials=99)
    straight = in_memory(exp)
    run_all(straight)
    for stop_at in (0, 4, 9):
        run_all(open_study(tmp_path, exp), until=lambda n, stop_at=stop_at: n == stop_at)
    interrupted = open_study(tmp_path, exp).next_trial()  # and then the driver dies
    assert interrupted is not None
    again = open_study(tmp_path, exp)
    run_all(again)
    assert again.is_over()
    assert open_study(tmp_path, exp).next_trial() is None
    assert len(trained(again)) == len(set(trained(again))) == NUM_SMALL
    assert history(again) == history(straight)


def test_a_failed_configuration_counts_as_tried() -> None:
    study = in_memory(experiment(space=SMALL, trials=99, default_recipe=False))
    while (planned := study.next_trial()) is not None:
        study.finish(planned.number, TrialState.FAIL, Outcome(reason="disk full"))
    assert len(set(trained(study))) == len(study.trials) == NUM_SMALL


def test_a_default_recipe_within_the_space_is_one_of_its_points() -> None:
    within = in_memory(experiment(space=SMALL, trials=99))
    run_all(within)
    assert within.trials[0].user_attrs["train"]["warmup"] == 0.06
    assert len(set(trained(within))) == len(within.trials) == NUM_SMALL
    beside = in_memory(experiment(space={**SMALL, "train.epochs": {"int": [4, 6]}}, trials=99))
    run_all(beside)
    assert beside.trials[0].user_attrs["train"]["epochs"] == 3
    assert len(set(trained(beside))) == len(beside.trials) == NUM_SMALL + 1


def test_what_the_user_enqueues_twice_runs_twice() -> None:
    wanted = {"train.learning_rate": 1e-5, "train.epochs": 2, "train.warmup": 0.0}
    study = in_memory(
        experiment(space=SMALL, trials=99, default_recipe=False, enqueue=[wanted, wanted])
    )
    run_all(study)
    first, second, *others = trained(study)
    assert first == second
    assert [t.user_attrs.get("role") for t in study.trials[:3]] == ["enqueued", "enqueued", None]
    assert len({first, *others}) == len(others) + 1 == NUM_SMALL
    assert study.is_over()


def test_the_number_of_trials_still_ends_a_search_of_a_finite_space() -> None:
    study = in_memory(experiment(space=SMALL, trials=5))
    run_all(study)
    assert study.is_over()
    assert len(set(trained(study))) == 5


def test_tpe_still_learns_in_a_finite_space() -> None:
    space = {"train.frozen_layers": {"int": [0, 59]}, "train.epochs": {"int": [1, 2]}}
    study = in_memory(experiment(space=space, trials=40, default_recipe=False, pruner="none"))
    while (planned := study.next_trial()) is not None:
        score = -abs(int(planned.train.frozen_layers) - 20) / 60
        study.mark(planned.number, 100, score, 1.0)
        study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score))
    distance = [abs(t.params["train.frozen_layers"] - 20) for t in study.trials]
    assert len(set(trained(study))) == 40
    assert sum(distance[25:]) / 15 < 0.5 * sum(distance[:10]) / 10


def prior_draw(
    space: spaces.Space, seed: int, number: int, train: Train | None = None, num_layers: int = 6
) -> dict[str, Any]:
    return proposals.prior_draw(space, seed, number, number, train or Train(), num_layers)


def test_prior_draws_name_the_parameters_with_priors_and_stay_in_range() -> None:
    space = spaces.parse_space(PRIORS)
    known = spaces.domains(space)
    drawn = [draw for seed in range(500) if (draw := prior_draw(space, seed, 0))]
    assert len(drawn) == 500  # n0 / (n0 + 0): always
    for draw in drawn:
        assert set(draw) == set(PRIORS) - {"train.frozen_layers"}
        assert all(value in known[name] for name, value in draw.items())
        assert type(draw["train.epochs"]) is type(draw["train.batch_size"]) is int
        assert type(draw["train.learning_rate"]) is type(draw["train.warmup"]) is float
    assert {draw["train.epochs"] for draw in drawn} == {2, 3, 4, 5}
    middle = sorted(draw["train.learning_rate"] for draw in drawn)[250]
    assert 1.8e-5 < middle < 3e-5  # what lies below 1e-5 is cut off, so a little above the center


@pytest.mark.parametrize("domain", [{"log_uniform": [3e-5, 3e-5]}, {"uniform": [3e-5, 3e-5]}])
def test_a_prior_over_a_single_value_draws_it(domain: dict[str, Any]) -> None:
    raw = {**domain, "prior": {"center": 3e-5, "spread": 2.0}}
    assert prior_draw(spaces.parse_space({"train.learning_rate": raw}), 0, 0) == {
        "train.learning_rate": 3e-5
    }


def test_a_prior_pulls_draws_to_its_center() -> None:
    raw = {"log_uniform": [1e-6, 1e-3], "prior": {"center": 2e-5, "spread": 1.5}}
    space = spaces.parse_space({"train.learning_rate": raw})
    logs = [math.log(prior_draw(space, seed, 0)["train.learning_rate"]) for seed in range(1000)]
    mean = sum(logs) / 1000
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / 999)
    # Four standard errors of a mean and of a standard deviation.
    assert abs(mean - math.log(2e-5)) < 4 * math.log(1.5) / math.sqrt(1000)
    assert abs(deviation - math.log(1.5)) < 4 * math.log(1.5) / math.sqrt(2000)


@pytest.mark.parametrize("number", [1, 3, 10, 30, 90, 990])
def test_the_share_of_priors_is_n0_of_n0_plus_n(number: int) -> None:
    assert PRIOR_STRENGTH == 10
    space = spaces.parse_space(PRIORS)
    share, tries = 10 / (10 + number), 2000
    drawn = sum(bool(prior_draw(space, seed, number)) for seed in range(tries))
    assert abs(drawn / tries - share) < 4 * math.sqrt(share * (1 - share) / tries)


def test_draws_of_one_search_have_that_share_too() -> None:
    space = spaces.parse_space(PRIORS)
    numbers = range(1000)
    shares = [10 / (10 + n) for n in numbers]
    drawn = sum(bool(prior_draw(space, 17, n)) for n in numbers)
    assert abs(drawn - sum(shares)) < 4 * math.sqrt(sum(p * (1 - p) for p in shares))


def test_priors_hold_until_something_is_known_however_many_trials_run() -> None:
    """With as many slots as trials nothing is known of any, so all of them are the priors'."""
    exp = experiment(space=PRIORS, trials=60, default_recipe=False)
    study = in_memory(exp)
    begun = [study.next_trial() for _ in range(40)]
    assert None not in begun
    drawn = [proposals.prior_draw(study.space, exp.seed, n, 0, exp.train, 6) for n in range(40)]
    assert all(drawn)
    assert all(
        prior.items() <= t.params.items() for prior, t in zip(drawn, study.trials, strict=True)
    )
    for planned in begun:  # a mark is something, too
        assert planned is not None
        study.mark(planned.number, 33, 0.5, 1.0)
    later = [study.next_trial() for _ in range(20)]
    assert None not in later
    shares = [
        bool(proposals.prior_draw(study.space, exp.seed, n, 40, exp.train, 6))
        for n in range(40, 60)
    ]
    assert 0 < sum(shares) < 12  # 10 / (10 + 40): 4 on average
    for said, trial in zip(shares, study.trials[40:], strict=True):
        drawn = proposals.prior_draw(study.space, exp.seed, trial.number, 0, exp.train, 6)
        assert said == (drawn.items() <= trial.params.items())


def test_a_space_without_priors_is_the_samplers_alone() -> None:
    space = spaces.parse_space({"train.learning_rate": {"log_uniform": [1e-6, 1e-3]}})
    assert all(prior_draw(space, 17, n) == {} for n in range(20))


def test_a_study_draws_from_its_priors_and_leaves_the_rest_to_the_sampler() -> None:
    exp = experiment(space=PRIORS, trials=30, default_recipe=False, pruner="none")
    study = in_memory(exp)
    known = spaces.domains(study.space)
    run_all(study)
    for trial in study.trials:
        assert all(trial.params[name] in domain for name, domain in known.items())
        proposed = prior_draw(study.space, exp.seed, trial.number)
        assert proposed.items() <= trial.params.items()
        assert "role" not in trial.user_attrs  # a sampled trial like any other
    assert len({t.params["train.frozen_layers"] for t in study.trials[:10]}) > 2


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_priors_bend_a_finite_space_and_it_is_used_up_all_the_same(sampler: str) -> None:
    epochs = {"int": [1, 8], "prior": {"center": 8, "spread": 0.5}}
    space = {"train.epochs": epochs, "train.warmup": {"choice": [0.0, 0.1, 0.2, 0.3]}}
    study = in_memory(experiment(space=space, sampler=sampler, trials=99, default_recipe=False))
    while (planned := study.next_trial()) is not None:
        study.finish(planned.number, TrialState.FAIL, Outcome(reason="not run"))
    assert len(set(trained(study))) == len(study.trials) == 32
    assert sum(t.params["train.epochs"] >= 7 for t in study.trials[:5]) >= 3


def test_a_prior_of_the_learning_rate_rises_with_the_frozen_depth() -> None:
    """Three times the center with all layers frozen, the center itself with none."""
    space = spaces.parse_space(
        {
            "train.learning_rate": {
                "log_uniform": [1e-7, 1e-1],
                "prior": {"center": 1e-4, "spread": 1.5, "frozen_factor": 3.0},
            },
            "train.frozen_layers": {"int": [0, 6]},
        }
    )
    drawn = [prior_draw(space, seed, 0) for seed in range(3000)]
    by_depth = {
        k: [d["train.learning_rate"] for d in drawn if d["train.frozen_layers"] == k]
        for k in range(7)
    }
    assert min(map(len, by_depth.values())) > 300  # every depth is as likely
    for k, rates in by_depth.items():
        middle = math.exp(sum(map(math.log, rates)) / len(rates))
        assert middle == pytest.approx(1e-4 * 3 ** (k / 6), rel=0.1)


@pytest.mark.parametrize(
    ("frozen_layers", "train", "factor"),
    [
        ({"int": [0, 3]}, Train(), 3**0.25),  # 0 to 3 of 6 layers: an eighth of 3 on average
        ({"choice": [2]}, Train(), 3 ** (1 / 3)),
        ({"choice": ["all"]}, Train(), 3),
        (3, Train(), 3**0.5),
        (None, Train(frozen_layers="all"), 3),
        (None, Train(frozen_layers=3), 3**0.5),
    ],
)
def test_the_frozen_depth_is_of_the_models_layers_wherever_it_is_set(
    frozen_layers: Any, train: Train, factor: float
) -> None:
    prior = {"center": 1e-4, "spread": 1.5, "frozen_factor": 3.0}
    raw: dict[str, Any] = {"train.learning_rate": {"log_uniform": [1e-7, 1e-1], "prior": prior}}
    if frozen_layers is not None:
        raw["train.frozen_layers"] = frozen_layers
    space = spaces.parse_space(raw)
    rates = [prior_draw(space, seed, 0, train)["train.learning_rate"] for seed in range(2000)]
    middle = math.exp(sum(map(math.log, rates)) / len(rates))
    assert middle == pytest.approx(1e-4 * factor, rel=0.05)


def test_a_combination_that_cannot_be_trained_is_said_before_the_search() -> None:
    space = {"train.warmup": {"choice": [0.0, 0.5]}, "train.cooldown": {"choice": [0.2, 0.6]}}
    train = Train(schedule="constant_with_cooldown")
    with pytest.raises(ConfigError, match=r"not all combinations work: .*0\.5 \+ 0\.6"):
        FiniteSpace.of(Search(space=space), train)


def test_a_low_frozen_factor_stays_within_the_range() -> None:
    prior = {"center": 2e-5, "spread": 1.1, "frozen_factor": 0.1}
    space = spaces.parse_space(
        {
            "train.learning_rate": {"log_uniform": [1e-5, 1e-3], "prior": prior},
            "train.frozen_layers": {"int": [0, 6], "prior": {"center": 6, "spread": 0.5}},
        }
    )
    drawn = [prior_draw(space, seed, 0) for seed in range(200)]
    assert min(d["train.learning_rate"] for d in drawn) >= 1e-5
    assert min(d["train.frozen_layers"] for d in drawn) >= 4  # its own prior holds


def test_a_grid_leaves_out_what_ran_first(tmp_path: Path) -> None:
    exp = experiment(
        space={"train.batch_size": {"choice": [16, 32]}},
        sampler="grid",
        default_recipe=False,
        enqueue=[{"train.batch_size": 16}],
    )
    study = open_study(tmp_path, exp)
    run_all(study)
    assert [t.params["train.batch_size"] for t in study.trials] == [16, 32]


def test_a_large_grid_begins_at_once_and_in_its_order(tmp_path: Path) -> None:
    space = {"train.epochs": {"int": [1, 100]}, "train.batch_size": {"int": [1, 120]}}
    study = open_study(tmp_path, experiment(space=space, sampler="grid", default_recipe=False))
    run_all(study)
    assert len(study.study.get_trials()) == 12  # as many as run
    assert [t.params["train.batch_size"] for t in study.trials] == list(range(1, 13))


def test_a_value_that_stands_twice_in_a_grid_runs_once(tmp_path: Path) -> None:
    space = {"train.batch_size": {"choice": [16, 16, 32]}, "train.epochs": {"int": [1, 2]}}
    study = open_study(tmp_path, experiment(space=space, sampler="grid", default_recipe=False))
    run_all(study)
    assert len(study.trials) == 4


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_a_warm_start_that_leaves_something_open_repeats_nothing(sampler: str) -> None:
    space = {"train.batch_size": {"choice": [16, 32]}, "train.epochs": {"int": [1, 2]}}
    for seed in range(10):
        exp = experiment(space=space, sampler=sampler, default_recipe=False, trials=9)
        exp = exp.model_copy(update={"seed": seed})
        warm = [{"train.batch_size": 16}, {"train.batch_size": 16, "train.epochs": 1}]
        storage = optuna.storages.InMemoryStorage()
        study = SearchStudy(
            exp, storage, recipe=RECIPE, num_layers=6, direction="maximize", warm=warm
        )
        run_all(study)
        assert len(trained(study)) == len(set(trained(study))) == 4
        assert study.trials[0].user_attrs["role"] == "warm start"


def outside(sampler: str, trials: int) -> SearchStudy:
    """A search whose default recipe has another learning rate than its space."""
    space = {
        "train.learning_rate": {"log_uniform": [2e-4, 2e-2]},
        "train.frozen_layers": {"int": [0, 6]},
    }
    return in_memory(experiment(space=space, sampler=sampler, trials=trials, pruner="none"))


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2"])
def test_a_recipe_outside_the_space_keeps_no_sampler_from_searching_it(sampler: str) -> None:
    study = outside(sampler, 70 if sampler == "nsga2" else 30)
    while (planned := study.next_trial()) is not None:
        score = -abs(math.log10(planned.train.learning_rate) + 2.2)
        study.mark(planned.number, 100, score, slot_seconds=1.0)
        study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score))
    scores = [trial.value for trial in study.trials]
    tenth = len(scores) // 10
    assert min(scores[:1]) < -0.5  # the recipe itself
    early, late = sum(scores[1 : tenth + 1]) / tenth, sum(scores[-tenth:]) / tenth
    assert late > early
    assert late > -0.35  # blind draws have -0.6 on average


def test_a_draw_overlooks_no_trial_where_the_recipe_is_outside_the_space() -> None:
    """TPE leaves out whoever has the number of the trial that it draws for."""
    study = outside("tpe", 6)
    run_all(study)
    search = study.experiment.search
    seen = as_seen_now(study.trials, search, study.study.directions)
    assert [trial.number for trial in seen] == [1, 2, 3, 4, 5]
    rehearsal = rehearsal_of(study.study, seen, search, seed=0, number=6)
    assert [rehearsal.ask().number for _ in range(2)] == [6, 7]


def test_a_sequence_is_spread_over_every_parameter_from_the_start() -> None:
    study = outside("qmc", 33)
    run_all(study)
    rates = sorted(math.log10(t.params["train.learning_rate"]) for t in study.trials[1:])
    low, width = math.log10(2e-4), 2 / 32
    assert [int((rate - low) / width) for rate in rates] == list(range(32))  # one in each part
    exp = experiment(sampler="qmc", trials=60, default_recipe=False)
    study = in_memory(exp)
    run_all(study)
    strength = "train.regularization.weight_decay.strength"
    drawn = [t.params[strength] for t in study.trials if strength in t.params]
    assert len(set(drawn)) == len(drawn) > 20


def test_a_gaussian_process_stays_away_from_what_was_pruned_and_at_fault() -> None:
    space = {"train.learning_rate": {"log_uniform": [1e-6, 1e-1]}}
    exp = experiment(space=space, sampler="gp", trials=30, default_recipe=False)
    study = in_memory(exp)
    faults = []
    while (planned := study.next_trial()) is not None:
        rate = planned.train.learning_rate
        faults.append(rate > 1e-3)
        if faults[-1]:
            end = Outcome("not finite", fault=True)
            study.finish(planned.number, TrialState.PRUNED, end)
            continue
        score = math.log10(rate)
        reason = study.mark(planned.number, 10, score, 1.0)
        state = TrialState.COMPLETE if reason is None else TrialState.PRUNED
        if reason is None:
            study.mark(planned.number, 100, score, 2.0)
        study.finish(planned.number, state, Outcome(reason=reason, score=score))
    assert sum(faults[10:]) <= 6
    assert len({t.params["train.learning_rate"] for t in study.trials}) == 30


def test_a_gaussian_process_of_several_objectives_stays_away_from_faults() -> None:
    exp = experiment(
        objective=["accuracy", "train_seconds"],
        space={"train.learning_rate": {"log_uniform": [1e-6, 1e-1]}},
        sampler="gp",
        trials=18,
        default_recipe=False,
    )
    study, faults = in_memory(exp), []
    while (planned := study.next_trial()) is not None:
        rate = planned.train.learning_rate
        faults.append(rate > 1e-3)
        if faults[-1]:
            study.finish(planned.number, TrialState.PRUNED, Outcome("not finite", fault=True))
            continue
        score = 1 + math.log10(rate) / 6
        study.mark(planned.number, 100, score, 2.0)
        study.finish(planned.number, TrialState.COMPLETE, Outcome(score=score, train_seconds=2.0))
    assert sum(faults[:10]) >= 2  # it has something to learn from
    assert sum(faults[12:]) <= 2


def test_nsga2_has_generations_in_a_finite_space_too() -> None:
    space = {"train.frozen_layers": {"int": [0, 6]}, "train.epochs": {"int": [1, 9]}}
    study = in_memory(experiment(space=space, sampler="nsga2", trials=40, default_recipe=False))
    while (planned := study.next_trial()) is not None:
        answer(study, planned)
    key = study.study.sampler._get_generation_key()
    found = [trial.system_attrs[key] for trial in study.trials]
    assert found == sorted(found)
    assert found[-1] >= 5
    assert len(set(trained(study))) == 40


def test_what_an_enqueued_configuration_leaves_open_is_a_point_that_was_not_tried() -> None:
    wanted = [{"train.learning_rate": 1e-5}] * (NUM_SMALL // 2 + 1)  # one more than there are
    for seed in range(3):
        exp = experiment(space=SMALL, trials=99, default_recipe=False, enqueue=wanted)
        study = in_memory(exp.model_copy(update={"seed": seed}))
        run_all(study)
        assert len(set(trained(study))) == len(study.trials) == NUM_SMALL
        roles = [t.user_attrs.get("role") for t in study.trials]
        assert roles == ["enqueued"] * (NUM_SMALL // 2) + [None] * (NUM_SMALL // 2)


def test_what_a_first_configuration_leaves_open_is_drawn() -> None:
    space = {**SMALL, "train.epochs": {"int": [1, 40]}}
    wanted = [{"train.learning_rate": 1e-5}] * 8
    exp = experiment(space=space, trials=8, default_recipe=False, enqueue=wanted)
    epochs = []
    for seed in (1, 2):
        study = in_memory(exp.model_copy(update={"seed": seed}))
        run_all(study)
        epochs.append([trial.params["train.epochs"] for trial in study.trials])
    assert max(epochs[0]) > 8
    assert epochs[0] != epochs[1]


def test_an_enqueued_constant_is_left_out() -> None:
    space = {**SMALL, "train.schedule": "cosine"}
    wanted = {"train.epochs": 2, "train.learning_rate": 1e-5, "train.warmup": 0.0}
    exp = experiment(
        space=space,
        trials=2,
        default_recipe=False,
        enqueue=[{**wanted, "train.schedule": "cosine"}],
    )
    study = in_memory(exp)
    run_all(study)
    assert study.trials[0].params == wanted
    assert study.trials[0].user_attrs["train"]["schedule"] == "cosine"
    assert len(set(trained(study))) == 2
