"""Confirmation as arithmetic: who is confirmed, who is dropped, how much a search flattered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft_ray.analysis.confirm import Candidate, candidates, confirmation, is_out_of_the_race
from sft_ray.analysis.results import SearchResult
from sft_ray.analysis.tables import scored_words
from sft_ray.cli import main
from sft_ray.config import Confirm, Experiment
from sft_ray.recipes import YARDSTICK
from sft_ray.run_store import TEST_ACCESS, RunStore, write_experiment
from sft_ray.screen import Screen
from sft_ray.search.narration import say_confirmation
from sft_ray.serving.evaluate import record_test, recorded_test

DEFAULT = Candidate(YARDSTICK, None, {"train.learning_rate": 2e-5}, {"learning_rate": 2e-5}, None)


def trial(number: int, value: float, state: str = "COMPLETE", **more: Any) -> dict[str, Any]:
    rate = 1e-4 * (1 + number)
    return {
        "number": number,
        "state": state,
        "role": "sampled",
        "params": {"train.learning_rate": rate},
        "train": {"learning_rate": rate},
        "value": value,
        **more,
    }


def run(arm: str, seed: int, value: float | None, state: str = "COMPLETE") -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "value": value, "state": state}


def test_the_best_finished_trials_and_the_default_recipe_are_confirmed() -> None:
    rows = [
        trial(0, 0.7, role=YARDSTICK, train=DEFAULT.train),
        trial(1, 0.9, "PRUNED"),
        trial(2, 0.8),
        trial(3, 0.85),
        trial(4, 0.6),
    ]
    chosen = candidates(rows, 2, 1, DEFAULT)
    assert [one.arm for one in chosen] == ["trial 3", "trial 2", YARDSTICK]
    assert chosen[-1].trial == 0
    assert chosen[-1].search_value == 0.7
    worst = candidates(rows, 2, -1, DEFAULT)
    assert [one.arm for one in worst] == ["trial 4", YARDSTICK]  # the default is among the best


def test_the_default_recipe_is_confirmed_even_if_the_search_left_it_out() -> None:
    chosen = candidates([trial(0, 0.5)], 3, 1, DEFAULT)
    assert [(one.arm, one.trial) for one in chosen] == [("trial 0", 0), (YARDSTICK, None)]


def test_a_configuration_counts_once_however_often_it_was_tried() -> None:
    rows = [trial(0, 0.9), trial(1, 0.8, train={"learning_rate": 1e-4}), trial(2, 0.7)]
    chosen = candidates(rows, 2, 1, DEFAULT)
    assert [one.arm for one in chosen] == ["trial 0", "trial 2", YARDSTICK]


def test_a_lucky_winner_is_unmasked() -> None:
    """40 searches over configurations of which one is better; noise is known and large."""
    rng = np.random.default_rng(0)
    noise, num_trials = 0.02, 30
    truth = np.full(num_trials, 0.80)
    truth[7] = 0.82
    flattered, right_by_search, right_by_confirm = [], 0, 0
    for _ in range(40):
        scores = truth + noise * rng.standard_normal(num_trials)
        rows = [trial(n, float(score)) for n, score in enumerate(scores)]
        chosen = candidates(rows, 8, 1, DEFAULT)
        runs = []
        for seed in range(10):
            for one in chosen:
                mean = 0.78 if one.trial is None else truth[one.trial]
                runs.append(run(one.arm, seed, float(mean + noise * rng.standard_normal())))
        table = confirmation(chosen, runs, 1)
        winner = table[0]
        by_search = next(row for row in table if row["arm"] == chosen[0].arm)
        flattered.append(by_search["flattered"])
        right_by_search += chosen[0].trial == 7
        right_by_confirm += winner["trial"] == 7
    # The best of thirty noisy scores lies about two standard deviations too high.
    assert 0.02 < np.mean(flattered) < 0.05
    assert right_by_confirm > right_by_search + 5


def test_intervals_of_the_confirmation_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    inside, repeats = 0, 400
    for _ in range(repeats):
        chosen = candidates([trial(0, 0.9)], 1, 1, DEFAULT)
        runs = [
            run(one.arm, seed, float(0.8 + 0.02 * rng.standard_normal()))
            for seed in range(5)
            for one in chosen
        ]
        expected = confirmation(chosen, runs, 1)[0]["expected"]
        inside += expected["low"] <= 0.8 <= expected["high"]
    # The better of two equal configurations is shown first, so a little below 95 %.
    assert inside / repeats > 0.88


def shared(arm: str, values: list[float]) -> list[dict[str, Any]]:
    return [run(arm, seed, value) for seed, value in enumerate(values)]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clear_loser_is_dropped_after_three_seeds(sign: int) -> None:
    good, bad = [0.90, 0.91, 0.89], [0.60, 0.61, 0.595]
    rows = shared("trial 1", [sign * v for v in good]) + shared("trial 2", [sign * v for v in bad])
    assert is_out_of_the_race("trial 2", rows, sign)
    assert not is_out_of_the_race("trial 1", rows, sign)
    assert not is_out_of_the_race("trial 2", rows[:2] + rows[3:5], sign)  # two seeds are too few
    assert not is_out_of_the_race("trial 3", rows, sign)  # has not run


def test_a_near_tie_is_not_dropped() -> None:
    rows = shared("trial 1", [0.90, 0.85, 0.89, 0.88]) + shared("trial 2", [0.89, 0.86, 0.87, 0.88])
    assert not is_out_of_the_race("trial 2", rows, 1)


def test_who_was_dropped_on_easy_seeds_does_not_win_by_their_mean() -> None:
    chosen = candidates([trial(1, 0.9), trial(2, 0.89)], 2, 1, DEFAULT)
    rows = shared("trial 1", [0.90, 0.912, 0.921, 0.80, 0.81])
    rows += shared("trial 2", [0.88, 0.8921, 0.9008]) + shared(
        YARDSTICK, [0.5, 0.52, 0.55, 0.4, 0.5]
    )
    assert is_out_of_the_race("trial 2", rows, 1)
    table = confirmation(chosen, rows, 1)
    assert [(row["arm"], row["behind"]) for row in table] == [
        ("trial 1", False),
        (YARDSTICK, False),
        ("trial 2", True),
    ]


def test_runs_that_a_budget_cut_are_ranked_over_the_seeds_that_all_have() -> None:
    chosen = candidates([trial(1, 0.9), trial(2, 0.89)], 2, 1, DEFAULT)
    rows = shared("trial 1", [0.90, 0.80]) + shared("trial 2", [0.89])
    rows += shared(YARDSTICK, [0.7, 0.6])
    assert [row["arm"] for row in confirmation(chosen, rows, 1)] == [
        "trial 1",
        "trial 2",
        YARDSTICK,
    ]


def test_who_failed_drops_nobody() -> None:
    chosen = candidates([trial(1, 0.9), trial(2, 0.89)], 2, 1, DEFAULT)
    rows = [*shared("trial 1", [0.95, 0.951, 0.949]), run("trial 1", 3, None, "PRUNED")]
    rows += shared("trial 2", [0.93, 0.932, 0.928, 0.93])
    rows += shared(YARDSTICK, [0.81, 0.8, 0.82, 0.81])
    assert not is_out_of_the_race("trial 2", rows, 1)
    assert confirmation(chosen, rows, 1)[0]["arm"] == "trial 2"


def test_the_yardstick_is_never_dropped() -> None:
    rows = shared("trial 1", [0.90, 0.91, 0.89]) + shared(YARDSTICK, [0.1, 0.11, 0.12])
    assert not is_out_of_the_race(YARDSTICK, rows, 1)


def test_wrong_drops_are_rare_among_equals() -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(200):
        rows: list[dict[str, Any]] = []
        dropped: set[str] = set()
        for seed in range(5):
            running = [f"trial {arm}" for arm in range(4) if f"trial {arm}" not in dropped]
            rows += [run(arm, seed, float(rng.standard_normal())) for arm in running]
            dropped |= {arm for arm in running if is_out_of_the_race(arm, rows, 1)}
        wrong += bool(dropped)
    assert wrong / 200 < 0.08


def test_a_failed_seed_puts_a_configuration_behind() -> None:
    chosen = candidates([trial(0, 0.9), trial(1, 0.8)], 2, 1, DEFAULT)
    runs = [
        run("trial 0", 1, None, "PRUNED"),
        run("trial 0", 2, 0.95),
        *[run(arm, seed, 0.7) for arm in ("trial 1", YARDSTICK) for seed in (1, 2)],
    ]
    table = confirmation(chosen, runs, 1)
    assert table[-1]["arm"] == "trial 0"
    assert table[-1]["behind"]
    assert table[-1]["expected"]["n"] == 1
    assert table[0]["over_default"]["difference"] == 0


def test_no_finished_run_leaves_no_expectation() -> None:
    chosen = candidates([trial(0, 0.9)], 1, 1, DEFAULT)
    table = confirmation(chosen, [run(YARDSTICK, 1, 0.5)], 1)
    assert [row["arm"] for row in table] == [YARDSTICK, "trial 0"]
    assert table[1]["expected"] is None
    assert table[1]["over_default"] is None


def test_lower_scores_win_where_they_are_better() -> None:
    chosen = candidates([trial(0, 0.2), trial(1, 0.3)], 2, -1, DEFAULT)
    runs = [run("trial 0", s, 0.4 + s / 100) for s in range(3)]
    runs += [run("trial 1", s, 0.3 + s / 100) for s in range(3)]
    runs += [run(YARDSTICK, s, 0.5) for s in range(3)]
    table = confirmation(chosen, runs, -1)
    assert table[0]["arm"] == "trial 1"
    assert table[0]["over_default"]["difference"] == pytest.approx(0.19)
    found = next(row for row in table if row["arm"] == "trial 0")
    assert found["flattered"] == pytest.approx(0.21)


def test_a_default_recipe_that_was_drawn_again_is_confirmed_once() -> None:
    rows = [
        trial(0, 0.8, role=YARDSTICK, train=DEFAULT.train),
        trial(1, 0.8, train=DEFAULT.train),
        trial(2, 0.9),
    ]
    for order in (rows, rows[::-1]):
        chosen = candidates(order, 3, 1, DEFAULT)
        assert [(one.arm, one.trial) for one in chosen] == [("trial 2", 2), (YARDSTICK, 0)]


def test_a_default_recipe_that_failed_on_a_seed_cannot_win_and_is_still_measured() -> None:
    chosen = candidates([trial(0, 0.9)], 1, 1, DEFAULT)
    runs = [
        run(YARDSTICK, 1, None, "PRUNED"),
        run(YARDSTICK, 2, 0.99),
        *[run("trial 0", seed, 0.7) for seed in (1, 2)],
    ]
    assert not is_out_of_the_race(YARDSTICK, runs, 1)
    winner, default = confirmation(chosen, runs, 1)
    assert (winner["arm"], winner["behind"]) == ("trial 0", False)
    assert default["behind"]
    assert winner["over_default"]["n"] == 1


@pytest.mark.parametrize(
    ("written", "words", "asked"),
    [
        (None, "", Confirm(top=3, seeds=5)),
        (Confirm(top=2, seeds=4), "", Confirm(top=2, seeds=4)),
        (Confirm(top=2, seeds=4), "--seeds 9", Confirm(top=2, seeds=9)),
        (Confirm(top=2, seeds=4), "--top 1 --seeds 2", Confirm(top=1, seeds=2)),
    ],
)
def test_the_command_asks_for_what_the_run_itself_names(
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    written: Confirm | None,
    words: str,
    asked: Confirm,
) -> None:
    found = list[Confirm]()
    monkeypatch.setattr(
        "sft_ray.search.confirm.run_confirm", lambda run, plan, address: found.append(plan)
    )
    store = RunStore(experiment.storage, "mine")
    write_experiment(store, experiment.model_copy(update={"confirm": written}))
    with pytest.raises(SystemExit) as caught:
        main(["confirm", store.location, *words.split()])
    assert not caught.value.code
    assert found == [asked]


def test_a_model_is_scored_on_the_test_split_once_wherever_its_run_lies(tmp_path: Path) -> None:
    store, path = RunStore(str(tmp_path), "mine"), "confirm/ab/best"
    assert recorded_test(store, path) is None
    record_test(store, "runs/elsewhere/confirm/ab/best", {"accuracy": 0.5}, 10)
    record_test(store, "runs/mine/best", {"accuracy": 0.75}, 10)  # by `evaluate`
    store.append_text(TEST_ACCESS, '{"model": "runs/mine/confirm/to')  # killed here
    found = recorded_test(store, path)
    assert found is not None
    assert (found["metrics"], found["num_examples"]) == ({"accuracy": 0.5}, 10)
    assert recorded_test(store, "confirm/to/best") is None
    assert recorded_test(store, "confirm/b/best") is None


def test_scorings_of_the_test_split_are_counted(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path), "mine")
    assert scored_words(store) is None
    said = []
    for model in ("s3://b/mine/confirm/ab/best?region=x", "runs/mine/confirm/cd/best", "runs/mine"):
        record_test(store, model, {"accuracy": 0.5}, 10)
        said.append(scored_words(store))
    store.append_text(TEST_ACCESS, '{"model": "runs/mine/confirm/to')  # killed here
    assert scored_words(store) == "scored 3 times in this run"
    assert said == [
        "scored once",
        "scored once with each of 2 models",
        "scored 3 times in this run",
    ]


def test_a_model_that_is_scored_again_is_not_scored_once(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path), "mine")
    for place in ("runs/mine", "moved"):
        record_test(store, f"{place}/confirm/ab/best", {"accuracy": 0.5}, 10)
    assert scored_words(store) == "scored 2 times in this run"


def test_a_confirmation_says_how_often_the_test_split_was_scored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = confirmation([DEFAULT], [run(YARDSTICK, seed, 0.5) for seed in (1, 2)], 1)
    test = {YARDSTICK: {"metrics": {"accuracy": 0.5}, "num_examples": 40}}
    tree = {"metric": "accuracy", "seeds": [1, 2], "configurations": rows, "test": test}
    best = {"validation": {"accuracy": 0.5}, "checkpoint": "runs/mine/best"}
    result = SearchResult("runs/mine", {"best": best})
    prepared: Any = SimpleNamespace(say_next=lambda *_: None)
    for scored, words in ((None, "scored once"), ("scored 3 times in this run",) * 2):
        say_confirmation(Screen(), tree, result, prepared, scored)
        assert f"accuracy 0.5000 (40 examples, {words})" in capsys.readouterr().out
