"""Between Ray Tune and the conductor: a Tune searcher, a Tune scheduler, and the run itself.

Tune's view of a trial is thin on purpose: it carries our number and nothing is decided from its
state, because it cannot tell a stop from a finish.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from sft_ray.errors import TrialError
from sft_ray.run_store import ERROR_LOG, RunStore
from sft_ray.screen import count
from sft_ray.search.cluster import Layout
from sft_ray.search.conductor import Conductor
from sft_ray.search.slot import HEAD, Slot
from sft_ray.training.preparation import Prepared


def run_on_slots(conductor: Conductor, prepared: Prepared, layout: Layout) -> None:
    """Let Ray Tune hand the conductor's trials to slots until it has no more.

    Raises:
        TrialError: nothing can go on; what was finished is kept.
        KeyboardInterrupt: interrupted; what was finished is kept.
    """
    experiment, store, screen = prepared.experiment, conductor.store, conductor.screen
    # Ray's own files lie beside the run folders, because they hold pickles.
    ray_storage = RunStore(store.storage, f".ray/{store.name}-{os.getpid()}")
    settings = {
        "workers": layout.workers_per_trial,
        "resources_per_worker": layout.resources_per_worker,
        "ray_storage": str(ray_storage.local_root or ray_storage.location),
        "worker": {
            "experiment": experiment.anchored().to_tree(),
            "run": store.anchored(),  # which may have been moved since the experiment was written
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
                search_alg=TrialSearcher(conductor),
                scheduler=TrialScheduler(conductor),
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
            f"stopped after {conductor.stopped}; the causes are in {store.path_of(ERROR_LOG)}; "
            "the same command goes on where it stopped"
        )
    if not conductor.trials.is_over():  # Tune has caught a Ctrl-C
        screen.event(f"interrupted; what was finished is in {store.location}")
        raise KeyboardInterrupt


class TrialSearcher(Searcher):
    """Tune asks it for trials; it answers while a slot is free."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        if self.conductor.stopped is not None:
            return Searcher.FINISHED
        if len(self.conductor.planned) >= self.conductor.slots:
            return None
        planned = self.conductor.next_trial(trial_id)
        if planned is None:
            return None if self.conductor.planned else Searcher.FINISHED
        return {"assignment": planned.assignment()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            self.conductor.on_slot_lost(trial_id, "the slot died")
        self.conductor.on_end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the run folder is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the run folder is the state."""


class TrialScheduler(FIFOScheduler):
    """Tune asks it at every mark whether the trial goes on."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        go_on = self.conductor.on_message(trial.trial_id, json.loads(result["message"]))
        return FIFOScheduler.CONTINUE if go_on else FIFOScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        error = Path(trial.error_file)  # Tune's local copy; the stored one comes later
        reason = error.read_text(encoding="utf-8") if error.exists() else "the slot died"
        self.conductor.on_slot_lost(trial.trial_id, reason)
