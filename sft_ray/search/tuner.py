"""Run a search: preflight, resources to slots, Ray Tune over the study, the outcome."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_ray import __version__
from sft_ray.analysis.results import SearchResult, best_row, trial_row, winner
from sft_ray.config import Experiment
from sft_ray.errors import ResourceError, TrialError
from sft_ray.run_store import (
    BEST,
    ENVIRONMENT,
    ERROR_LOG,
    RESULTS,
    RunStore,
    check_folder_rule,
    trial_folder,
    write_experiment,
)
from sft_ray.screen import Screen, duration, short_params, space_facts
from sft_ray.search.preflight import Prepared, prepare_experiment
from sft_ray.search.study import SearchStudy, default_recipe, open_storage

REPORTED_PACKAGES = ("ray", "torch", "transformers", "optuna", "datasets", "pyarrow", "numpy")
# Ray reads these when it is imported or started.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
}


@dataclass(frozen=True)
class Layout:
    """How the cluster is shared out."""

    slots: int
    workers_per_trial: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def resources_per_worker(self) -> dict[str, float]:
        resources = {"CPU": self.cpus_per_worker}
        return resources | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})


def run_search(
    experiment: Experiment,
    *,
    address: str | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> SearchResult:
    """Run or resume the search of an experiment and return its outcome.

    Args:
        experiment: what to search.
        address: of a Ray cluster; None uses a running `ray.init`, `RAY_ADDRESS`, or starts Ray
            on this machine.
        fresh: set an existing run folder of that name aside and begin again.
        quiet: print nothing.

    Raises:
        SftError: something the user can mend; nothing has been written then.
        TrialError: the search could not go on; what was finished is kept.
        KeyboardInterrupt: interrupted; the same call goes on where it stopped.
    """
    screen = Screen(quiet)
    started = time.monotonic()
    prepared = prepare_experiment(experiment)
    experiment = prepared.experiment
    store = RunStore(experiment.storage, experiment.name)
    if fresh and store.exists(""):
        screen.say(f"the old folder is now {store.set_aside()}")
    known = check_folder_rule(store, experiment)
    with store.locked(), _ray(address):
        layout = plan_layout(experiment)
        store.pull_journal()
        study = SearchStudy(
            experiment,
            open_storage(store.journal),
            recipe=default_recipe(prepared.model.num_parameters),
            direction=prepared.direction,
        )
        write_experiment(store, experiment)
        environment = describe_environment(prepared, layout)
        if not known:
            store.write_json(ENVIRONMENT, environment)
        _say_truth(screen, prepared, layout, store, study)
        startup = None
        if not study.is_over():
            startup = _run_trials(prepared, layout, store, study, screen, started)
        return _conclude(prepared, store, study, screen, environment, startup)


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
    from ray.tune import PlacementGroupFactory

    from sft_ray.search.conductor import Conductor, StudyScheduler, StudySearcher
    from sft_ray.search.slot import HEAD, Slot

    experiment = prepared.experiment
    # Ray's own files lie beside the run folders, because they hold pickles.
    ray_storage = RunStore(experiment.storage, f".ray/{experiment.name}-{os.getpid()}")
    conductor = Conductor(study, store, screen, prepared.objective, layout.slots)
    settings = {
        "workers": layout.workers_per_trial,
        "gpus_per_worker": layout.gpus_per_worker,
        "resources_per_worker": layout.resources_per_worker,
        "ray_storage": str(ray_storage.local_root or ray_storage.location),
        "worker": {
            "experiment": experiment.anchored().to_tree(),
            "dataset_folder": str(prepared.dataset_folder),
            "objective": prepared.objective,
        },
    }
    trainable = tune.with_resources(
        tune.with_parameters(Slot, settings=settings), PlacementGroupFactory([HEAD])
    )
    screen.event(f"starting {layout.slots} slot{'s' * (layout.slots > 1)}")
    try:
        tune.Tuner(
            trainable,
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
                failure_config=tune.FailureConfig(max_failures=0),
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
    if not study.is_over():
        raise KeyboardInterrupt
    return conductor.startup_seconds(started)


def _conclude(
    prepared: Prepared,
    store: RunStore,
    study: SearchStudy,
    screen: Screen,
    environment: dict[str, Any],
    startup: float | None,
) -> SearchResult:
    """Put the winner in best/, write results.json last, say the outcome."""
    experiment = prepared.experiment
    best = winner(study.trials, study.sign)
    if best is None:
        raise TrialError(
            f"none of {len(study.trials)} trials left a model; their reasons are in "
            f"{store.path_of('trials')}"
        )
    previous = store.read_json(RESULTS) or {}
    if previous.get("best", {}).get("trial") != best.number or not store.exists(BEST):
        store.copy_folder(f"{trial_folder(best.number)}/best", BEST)
    tree = {
        "name": experiment.name,
        "metric": prepared.objective,
        "direction": prepared.direction,
        "wall_seconds": study.wall_seconds(),
        "startup_seconds": startup if startup is not None else previous.get("startup_seconds"),
        "best": best_row(study.trials, best, study.sign, store.path_of(BEST)),
        "trials": [trial_row(trial, experiment.seed) for trial in study.trials],
        "environment": environment,
    }
    store.write_json(RESULTS, tree)
    result = SearchResult(store.location, tree)
    _say_outcome(screen, prepared, result)
    return result


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A connection to Ray; a Ray that was started or joined here is left at the end.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"no Ray at {where!r}: {reason}; start one with `ray start --head`, or leave --address "
            "out to use this machine alone"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def plan_layout(experiment: Experiment) -> Layout:
    """Share the cluster out into slots.

    Raises:
        ResourceError: a trial needs more than the cluster has.
    """
    import ray

    wanted = experiment.resources
    have = ray.cluster_resources()
    gpus: float = 0
    if wanted.gpus_per_worker == "auto":
        gpus = 1 / wanted.trials_per_gpu if have.get("GPU", 0) >= 1 else 0
    else:
        gpus = wanted.gpus_per_worker
    layout = Layout(0, wanted.workers_per_trial, wanted.cpus_per_worker, gpus)
    fits = min(
        int(have.get(kind, 0) / (amount * wanted.workers_per_trial) + 1e-9)
        for kind, amount in layout.resources_per_worker.items()
    )
    slots = fits if wanted.slots == "auto" else wanted.slots
    if not 1 <= slots <= fits:
        needs = " and ".join(
            f"{amount * wanted.workers_per_trial * max(slots, 1):g} {kind}s"
            for kind, amount in layout.resources_per_worker.items()
        )
        there = " and ".join(f"{have.get(kind, 0):g} {kind}s" for kind in layout.resources_per_worker)
        raise ResourceError(
            f"resources: {max(slots, 1)} x {wanted.workers_per_trial} workers need {needs}, the "
            f"cluster has {there}; lower workers_per_trial, cpus_per_worker or slots"
        )
    slots = min(slots, experiment.search.trials)
    return Layout(slots, wanted.workers_per_trial, wanted.cpus_per_worker, gpus)


def describe_environment(prepared: Prepared, layout: Layout) -> dict[str, Any]:
    """Versions, hardware and fingerprints; no names of machines, no variables."""
    return {
        "sft_ray": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in REPORTED_PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "slots": layout.slots,
        "workers_per_trial": layout.workers_per_trial,
        "gpus_per_worker": layout.gpus_per_worker,
        "model": prepared.experiment.model,
        "model_type": prepared.model.model_type,
        "num_parameters": prepared.model.num_parameters,
        "data_fingerprint": prepared.dataset.fingerprint,
    }


def _commit() -> str | None:
    """The commit of the source checkout this package runs from, if it does."""
    git = shutil.which("git")
    if git is None:
        return None
    found = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def _say_truth(
    screen: Screen, prepared: Prepared, layout: Layout, store: RunStore, study: SearchStudy
) -> None:
    experiment, dataset = prepared.experiment, prepared.dataset
    search, model = experiment.search, prepared.model
    device = "GPU" if layout.gpus_per_worker else "CPU"
    finished = sum(t.state.is_finished() for t in study.trials)
    budget = ", ".join(
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in search.budget.model_dump().items()
        if value is not None
    )
    truncated = sum(dataset.num_truncated.values())
    screen.facts(
        {
            "search": f"{experiment.name} in {store.location}"
            + (f", resumed with {finished} trials finished" if study.trials else ""),
            "model": f"{experiment.model} ({model.model_type}, {model.num_layers} layers, "
            f"{model.num_parameters / 1e6:.1f} M parameters)",
            "data": f"{len(dataset.train)} train and {len(dataset.validation)} validation examples, "
            f"{len(dataset.label_names)} labels, {dataset.train.lengths.mean():.1f} tokens on "
            f"average, {truncated} cut at {experiment.data.max_length}; majority class "
            f"{dataset.majority_share:.3f}",
            "device": f"{device}, {prepared.precision(device)}",
            "layout": f"{layout.slots} slots x {layout.workers_per_trial} workers x "
            f"{layout.cpus_per_worker:g} CPUs",
            "objective": f"{prepared.objective}, {prepared.direction}",
            "search for": f"{search.trials} trials, {search.sampler}, pruner {search.pruner}"
            + (f" at {search.rungs} %, factor {search.reduction_factor}" * (search.pruner != "none"))
            + (f"; budget: {budget}" if budget else ""),
            "default": short_params(study.recipe_params()),
            "space": "",
            **space_facts(study.space),
        }
    )


def _say_outcome(screen: Screen, prepared: Prepared, result: SearchResult) -> None:
    best = result.best
    gain = best["gain_over_default"]
    states = [trial["state"] for trial in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    scores = ", ".join(f"{name} {value:.4f}" for name, value in best["validation"].items())
    screen.say()
    screen.facts(
        {
            "best": f"trial {best['trial']}: {short_params(best['params'])}"
            + ("" if best["complete"] else " (unfinished: no trial reached its end)"),
            "validation": scores,
            "gain": "the default recipe did not finish"
            if gain is None
            else f"{gain:+.4f} {prepared.objective} over the default recipe",
            "trials": f"{len(states)}: {counts}; {duration(result.tree['wall_seconds'])}",
            "checkpoint": best["checkpoint"],
        }
    )
    screen.say()
    screen.say("next:")
    screen.say(
        f"  python -c \"from transformers import pipeline; print(pipeline('text-classification', "
        f"'{best['checkpoint']}')('your text'))\""
    )
    screen.say(f"  sft-ray search … search.trials={2 * len(states)}   # the same command, longer")


def find_result(experiment: Experiment) -> SearchResult | None:
    """The stored outcome of a search, None if it has not ended."""
    store = RunStore(experiment.storage, experiment.name)
    tree = store.read_json(RESULTS)
    return None if tree is None else SearchResult(store.location, tree)
