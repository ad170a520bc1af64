"""`sft-ray confirm`: the best configurations of a search once more, on seeds it has not seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from sft_ray import space as spaces
from sft_ray.analysis.confirm import (
    Candidate,
    candidates,
    confirmation,
    is_out_of_the_race,
)
from sft_ray.analysis.model_card import model_card
from sft_ray.analysis.outcome import slot_seconds_of
from sft_ray.analysis.results import SearchResult, check_tree, reading
from sft_ray.analysis.tables import scored_words
from sft_ray.config import Confirm, Experiment, apply_values
from sft_ray.errors import ConfigError, TrialError
from sft_ray.recipes import YARDSTICK, default_recipe
from sft_ray.run_store import (
    BEST,
    CONFIRMATION,
    RESULTS,
    TRIAL,
    RunStore,
    open_run,
    put_winner,
    read_experiment,
    read_results,
    write_results,
)
from sft_ray.screen import Screen, count
from sft_ray.search.fixed_runs import FixedRun, Row, run_fixed
from sft_ray.search.narration import say_confirmation
from sft_ray.search.preflight import check_default_recipe, prepare_experiment
from sft_ray.serving.evaluate import record_test, recorded_test, score_split
from sft_ray.serving.predict import load_predictor
from sft_ray.training.preparation import Prepared, check_origin
from sft_ray.training.seeds import derived_seed

FOLDER = "confirm"  # of the runs, below the run folder
RUNS_IN_ANY_CASE = 2  # seeds that a budget does not cut


@dataclass(frozen=True)
class Confirmed:
    """A search's outcome behind its confirmation; `tree` is confirm.json."""

    result: SearchResult
    tree: dict[str, Any]


def run_confirm(
    run: str | RunStore,
    plan: Confirm,
    *,
    address: str | None = None,
    quiet: bool = False,
    seconds: float | None = None,
) -> Confirmed:
    """Run, or go on with, a confirmation; best/ and results.json speak of its winner afterwards.

    The best configurations of the search and the default recipe train on the same fresh seeds;
    one that is clearly behind is dropped.  best/ becomes the winner's model of the first of these
    seeds, which was settled before it ran.  The test split is scored once with that model, and
    once with the default recipe's.

    Args:
        run: a finished run, or its path or URI.
        plan: how many configurations and seeds; more than before go on where those stopped.
        address: of a Ray cluster, as in `run_search`.
        seconds: no run starts later than so many seconds from now, but for the first two seeds.
            A confirmation of this plan that has ended is not taken further.

    Raises:
        SftError: something the user can mend; nothing has been written then.
        TrialError: nothing could be confirmed; what was finished is kept.
        KeyboardInterrupt: interrupted; the same call goes on where it stopped.
    """
    store = open_run(run) if isinstance(run, str) else run
    experiment, found = read_experiment(store), read_results(store)
    if found is None:
        raise ConfigError(
            f"{store.location}: the search has not finished; its own command goes on with it"
        )
    check_tree(found, store.path_of(RESULTS))
    result = SearchResult(store.location, found)
    screen = Screen(quiet)
    prepared = prepare_experiment(experiment)
    check_default_recipe(prepared)
    check_origin(prepared, result.tree.get("environment"), store.location)
    sign = prepared.task.sign(prepared.objective)
    default = _default_recipe(experiment, prepared)
    with reading(store.path_of(RESULTS)):
        chosen = candidates(result.trials, plan.top, sign, default)
        trains = [
            apply_values(experiment.train, {f"train.{k}": v for k, v in one.train.items()})
            for one in chosen
        ]
    seeds = fresh_seeds(experiment.seed, plan.seeds)
    if is_confirmed(store, experiment.seed, plan) and seconds is not None:
        seconds = 0.0
    runs = [
        FixedRun(one.arm, train, one.params, seed, keep_model=seed == seeds[0])
        for seed in seeds  # all configurations on one seed before the next one
        for one, train in zip(chosen, trains, strict=True)
    ]
    screen.say(
        f"confirming {count(len(chosen), 'configuration')} of {store.location} on {len(seeds)} "
        "fresh seeds"
    )
    with store.locked():
        rows = run_fixed(
            prepared,
            runs,
            store,
            FOLDER,
            screen,
            address=address,
            leave_out=_rule(sign, seeds, seconds),
        )
        tree: dict[str, Any] = {
            "metric": prepared.objective,
            "direction": prepared.direction,
            "top": plan.top,
            "seeds": seeds,
            "configurations": confirmation(chosen, rows, sign),
        }
        winner = tree["configurations"][0]
        if winner["expected"] is None or winner["behind"]:
            raise TrialError(f"{store.location}: no configuration finished on all fresh seeds")
        complete = [row for row in rows if row["state"] == TrialState.COMPLETE.name]
        ended = {row["arm"]: row for row in complete if row["seed"] == seeds[0]}
        models = {run.arm: run for run in runs if run.keep_model and run.arm in ended}
        scored = {arm: models[arm] for arm in (winner["arm"], YARDSTICK) if arm in models}
        tree["test"] = _test_scores(prepared, store, scored)
        store.write_json(CONFIRMATION, tree)
        arm = winner["arm"]
        result = _conclude(prepared, store, result, tree, ended[arm], models[arm])
    confirmed = Confirmed(result, tree)
    say_confirmation(screen, tree, result, prepared, scored_words(store))
    return confirmed


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Seeds that no trial of the search has trained with."""
    return [derived_seed(seed, "confirm", i) for i in range(count)]


def is_confirmed(store: RunStore, seed: int, plan: Confirm) -> bool:
    """Whether a confirmation of this plan has ended.

    Args:
        seed: of the experiment.

    Raises:
        ConfigError: confirm.json is damaged.
    """
    before, seeds = store.read_json(CONFIRMATION), fresh_seeds(seed, plan.seeds)
    with reading(store.path_of(CONFIRMATION)):
        return bool(before) and (before.get("top"), before.get("seeds")) == (plan.top, seeds)


def seconds_taken(store: RunStore) -> float:
    """Slot time of all runs of a confirmation that have ended.

    Raises:
        ConfigError: the record of one is damaged.
    """
    seconds = 0.0
    for path in store.files_below(FOLDER):
        if path.endswith(f"/{TRIAL}"):
            with reading(store.path_of(path)):
                seconds += slot_seconds_of(store.read_json(path))
    return seconds


def _default_recipe(experiment: Experiment, prepared: Prepared) -> Candidate:
    """As the search would have run it, for one that left it out."""
    recipe = default_recipe(prepared.model.layer_parameters)
    train = apply_values(experiment.train, recipe).model_dump(mode="json")
    return Candidate(YARDSTICK, None, spaces.parameters(recipe), train, None)


def _rule(
    sign: int, seeds: list[int], seconds: float | None
) -> Callable[[FixedRun, Sequence[Row]], bool]:
    """Which runs need not start: of clear losers, and when time is up."""
    started = time.monotonic()

    def leave_out(run: FixedRun, rows: Sequence[Row]) -> bool:
        is_late = seconds is not None and time.monotonic() - started > seconds
        if is_late and run.seed not in seeds[:RUNS_IN_ANY_CASE]:
            return True
        return is_out_of_the_race(run.arm, rows, sign)

    return leave_out


def _test_scores(
    prepared: Prepared, store: RunStore, runs: dict[str, FixedRun]
) -> dict[str, Any] | None:
    """Score the test split with one model per configuration, each once and on record."""
    if prepared.dataset.test_split != "labelled":
        return None
    scored: dict[str, Any] = {}
    for arm, run in runs.items():
        path = f"{FOLDER}/{run.key}/best"
        record = recorded_test(store, path)
        if record is None:
            with store.fetched_folder(path) as folder:
                predictor = load_predictor(str(folder))
                found = score_split(predictor, prepared.experiment, "test")
            record = record_test(store, store.path_of(path), *found)
        scored[arm] = {"run": run.key, **{k: record[k] for k in ("metrics", "num_examples")}}
    return scored


def _conclude(
    prepared: Prepared,
    store: RunStore,
    result: SearchResult,
    tree: dict[str, Any],
    row: Row,
    run: FixedRun,
) -> SearchResult:
    """Put the confirmed winner in best/, and what to expect of it in results.json."""
    winner, test = tree["configurations"][0], tree["test"] or {}
    over = winner["over_default"]
    gain = 0.0 if winner["arm"] == YARDSTICK else None
    best = {
        **result.best,
        "trial": winner["trial"],
        "complete": True,
        "params": winner["params"],
        "train": run.train.model_dump(mode="json"),
        "validation": row["metrics"],
        "seed": row["seed"],
        "expected": winner["expected"],
        "gain_over_default": gain if over is None else over["difference"],
        "gain_interval": over,
        "flattered": winner["flattered"],
        "test": test.get(winner["arm"]),
        "checkpoint": store.path_of(BEST),
    }
    updated = {**result.tree, "best": best}
    card = model_card(
        updated,
        prepared.experiment.to_tree(),
        prepared.dataset.label_names,
        scored=scored_words(store),
    )
    put_winner(store, f"{FOLDER}/{run.key}/best", card)
    write_results(store, updated)
    return SearchResult(store.location, updated)
