"""Which hyperparameters mattered, judged from trials whose scores are known functions of them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from sft_ray.analysis.importance import importances
from sft_ray.search.narration import importance_lines

RATE, EPOCHS, BATCH, KIND, DECAY, L2_SP = (
    "train.learning_rate",
    "train.epochs",
    "train.batch_size",
    "train.regularization.kind",
    "train.regularization.weight_decay.strength",
    "train.regularization.l2_sp.strength",
)
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    RATE: FloatDistribution(1e-6, 1e-3, log=True),
    EPOCHS: IntDistribution(1, 5),
    BATCH: CategoricalDistribution([16, 32, 64]),
    KIND: CategoricalDistribution(["none", "weight_decay", "l2_sp"]),
    DECAY: FloatDistribution(1e-3, 0.3, log=True),
    L2_SP: FloatDistribution(1e-5, 0.1, log=True),
}
Score = Callable[[dict[str, Any]], float]


def drawn(count: int) -> list[dict[str, Any]]:
    """Parameters as a random search draws them; strengths belong to their kind."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        kind = str(rng.choice(["none", "weight_decay", "l2_sp"]))
        params: dict[str, Any] = {
            RATE: 10 ** rng.uniform(-6, -3),
            EPOCHS: int(rng.integers(1, 6)),
            BATCH: int(rng.choice([16, 32, 64])),
            KIND: kind,
        }
        if kind == "weight_decay":
            params[DECAY] = 10 ** rng.uniform(-3, math.log10(0.3))
        if kind == "l2_sp":
            params[L2_SP] = 10 ** rng.uniform(-5, -1)
        found.append(params)
    return found


def trial(
    params: dict[str, Any],
    value: float | None,
    state: TrialState = TrialState.COMPLETE,
    marks: dict[int, float] | None = None,
) -> FrozenTrial:
    distributions = {name: DISTRIBUTIONS[name] for name in params}
    return optuna.trial.create_trial(
        params=params,
        distributions=distributions,
        value=value,
        state=state,
        intermediate_values=marks or {},
    )


def scored(count: int, score: Score) -> list[FrozenTrial]:
    return [trial(params, score(params)) for params in drawn(count)]


def without_strengths(count: int, score: Score) -> list[FrozenTrial]:
    """A quarter of the work."""
    common = (RATE, EPOCHS, BATCH, KIND)
    found = [{name: params[name] for name in common} for params in drawn(count)]
    return [trial(params, score(params)) for params in found]


def shares(found: dict[str, Any]) -> dict[str, float]:
    return {name: entry["importance"] for name, entry in found["parameters"].items()}


def by_rate(params: dict[str, Any]) -> float:
    return 1 - 0.2 * abs(math.log10(params[RATE]) + 4)


def by_epochs(params: dict[str, Any]) -> float:
    return 0.1 * float(params[EPOCHS])


@pytest.mark.parametrize(
    ("score", "name"),
    [
        (by_rate, RATE),
        (by_epochs, EPOCHS),
        (lambda params: {16: 0.3, 32: 0.9, 64: 0.5}[params[BATCH]], BATCH),
        (lambda params: {"none": 0.3, "weight_decay": 0.5, "l2_sp": 0.9}[params[KIND]], KIND),
    ],
)
def test_the_parameter_that_drives_the_score_comes_first(score: Score, name: str) -> None:
    found = importances(without_strengths(40, score), [10, 33])["finished"]
    assert next(iter(found["parameters"])) == name
    assert found["parameters"][name] == {
        "importance": pytest.approx(1, abs=0.15),
        "trials": 40,
        "reliable": True,
    }


def test_shares_are_ordered_and_those_of_all_trials_add_up_to_one() -> None:
    def score(params: dict[str, Any]) -> float:
        return by_rate(params) + 0.3 * by_epochs(params)

    found = shares(importances(scored(60, score), [10])["finished"])
    judged = [found[name] for name in found if name not in (DECAY, L2_SP)]
    assert judged == sorted(judged, reverse=True)
    assert list(found)[:2] == [RATE, EPOCHS]
    assert sum(found[name] for name in (RATE, EPOCHS, BATCH, KIND)) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found.values())


def test_the_same_trials_give_the_same_figures() -> None:
    trials = scored(20, by_rate)
    assert importances(trials, [10, 33]) == importances(trials, [10, 33])


def test_a_strength_is_judged_among_trials_of_its_kind_only() -> None:
    """It decides all among its own, and nothing among the rest, where it does not exist."""

    def score(params: dict[str, Any]) -> float:
        return 0.5 if DECAY not in params else 0.5 + 0.1 * math.log10(params[DECAY])

    trials = scored(90, score)
    having = [t for t in trials if DECAY in t.params]
    found = importances(trials, [10])["finished"]
    among_its_kind = importances(having, [10])["finished"]
    assert found["parameters"][DECAY]["trials"] == len(having)
    assert found["parameters"][DECAY] == among_its_kind["parameters"][DECAY]
    assert found["parameters"][DECAY]["importance"] > 0.8
    # All trials of the other kind have one score: nothing can be said of its strength.
    assert L2_SP not in found["parameters"]
    assert found["parameters"][KIND]["trials"] == found["trials"] == 90


def test_a_strength_of_few_among_many_is_unreliable_and_stands_behind() -> None:
    def score(params: dict[str, Any]) -> float:
        return 0.5 if DECAY not in params else 0.5 + 0.1 * math.log10(params[DECAY])

    tree = importances(scored(40, score), [10])
    judged = tree["finished"]["parameters"]
    assert judged[DECAY]["trials"] < 30 <= tree["finished"]["trials"]
    assert (judged[DECAY]["reliable"], judged[KIND]["reliable"]) == (False, True)
    assert list(judged)[-1] == DECAY
    assert judged[DECAY]["importance"] > max(judged[name]["importance"] for name in (RATE, EPOCHS))
    said = importance_lines(tree)["importance"]
    assert f"(among {judged[DECAY]['trials']}, unreliable under 30) (40 trials)" in said


def test_a_strength_of_too_few_trials_is_left_out() -> None:
    params = [p for p in drawn(80) if DECAY not in p]
    decayed = [{**params[i], KIND: "weight_decay", DECAY: 0.01 * (1 + i)} for i in range(4)]
    plain = [{k: v for k, v in p.items() if k != L2_SP} | {KIND: "none"} for p in params]
    for count, is_judged in ((3, False), (4, True)):
        few = [{k: v for k, v in p.items() if k != L2_SP} for p in decayed[:count]]
        trials = [trial(p, by_rate(p)) for p in [*plain, *few]]
        found = importances(trials, [10])["finished"]["parameters"]
        assert (DECAY in found) == is_judged
        assert next(iter(found)) == RATE


@pytest.mark.parametrize(("count", "reliable"), [(4, False), (29, False), (30, True)])
def test_figures_of_fewer_than_thirty_trials_are_called_unreliable(
    count: int, reliable: bool
) -> None:
    found = importances(scored(count, by_rate), [10])["finished"]
    assert (found["trials"], found["reliable"]) == (count, reliable)
    assert found["parameters"]


def test_the_first_rung_counts_those_that_were_stopped_there() -> None:
    """Epochs decide who is fast, the learning rate who is good in the end."""
    trials = [
        trial(params, by_rate(params), marks={10: by_epochs(params), 33: 0.0, 100: 1.0})
        if params[EPOCHS] > 3
        else trial(params, None, TrialState.PRUNED, marks={10: by_epochs(params)})
        for params in drawn(60)
    ]
    complete = sum(t.state == TrialState.COMPLETE for t in trials)
    assert 15 < complete < 45
    found = importances(trials, [10, 33])
    assert (found["finished"]["trials"], found["first_rung"]["trials"]) == (complete, 60)
    assert next(iter(found["finished"]["parameters"])) == RATE
    assert next(iter(found["first_rung"]["parameters"])) == EPOCHS


def test_trials_that_never_reached_the_rung_or_the_end_do_not_count() -> None:
    trials = scored(10, by_rate)
    others = [
        trial(params, None, state)
        for params in drawn(10)
        for state in (TrialState.FAIL, TrialState.PRUNED)
    ]
    found = importances([*trials, *others], [10])
    assert found["finished"] == importances(trials, [10])["finished"]
    assert found["first_rung"] == {"trials": 0, "reliable": False, "parameters": {}}


def test_without_rungs_there_is_no_first_one() -> None:
    trials = [trial(p, by_rate(p), marks={100: by_rate(p)}) for p in drawn(10)]
    found = importances(trials, [])
    assert found["first_rung"] == {"trials": 0, "reliable": False, "parameters": {}}
    assert found["finished"]["parameters"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_trials_have_no_importance(count: int) -> None:
    found = importances(scored(count, by_rate), [10])
    assert found["finished"] == {"trials": count, "reliable": False, "parameters": {}}


def test_scores_that_are_all_the_same_have_no_importance() -> None:
    trials = [trial(p, 0.5, marks={10: 0.25, 100: 0.5}) for p in drawn(40)]
    nothing = {"trials": 40, "reliable": True, "parameters": {}}
    assert importances(trials, [10]) == {"finished": nothing, "first_rung": nothing}


def test_a_space_that_has_one_value_only_has_no_importance() -> None:
    rng = np.random.default_rng(0)
    trials = [
        optuna.trial.create_trial(
            params={EPOCHS: 3}, distributions={EPOCHS: IntDistribution(3, 3)}, value=rng.random()
        )
        for _ in range(30)
    ]
    found = importances(trials, [10])["finished"]
    assert found == {"trials": 30, "reliable": True, "parameters": {}}


def test_a_parameter_that_has_one_value_only_has_no_importance_beside_others() -> None:
    trials = [
        optuna.trial.create_trial(
            params={RATE: params[RATE], EPOCHS: 3},
            distributions={RATE: DISTRIBUTIONS[RATE], EPOCHS: IntDistribution(3, 3)},
            value=by_rate(params),
        )
        for params in drawn(30)
    ]
    found = shares(importances(trials, [10])["finished"])
    assert found[RATE] == 1
    assert found.get(EPOCHS, 0) == 0


def test_a_recipe_outside_the_space_does_not_take_its_parameters_out_of_the_count() -> None:
    trials = without_strengths(40, by_rate)
    recipe = trial({EPOCHS: 3, BATCH: 32, KIND: "none"}, 0.7)  # its rate could not be drawn
    recipe.set_user_attr("role", "default recipe")
    found = importances([recipe, *trials], [10])["finished"]
    assert found == importances(trials, [10])["finished"]
    assert next(iter(found["parameters"])) == RATE
    assert sum(shares(found).values()) == pytest.approx(1)


def test_scores_on_any_scale_are_judged_alike() -> None:
    plain = shares(importances(without_strengths(30, by_rate), [10])["finished"])
    for factor in (1e-6, -1.0, 1e6):
        trials = without_strengths(30, lambda params, factor=factor: factor * by_rate(params))
        found = shares(importances(trials, [10])["finished"])
        assert next(iter(found)) == RATE
        assert found[RATE] == pytest.approx(plain[RATE], abs=0.02)


def test_what_never_varied_is_left_out_and_stops_nothing() -> None:
    """One kind of penalty only: its strength can be judged, the choice of kinds cannot."""
    trials = [
        optuna.trial.create_trial(
            params={KIND: "weight_decay", DECAY: strength},
            distributions={KIND: DISTRIBUTIONS[KIND], DECAY: DISTRIBUTIONS[DECAY]},
            value=strength,
        )
        for strength in (0.002, 0.01, 0.05, 0.1, 0.2)
    ]
    assert list(importances(trials, [10])["finished"]["parameters"]) == [DECAY]
    same = [
        optuna.trial.create_trial(
            params={KIND: "none"}, distributions={KIND: DISTRIBUTIONS[KIND]}, value=value
        )
        for value in (0.1, 0.2, 0.3, 0.4)
    ]
    assert importances(same, [10])["finished"]["parameters"] == {}
