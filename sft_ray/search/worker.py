"""What a Ray Train worker runs: load once, then trial after trial.

Every rank asks the mailbox for itself, so nobody waits inside a collective between trials.
"""

from __future__ import annotations

import gc
import logging
import math
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from sft_ray.config import Experiment, Train
from sft_ray.run_store import RunStore, trial_folder
from sft_ray.training.checkpoint import save_model
from sft_ray.training.data import Dataset, load_tokenizer, open_dataset, prepare
from sft_ray.training.fit import Progress, fit
from sft_ray.training.model import Pretrained, load_pretrained, resolve_model
from sft_ray.training.tasks import TASKS
from sft_ray.training.world import World


@dataclass(frozen=True)
class Loaded:
    """What a worker keeps between trials."""

    experiment: Experiment
    world: World
    dataset: Dataset
    pretrained: Pretrained
    tokenizer: Any
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
        except Exception as error:
            # The other ranks sit in a collective: only a restart of the group frees them.
            if not is_lost_peer(error):
                reason = f"{type(error).__name__}: {error}"
                ray.get(mailbox.post_failure.remote(generation, reason, traceback.format_exc()))
            raise
        gc.collect()
        if loaded.world.device.type == "cuda":
            torch.cuda.empty_cache()


def load(settings: dict[str, Any], rank: int, size: int) -> Loaded:
    """Model, data and tokenizer of the experiment; encodes the data if this node lacks it."""
    experiment = Experiment.model_validate(settings["experiment"])
    torch.set_num_threads(max(1, math.floor(experiment.resources.cpus_per_worker)))
    device = ray.train.torch.get_device()
    folder = Path(settings["dataset_folder"])
    model_folder = resolve_model(experiment.model)
    if not folder.exists():
        folder = prepare(experiment.data, model_folder, experiment.revision, experiment.seed)
    dataset = open_dataset(folder)
    pretrained = load_pretrained(
        model_folder,
        TASKS[experiment.task],
        dataset.label_names,
        seed=experiment.seed,
        device=device,
        used_tokens=dataset.used_tokens,
        revision=experiment.revision,
    )
    return Loaded(
        experiment=experiment,
        world=World(rank, size, device),
        dataset=dataset,
        pretrained=pretrained,
        tokenizer=load_tokenizer(model_folder, experiment.revision),
        store=RunStore(experiment.storage, experiment.name),
    )


def run_trial(
    assignment: dict[str, Any], generation: int, loaded: Loaded, objective: str, mailbox: Any
) -> None:
    """Fit one configuration, posting every mark and asking leave to go on."""
    task = TASKS[loaded.experiment.task]
    keep = Keeper(assignment, loaded, task.sign(objective))

    def report(progress: Progress) -> bool:
        if loaded.world.rank == 0:
            keep.consider(progress)
            message = _as_message(progress, keep.saved_percent, assignment["restarts"])
            ray.get(mailbox.post.remote(generation, progress.index, message))
        return bool(_poll(mailbox.may_continue, generation, progress.index + 1))

    if _poll(mailbox.may_continue, generation, 0):
        fit(
            Train.model_validate(assignment["train"]),
            pretrained=loaded.pretrained,
            dataset=loaded.dataset,
            task=task,
            objective=objective,
            rungs=loaded.experiment.search.rungs,
            pad_token=loaded.tokenizer.pad_token_id,
            seed=loaded.experiment.seed,
            world=loaded.world,
            report=report,
        )


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
        threshold = self._assignment["save_above"]
        beats = threshold is None or self._sign * best.score > self._sign * threshold
        if self._assignment["save_unfinished"] or (progress.finished and beats):
            target = f"{trial_folder(self._assignment['number'])}/best"
            with self._loaded.store.replacing_folder(target) as folder:
                save_model(folder, self._loaded.pretrained, best.weights, self._loaded.tokenizer)
            self.saved_percent = best.percent


def _as_message(progress: Progress, saved_percent: int | None, restarts: int) -> dict[str, Any]:
    # After a fault the last loss and penalty need not be finite, which JSON cannot say.
    fields = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in vars(progress).items()
        if name != "best"
    }
    best = progress.best
    return {
        **fields,
        "finished": progress.finished,
        "score": None if best is None else best.score,
        "score_percent": None if best is None else best.percent,
        "best_metrics": {} if best is None else best.metrics,
        "has_checkpoint": best is not None and best.percent == saved_percent,
        "restarts": restarts,
    }


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
