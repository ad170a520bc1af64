"""Between Ray Tune and the conductor: a Tune searcher, a scheduler, a callback, the run itself.

Tune's view of a trial is thin on purpose: it carries our number and nothing is decided from its
state, because it cannot tell a stop from a finish.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air._internal import usage
from ray.tune.error import TuneError
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from sft_ray.config import Watchdog
from sft_ray.errors import ResourceError, SftError, TrialError
from sft_ray.interrupt import Interruption, interruptible
from sft_ray.run_store import ERROR_LOG, RunStore
from sft_ray.screen import count
from sft_ray.search.cluster import draining
from sft_ray.search.conductor import Conductor
from sft_ray.search.everywhere import nodes
from sft_ray.search.layout import Layout, slots_now
from sft_ray.search.machines import Machines
from sft_ray.search.placement import free_what_the_dead_hold
from sft_ray.search.slot import HEAD, Slot
from sft_ray.search.watch import start_watch
from sft_ray.training.preparation import Prepared

CAUSE_SECONDS = 10.0  # until the watch has said why a slot was killed


def run_on_slots(conductor: Conductor, prepared: Prepared, layout: Layout) -> None:
    """Let Ray Tune hand the conductor's trials to slots until it has no more.

    Raises:
        TrialError: nothing can go on; what was finished is kept.
        ResourceError: a worker's disk is full or cannot be written; what was finished is kept.
        KeyboardInterrupt: interrupted; what was finished is kept, and the states of what was not.
    """
    experiment, store, screen = prepared.experiment, conductor.store, conductor.screen
    # Ray's own files lie beside the run folders, because they hold pickles.  A driver that was
    # killed may have left some.
    ray_storage = RunStore(store.storage, f".ray/{store.name}")
    ray_storage.delete()
    watch = start_watch(experiment.watchdog, HEAD)
    settings = {
        "workers": layout.workers_per_trial,
        "resources_per_worker": layout.resources_per_worker,
        "ray_storage": str(ray_storage.local_root or ray_storage.location),
        "watch": watch,
        "worker": {
            "experiment": layout.written_into(experiment.anchored()).to_tree(),
            "run": store.anchored(),  # which may have been moved since the experiment was written
            "dataset_folder": str(prepared.dataset_folder),
            "objective": prepared.objective,
        },
    }
    # Tune would give its actors the driver's cloud keys and a few settings of its own, as a runtime
    # environment: keys that end up in Ray's logs, and two starts of every process.
    class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = {}, set()
    # It would import every tracking library there is, to count callbacks that nobody is told of.
    usage.tag_callbacks = lambda _: False
    slot = tune.with_resources(
        tune.with_parameters(Slot, settings=settings), tune.PlacementGroupFactory([HEAD])
    )
    # Tune prints the traceback of every lost slot; ours are in the run's error log.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    machines = Machines(
        watch,
        screen.event,
        conductor.set_slots,
        nodes,
        draining,
        lambda without: slots_now(layout, without),
        layout.slots,
    )
    conductor.startup.end("study")
    screen.event(f"starting {count(layout.slots, 'slot')}: processes, model, data")
    try:
        with interruptible() as interruption, errors_as_raised():
            tune.Tuner(
                slot,
                tune_config=tune.TuneConfig(
                    search_alg=TrialSearcher(conductor),
                    scheduler=TrialScheduler(conductor, watch, machines),
                    num_samples=-1,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=settings["ray_storage"],
                    verbose=0,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[
                        EverySecond(conductor, watch, machines, interruption, experiment.watchdog)
                    ],
                ),
            ).fit()
    finally:
        ray.kill(watch)
        ray_storage.delete()
    conductor.settle()
    if conductor.disk_problem is not None:
        raise ResourceError(conductor.disk_problem)
    if conductor.stopped is not None:
        raise TrialError(
            f"stopped after {conductor.stopped}; the causes are in {store.path_of(ERROR_LOG)}; "
            "the same command goes on where it stopped"
        )
    if not conductor.trials.is_over():
        screen.event(f"interrupted; everything so far is in {store.location}")
        raise KeyboardInterrupt


@contextmanager
def errors_as_raised() -> Iterator[None]:
    """What the conductor raises, of which Tune makes a text: a full disk, a lost storage."""
    try:
        yield
    except TuneError as error:
        if isinstance(error.__context__, SftError | OSError):
            raise error.__context__ from None
        raise


class TrialSearcher(Searcher):
    """Tune asks it for trials; it answers while a slot is free."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        if self.conductor.starts_no_more:
            return Searcher.FINISHED
        if len(self.conductor.planned) >= self.conductor.slots:
            return None
        planned = self.conductor.next_trial(trial_id)
        if planned is None:
            return None if self.conductor.planned else Searcher.FINISHED
        return {"assignment": planned.assignment(), "trial_id": trial_id}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.conductor.on_slot_free(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the run folder is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the run folder is the state."""


class TrialScheduler(FIFOScheduler):
    """Tune asks it at every mark whether the trial goes on."""

    def __init__(self, conductor: Conductor, watch: Any, machines: Machines) -> None:
        super().__init__()
        self.conductor, self._watch, self._machines = conductor, watch, machines

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        message = json.loads(result["message"])
        go_on = self.conductor.on_message(trial.trial_id, message)
        if "failed" in message and not message.get("fault"):
            self._blame(self._loss(trial.trial_id)[2])
        elif "paused" not in message and not message.get("replayed"):
            where = self._loss(trial.trial_id)[2] if self._machines.has_failures else ()
            self._machines.succeeded(where)
        return FIFOScheduler.CONTINUE if go_on else FIFOScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        reason, excused, where = self._loss(trial.trial_id)
        error = Path(trial.error_file)  # Tune's local copy; the stored one comes later
        if reason is None and error.exists():
            reason = error.read_text(encoding="utf-8")
        # Where the machine was at fault, the trial was not.
        excused = excused or self._blame(where)
        self.conductor.on_slot_lost(trial.trial_id, reason or "the slot died", excused=excused)

    def _blame(self, nodes: Sequence[str]) -> bool:
        """A trial failed on these machines; whether that was the fault of one of them."""
        is_theirs = self._machines.failed(nodes)
        if is_theirs:
            self.conductor.forgive()
        return is_theirs

    def _loss(self, trial_id: str) -> tuple[str | None, bool, list[str]]:
        """See `Watch.loss`."""
        try:
            found: tuple[str | None, bool, list[str]] = ray.get(
                self._watch.loss.remote(trial_id), timeout=CAUSE_SECONDS
            )
        except ray.exceptions.RayError:  # it has troubles of its own
            return None, False, []
        return found


class EverySecond(tune.Callback):
    """What the driver does beside handing out trials: hears signals, has the watch look around,
    looks after the machines, the room that dead slots hold, and the stored study."""

    def __init__(
        self,
        conductor: Conductor,
        watch: Any,
        machines: Machines,
        interruption: Interruption,
        limits: Watchdog,
    ) -> None:
        self.conductor, self._watch, self._interruption = conductor, watch, interruption
        self._machines = machines
        self._silence_seconds = limits.silence_seconds
        self._next_at, self._check, self._checked_at = 0.0, None, 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if self._interruption.is_asked and not self.conductor.is_pausing:
            self.conductor.is_pausing = True
            self.conductor.screen.event(
                "stopping: running trials write their states; Ctrl-C again stops at once"
            )
            self._next_at = now
        if now < self._next_at:
            return
        self._next_at = now + 1
        self._machines.look()
        free_what_the_dead_hold()
        self.conductor.settle()
        if self.conductor.pauses:
            self._watch.pause.remote()
        if self._check is None or ray.wait([self._check], timeout=0)[0]:
            self._check, self._checked_at = self._watch.check.remote(), now
        elif now - self._checked_at > self._silence_seconds:
            ray.kill(self._watch, no_restart=False)  # it comes up again
            self._checked_at = now
