"""What a Ray Train worker runs: load once, then trial after trial.

Every rank asks the mailbox for itself, so nobody waits inside a collective between trials.
"""

from __future__ import annotations

import gc
import logging
import math
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from sft_ray.config import Experiment, Train
from sft_ray.run_store import PREDICTIONS, RunStore
from sft_ray.training.checkpoint import save_model, save_predictions
from sft_ray.training.data import prepare, prepare_here
from sft_ray.training.fit import Progress, fit
from sft_ray.training.last_state import LastState
from sft_ray.training.micro_batch import StepOutOfMemoryError
from sft_ray.training.model import resolve_model
from sft_ray.training.setup import Setup, load_setup
from sft_ray.training.tasks import find_task
from sft_ray.training.world import World


@dataclass(frozen=True)
class Loaded:
    """What a worker keeps between trials."""

    experiment: Experiment
    setup: Setup
    store: RunStore


def run_worker(settings: dict[str, Any]) -> None:
    """The train function of a slot: serve assignments until the mailbox says to go home.

    Settings: `experiment` (tree), `dataset_folder`, `objective`, `mailbox` (actor handle).
    """
    warnings.simplefilter("ignore")
    logging.getLogger("ray").setLevel(logging.ERROR)
    mailbox = settings["mailbox"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    ray.get(mailbox.register.remote(rank))
    try:
        loaded = load(settings, rank, context.get_world_size())
    except Exception:
        ray.get(mailbox.break_down.remote(traceback.format_exc()))
        return  # a raise would have Train start the group again
    # What lives for ever need not be looked at by every collection between trials.
    gc.collect()
    gc.freeze()
    generation = 0
    while True:
        answer = _poll(mailbox.next_assignment, rank, generation)
        if answer == "go home":
            return
        generation, assignment = answer
        try:
            run_trial(assignment, generation, loaded, settings["objective"], mailbox)
        except StepOutOfMemoryError as error:
            ray.get(mailbox.out_of_memory.remote(generation, error.micro_batch))
            raise
        except Exception as error:
            # The other ranks sit in a collective: only a restart of the group frees them.
            if not is_lost_peer(error):
                reason = f"{type(error).__name__}: {error}"
                ray.get(mailbox.post_failure.remote(generation, reason, traceback.format_exc()))
            raise
        gc.collect()
        if loaded.setup.world.device.type == "cuda":
            torch.cuda.empty_cache()


def load(settings: dict[str, Any], rank: int, size: int) -> Loaded:
    """Model, data and tokenizer of the experiment; encodes the data if this node lacks it."""
    experiment = Experiment.model_validate(settings["experiment"])
    torch.set_num_threads(max(1, math.floor(experiment.resources.cpus_per_worker)))
    world = World(rank, size, ray.train.torch.get_device())

    def encode() -> Path:
        task, model_folder = find_task(experiment.task), resolve_model(experiment.model)
        return prepare(experiment.data, task, model_folder, experiment.revision, experiment.seed)

    dataset_folder = prepare_here(Path(settings["dataset_folder"]), encode)
    return Loaded(
        experiment=experiment,
        setup=load_setup(experiment, dataset_folder, world),
        store=RunStore(experiment.storage, experiment.name),
    )


def run_trial(
    assignment: dict[str, Any], generation: int, loaded: Loaded, objective: str, mailbox: Any
) -> None:
    """Fit one configuration, posting every mark and asking leave to go on."""
    setup, seed = loaded.setup, assignment["seed"]
    dataset = setup.dataset.with_training_share(assignment["training_share"], seed)
    keep = Keeper(assignment, loaded, setup.task.sign(objective))
    last = LastState(loaded.store, assignment["folder"], loaded.experiment.checkpoint.every_minutes)

    def report(progress: Progress) -> bool:
        if setup.world.rank == 0:
            keep.consider(progress)
            message = progress.message(keep.saved_percent, assignment["restarts"])
            ray.get(mailbox.post.remote(generation, progress.index, message))
            last.consider(progress)  # after the post, so that a resumed trial never owes a mark
        return bool(_poll(mailbox.may_continue, generation, progress.index + 1))

    if _poll(mailbox.may_continue, generation, 0):
        fit(
            Train.model_validate(assignment["train"]),
            replace(setup, dataset=dataset),
            objective=objective,
            rungs=loaded.experiment.search.rungs,
            seed=seed,
            report=report,
            # Of these workers before they were restarted; what another driver left is not ours.
            resume=last.load() if assignment["restarts"] else None,
            most_per_pass=assignment["most_per_pass"],
            end_diverged=assignment["end_diverged"],
        )
    if setup.world.rank == 0:
        last.delete()


class Keeper:
    """Writes a trial's best weights to the run folder when they may be wanted.

    That is at its end if it beats the trials kept so far, and at every improvement while no trial
    of the search has finished.
    """

    def __init__(self, assignment: dict[str, Any], loaded: Loaded, sign: int) -> None:
        self.saved_percent: int | None = None
        self._assignment, self._loaded, self._sign = assignment, loaded, sign

    def consider(self, progress: Progress) -> None:
        best = progress.best
        if best is None or best.percent == self.saved_percent:
            return
        least = self._assignment["save_above"]
        beats = least is None or self._sign * best.score > least
        wanted = progress.finished and self._assignment["save_finished"] and beats
        if wanted or self._assignment["save_unfinished"]:
            target = f"{self._assignment['folder']}/best"
            with self._loaded.store.replacing_folder(target) as folder:
                data, precision = (
                    self._loaded.experiment.data,
                    self._assignment["train"]["precision"],
                )
                save_model(folder, self._loaded.setup, best.weights, data, precision)
                save_predictions(folder / PREDICTIONS, self._loaded.setup, best.outputs)
            self.saved_percent = best.percent


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: the group's fault, not ours."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "NCCL"))


def _poll(method: Any, *arguments: object) -> Any:
    """Ask the mailbox until there is an answer; None means not yet."""
    while True:
        answer = ray.get(method.remote(*arguments))
        if answer is not None:
            return answer
