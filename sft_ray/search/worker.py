"""What a worker of a slot runs: load once, then trial after trial.

Every rank asks the mailbox for itself, so nobody waits inside a collective between trials.
"""

from __future__ import annotations

import gc
import logging
import math
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from sft_ray.config import Experiment, Train
from sft_ray.errors import disk_problem
from sft_ray.run_store import PREDICTIONS, RunStore
from sft_ray.search.layout import MEMORY_SHARE
from sft_ray.search.process_group import join_process_group, leave_process_group
from sft_ray.search.trials import is_to_be_saved
from sft_ray.search.watch import MAILBOX, STORAGE, Pulse
from sft_ray.training.beat import TRAINING
from sft_ray.training.checkpoint import save_model, save_predictions
from sft_ray.training.data import prepare, prepare_here
from sft_ray.training.fitting import fit
from sft_ray.training.last_state import LastState
from sft_ray.training.micro_batch import StepOutOfMemoryError
from sft_ray.training.model_facts import resolve_model
from sft_ray.training.progress import Best, Progress
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.setup import Setup, load_setup
from sft_ray.training.tasks import find_task
from sft_ray.training.world import World, join_world
from sft_ray.uploads import Uploads


@dataclass(frozen=True)
class Loaded:
    """What a worker keeps between trials.

    Attributes:
        objective: the metric that decides which weights are best.
        mailbox: of the slot, an actor.
        pulse: tells the watch what this worker does.
    """

    experiment: Experiment
    setup: Setup
    store: RunStore
    objective: str
    mailbox: Any
    pulse: Pulse


def run_worker(
    settings: dict[str, Any], rank: int, size: int, device: str, pulse: Pulse, gpus: float = 1.0
) -> None:
    """Serve a slot's assignments until the mailbox says to go home.

    Args:
        settings: `experiment` (tree), `run` (storage and name of its folder), `dataset_folder`,
            `objective`, `mailbox` and `watch` (actor handles), `slot` (its name).
        rank: of this worker among the `size` of the slot; above 1 they make a process group.
        device: that it trains on.
        gpus: that it may take; below 1 a share of one.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("ray").setLevel(logging.ERROR)
    mailbox = settings["mailbox"]
    try:
        if device != "cpu" and gpus < 1:  # else a trial takes what its neighbours have found to fit
            torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE * gpus)
        if size > 1:
            join_process_group(rank, size, torch.device(device))
        loaded = load(settings, join_world(rank, size, torch.device(device)), pulse)
    except Exception as error:
        if is_lost_peer(error):
            raise
        ray.get(mailbox.break_down.remote(traceback.format_exc()))
        return  # a raise would have the workers start again
    # What lives for ever need not be looked at by every collection between trials.
    gc.collect()
    gc.freeze()
    gc.enable()
    generation = 0
    while True:
        answer = _poll(pulse, mailbox.next_assignment, rank, generation)
        if answer == "go home":
            leave_process_group()
            return
        generation, assignment = answer
        try:
            run_trial(assignment, generation, loaded)
        except StepOutOfMemoryError as error:
            ray.get(mailbox.out_of_memory.remote(generation, error.micro_batch))
            raise
        except Exception as error:
            # The other ranks sit in a collective: only a restart of the group frees them.
            if problem := disk_problem(error):
                ray.get(mailbox.post_disk_problem.remote(generation, problem))
            elif not is_lost_peer(error):
                reason = f"{type(error).__name__}: {error}"
                ray.get(mailbox.post_failure.remote(generation, reason, traceback.format_exc()))
            raise
        gc.collect()
        if loaded.setup.world.device.type == "cuda":
            torch.cuda.empty_cache()


def load(settings: dict[str, Any], world: World, pulse: Pulse) -> Loaded:
    """Model, data and tokenizer of the experiment; encodes the data if this node lacks it."""
    experiment = Experiment.model_validate(settings["experiment"])
    return Loaded(
        experiment=experiment,
        setup=load_here(experiment, Path(settings["dataset_folder"]), world),
        store=RunStore(*settings["run"]),
        objective=settings["objective"],
        mailbox=settings["mailbox"],
        pulse=pulse,
    )


def load_here(experiment: Experiment, dataset_folder: Path, world: World) -> Setup:
    """What a worker trains with, on this node and on the threads that a worker has.

    Args:
        dataset_folder: of the driver; the data is encoded again if this node lacks it.
    """
    torch.set_num_threads(max(1, math.floor(experiment.resources.fewest_cpus)))

    def encode() -> Path:
        task, model_folder = find_task(experiment.task), resolve_model(experiment.model)
        return prepare(experiment.data, task, model_folder, experiment.revision, experiment.seed)

    folder = prepare_here(dataset_folder, encode)
    others = experiment.search.others_per_depth
    return load_setup(experiment, folder, world, others_per_depth=others)


def run_trial(assignment: dict[str, Any], generation: int, loaded: Loaded) -> None:
    """Run one assignment; what it writes is in its place when this returns."""
    with Uploads(loaded.store) as uploads:
        _run_trial(assignment, generation, loaded, uploads)


def _run_trial(
    assignment: dict[str, Any], generation: int, loaded: Loaded, uploads: Uploads
) -> None:
    """Fit one configuration, posting every mark and asking leave to go on.

    One that is taken up from a state posts the marks before it again, word for word.  One that is
    asked to pause leaves its state behind and says so.
    """
    pulse, mailbox = loaded.pulse, loaded.mailbox
    setup, seed, train = loaded.setup, assignment["seed"], Train.model_validate(assignment["train"])
    dataset = setup.dataset.with_training_share(assignment["training_share"], seed)
    keep = Keeper(assignment, loaded, uploads)

    def facts() -> dict[str, Any]:
        pulse.enter(STORAGE)  # where they go
        return {"messages": posted, "clock": clock.facts()}

    last = LastState(
        loaded.store,
        assignment["folder"],
        loaded.experiment.checkpoint.every_minutes,
        train,
        seed,
        facts,
        uploads,
        may_write=lambda: may_go_on(len(posted)),  # another slot may have the trial by now
    )
    pulse.enter(STORAGE)
    state = None
    if assignment["restarts"] or assignment["resumes"]:
        state = load_by_all(last, setup.world)
    posted: list[dict[str, Any]] = [] if state is None else state.facts["messages"]
    clock = Clock(mailbox, state)

    def post(index: int, message: dict[str, Any]) -> None:
        if setup.world.rank == 0:
            pulse.enter(MAILBOX)
            message = {**message, "seconds_before": clock.before}
            ray.get(mailbox.post.remote(generation, index, message))

    def may_go_on(index: int) -> bool:
        return bool(_poll(pulse, mailbox.may_continue, generation, index))

    def report(progress: Progress) -> bool:
        if setup.world.rank == 0:
            pulse.enter(STORAGE)
            keep.consider(progress)
            posted.append(progress.message(keep.saved_percent, assignment["restarts"]))
        post(progress.index, posted[-1] if posted else {})
        goes_on = may_go_on(progress.index + 1)
        # Behind the post, so that a resumed trial never owes a mark; and only of a trial that goes
        # on, so that none is left of one that has ended.
        if goes_on and setup.world.rank == 0:
            last.consider(progress)
        return goes_on

    goes_on = may_go_on(0)
    for index, message in enumerate(list(posted)):
        if goes_on:
            post(index, {**message, "replayed": True})
            goes_on = may_go_on(index + 1)
    paused: ResumeState | None = None
    if goes_on:
        pulse.enter(TRAINING)
        paused = fit(
            train,
            setup.on(dataset),
            objective=loaded.objective,
            rungs=loaded.experiment.search.rungs,
            seed=seed,
            report=report,
            beat=pulse.enter,
            last=last,
            resume=state,
            halvings=assignment["halvings"],
            most_examples=assignment["most_examples"],
            end_diverged=assignment["end_diverged"],
            trunks_read=assignment["trunks_read"],
        )
    if paused is not None:
        pulse.enter(STORAGE)
        last.write(paused)
        uploads.join()
        seconds = {f"{name}_seconds": s for name, s in paused.facts["seconds"].items()}
        post(len(posted), {"paused": True, **seconds})


def load_by_all(last: LastState, world: World) -> ResumeState | None:
    """The state that every rank has read; None if not all of them have read the same.

    The first reads before the others: it finishes what a kill has left half-way.
    """
    state = last.load() if world.rank == 0 else None
    world.minimum(0)
    if world.rank > 0:
        state = last.load()
    step = -1 if state is None else int(state.facts["step"])
    is_same = world.minimum(step) == -world.minimum(-step)
    return state if is_same else None


class Clock:
    """What a trial has taken: in this slot, which has a clock of its own, and in others before.

    Args:
        mailbox: of the slot.
        state: that the trial is taken up from, if it is.
    """

    def __init__(self, mailbox: Any, state: ResumeState | None) -> None:
        self._slot = mailbox._actor_id.hex()
        self.before, self._began = 0.0, time.monotonic()
        if state is not None:
            earlier = state.facts["clock"]
            self.before = earlier["before"]
            if earlier["slot"] == self._slot:  # only its workers are new
                self._began -= earlier["here"]
            else:
                self.before += earlier["here"]

    def facts(self) -> dict[str, Any]:
        """For the next state."""
        here = time.monotonic() - self._began
        return {"slot": self._slot, "before": self.before, "here": here}


class Keeper:
    """Writes a trial's best weights to the run folder when they may be wanted.

    That is at its end if it beats the trials kept so far, and at every improvement while no trial
    of the search has finished.
    """

    def __init__(self, assignment: dict[str, Any], loaded: Loaded, uploads: Uploads) -> None:
        self.saved_percent: int | None = None  # of what is in its place
        self._begun_percent: int | None = None  # of what is on its way there
        self._uploads = uploads
        self._assignment, self._loaded = assignment, loaded
        self._sign = loaded.setup.task.sign(loaded.objective)

    def consider(self, progress: Progress) -> None:
        best = progress.best
        if best is not None and best.percent != self._begun_percent:
            self._write(best, progress.finished)
        # Any mark may end the trial.  What it has left must be known with its last message, and its
        # state must not arrive in storage when the driver has removed it.
        self._uploads.join()

    def _write(self, best: Best, finished: bool) -> None:
        if is_to_be_saved(self._assignment, self._sign * best.score, finished=finished):
            target = f"{self._assignment['folder']}/best"
            with self._uploads.replacing_folder(target, lambda: self._saved(best)) as folder:
                data, precision = (
                    self._loaded.experiment.data,
                    self._assignment["train"]["precision"],
                )
                save_model(folder, self._loaded.setup, best.weights, data, precision)
                save_predictions(folder / PREDICTIONS, self._loaded.setup, best.outputs)
            self._begun_percent = best.percent

    def _saved(self, best: Best) -> None:
        self.saved_percent = best.percent


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: the group's fault, not ours."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "NCCL"))


def _poll(pulse: Pulse, method: Any, *arguments: object) -> Any:
    """Ask the mailbox until there is an answer; None means not yet."""
    while True:
        pulse.enter(MAILBOX)
        answer = ray.get(method.remote(*arguments))
        if answer is not None:
            return answer
