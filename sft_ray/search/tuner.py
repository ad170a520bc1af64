"""Run a search: preflight, a folder, slots, Ray Tune over the study, the outcome."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from sft_ray.analysis.importance import importances
from sft_ray.analysis.model_card import model_card
from sft_ray.analysis.results import (
    SearchResult,
    best_row,
    gain_over_default,
    pareto_rows,
    row_of,
    winner,
)
from sft_ray.config import Experiment
from sft_ray.environment import describe_environment
from sft_ray.errors import TrialError
from sft_ray.recipes import default_recipe
from sft_ray.run_store import (
    BEST,
    ENVIRONMENT,
    ERROR_LOG,
    JOURNAL,
    PREDICTIONS,
    RESULTS,
    RunStore,
    finished_results,
    read_experiment,
    trial_folder,
    write_experiment,
)
from sft_ray.screen import Screen, count
from sft_ray.search.cluster import Layout, capacity, capacity_here, connected, plan_layout
from sft_ray.search.narration import say_outcome, say_truth
from sft_ray.search.preflight import prepare_experiment
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.search.warm_start import warm_configurations
from sft_ray.training.preparation import Prepared


def run_search(
    experiment: Experiment,
    *,
    address: str | None = None,
    fresh: bool = False,
    extend: int = 0,
    quiet: bool = False,
    source: str | None = None,
) -> SearchResult:
    """Run or resume the search of an experiment and return its outcome.

    Args:
        experiment: what to search.
        address: of a Ray cluster; None uses the current `ray.init`, a cluster that runs on this
            machine, or starts Ray here.
        fresh: set an existing run folder of that name aside and begin again.
        extend: trials to add to those that the run folder was made for.
        quiet: print nothing.
        source: the command's arguments, for the hints at the end.

    Raises:
        SftError: something the user can mend; nothing has been written then.
        TrialError: the search could not go on; what was finished is kept.
        KeyboardInterrupt: interrupted; the same call goes on where it stopped.
    """
    screen, started = Screen(quiet), time.monotonic()
    if extend:
        experiment = extended(experiment, extend)
    prepared = prepare_experiment(experiment, capacity_here(address))
    experiment = prepared.experiment
    store = RunStore(experiment.storage, experiment.name)
    tree = None if fresh else finished_results(store, experiment)
    if tree is not None:
        screen.say(f"{store.location} is finished; its outcome:")
        result = SearchResult(store.location, tree)
        say_outcome(screen, result, prepared, source)
        return result
    warm = []
    if fresh or not store.exists(JOURNAL):
        warm = warm_configurations(experiment, prepared.facts(), prepared.objective)
    with connected(address):
        layout = plan_layout(experiment, capacity())
        if fresh and store.is_there():
            screen.say(f"the old folder is now {store.set_aside()}")
        with store.locked():
            study = _open_study(prepared, store, warm)
            store.push_journal()  # what runs first is settled from here on
            store.delete_file(RESULTS)
            write_experiment(store, experiment)
            environment = describe_environment(
                {
                    "slots": layout.slots,
                    "workers_per_trial": layout.workers_per_trial,
                    "gpus_per_worker": layout.gpus_per_worker,
                    **prepared.facts(),
                }
            )
            store.write_json(ENVIRONMENT, environment)
            say_truth(screen, prepared, layout, store.location, study)
            startup_seconds = None
            if not study.is_over():
                startup_seconds = _run_trials(prepared, layout, store, study, screen, started)
            result = _conclude(prepared, store, study, environment, startup_seconds)
    say_outcome(screen, result, prepared, source)
    return result


def extended(experiment: Experiment, by: int) -> Experiment:
    """The experiment with so many trials more than its finished run was made for.

    A run that is not finished goes on with the trials it has: it may be this very extension.
    """
    store = RunStore(experiment.storage, experiment.name)
    stored = read_experiment(store)
    more = by if stored is None or store.exists(RESULTS) else 0
    before = (stored or experiment).search.trials
    search = experiment.search.model_copy(update={"trials": before + more})
    return experiment.model_copy(update={"search": search})


def _open_study(prepared: Prepared, store: RunStore, warm: list[dict[str, Any]]) -> SearchStudy:
    store.pull_journal()
    return SearchStudy(
        prepared.experiment,
        open_storage(store.journal),
        recipe=default_recipe(prepared.model.num_parameters),
        direction=prepared.direction,
        costs=prepared.experiment.search.costs,
        warm=warm,
    )


def _run_trials(
    prepared: Prepared,
    layout: Layout,
    store: RunStore,
    study: SearchStudy,
    screen: Screen,
    started: float,
) -> float | None:
    """Let Ray Tune run trials until the study is over; seconds until the first slot was ready."""
    from ray import tune

    from sft_ray.search.conductor import Conductor, StudyScheduler, StudySearcher
    from sft_ray.search.slot import HEAD, Slot

    experiment = prepared.experiment
    # Ray's own files lie beside the run folders, because they hold pickles.
    ray_storage = RunStore(experiment.storage, f".ray/{experiment.name}-{os.getpid()}")
    conductor = Conductor(study, store, screen, prepared.objective, layout.slots)
    settings = {
        "workers": layout.workers_per_trial,
        "resources_per_worker": layout.resources_per_worker,
        "ray_storage": str(ray_storage.local_root or ray_storage.location),
        "worker": {
            "experiment": experiment.anchored().to_tree(),
            "dataset_folder": str(prepared.dataset_folder),
            "objective": prepared.objective,
        },
    }
    slot = tune.with_resources(
        tune.with_parameters(Slot, settings=settings), tune.PlacementGroupFactory([HEAD])
    )
    # Tune prints the traceback of every lost slot; ours are in the run's error log.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    screen.event(f"starting {count(layout.slots, 'slot')}: processes, model, data")
    try:
        tune.Tuner(
            slot,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(conductor),
                scheduler=StudyScheduler(conductor),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=settings["ray_storage"],
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    finally:
        ray_storage.delete()
    if conductor.stopped is not None:
        raise TrialError(
            f"the search stopped after {conductor.stopped}; the causes are in "
            f"{store.path_of(ERROR_LOG)}; the same command goes on where it stopped"
        )
    if not study.is_over():  # Tune has caught a Ctrl-C
        finished = sum(trial.state.is_finished() for trial in study.trials)
        screen.event(f"interrupted with {finished} trials finished in {store.location}")
        raise KeyboardInterrupt
    return conductor.startup_seconds(started)


def _conclude(
    prepared: Prepared,
    store: RunStore,
    study: SearchStudy,
    environment: dict[str, Any],
    startup_seconds: float | None,
) -> SearchResult:
    """Put the winner in best/ and write results.json last."""
    best = winner(study.trials, study.sign)
    if best is None:
        raise TrialError(
            f"none of {len(study.trials)} trials left a model; their reasons are in "
            f"{store.path_of('trials')}"
        )
    tree = {
        "name": prepared.experiment.name,
        "metric": prepared.objective,
        "direction": prepared.direction,
        "costs": list(study.costs),
        "wall_seconds": study.wall_seconds(),
        "startup_seconds": startup_seconds,
        "best": best_row(
            row_of(best, prepared.experiment.seed),
            gain_over_default(study.trials, best, study.sign),
            store.path_of(BEST),
        ),
        "pareto": pareto_rows(study.trials, study.pareto_set(), study.costs),
        "importance": importances(study.trials, prepared.experiment.search.rungs),
        "trials": [row_of(trial, prepared.experiment.seed) for trial in study.trials],
        "environment": environment,
    }
    card = model_card(tree, prepared.experiment.to_tree(), prepared.dataset.label_names)
    with store.replacing_folder(BEST) as folder:
        store.fetch_folder(f"{trial_folder(best.number)}/best", folder)
        store.write_bytes(PREDICTIONS, (folder / PREDICTIONS).read_bytes())
        (folder / PREDICTIONS).unlink()  # texts of others do not belong into a model folder
        (folder / "README.md").write_text(card, encoding="utf-8")
    store.write_json(RESULTS, tree)
    return SearchResult(store.location, tree)
