"""One worker of data-parallel trials of several tasks, and of trials that are taken up again.

python -m tests.training.task_worker RANK SIZE MODEL DATA OUT; `test_parallel_tasks.py` starts the
workers and compares what they wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_ray.config import Regularization
from sft_ray.training.data import open_dataset
from sft_ray.training.examples import Dataset
from sft_ray.training.model import Pretrained
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import load_resume_state, save_resume_state
from sft_ray.training.tasks import TASKS
from sft_ray.training.trunk_cache import TrunkCache
from sft_ray.training.world import World
from tests.models import PAD, EveryStep, load_tiny, run_fit
from tests.training.parallel_worker import join

SAME = ("token-classification", "question-answering", "multi-label")
L2_SP = Regularization(kind="l2_sp", strength=1e-2)
RESUMED: dict[str, dict[str, Any]] = {
    "adamw": {"regularization": L2_SP},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.05, "frozen_layers": 1, "micro_batch": 2},
    "one step": {"epochs": 1, "batch_size": 32, "rungs": (1, 2, 10)},
    # With a cache of first tokens each worker trains the whole head; dropout falls alike on both.
    "head": {"frozen_layers": "all", "dropout": 0.1, "regularization": L2_SP},
}


def seen(pretrained: Pretrained, reports: list[Progress]) -> dict[str, Any]:
    best = reports[-1].best
    return {
        "facts": [
            {k: v for k, v in r.facts().items() if not k.endswith("seconds")} for r in reports
        ],
        "has_state": [r.resume_state is not None for r in reports],
        "best": best and (best.percent, best.score, best.metrics, best.weights),
        "weights": {n: p.detach().clone() for n, p in pretrained.trainable().items()},
    }


def resume_in_files(
    pretrained: Pretrained,
    dataset: Dataset,
    world: World,
    folder: Path,
    stop_after: int,
    **how: Any,
) -> list[Progress]:
    """Stop after some marks, let rank 0 write the state and all ranks go on from it."""
    settings = {"world": world, "epochs": 2, "batch_size": 8, "learning_rate": 3e-3, **how}
    first = run_fit(pretrained, dataset, stop_after=stop_after, **settings)
    if world.rank == 0:
        folder.mkdir()
        save_resume_state(folder, first[-1].resume_state())
    world.sum(torch.zeros(1))
    run_fit(pretrained, dataset, world=world, epochs=1, seed=5, learning_rate=0.01)
    return run_fit(pretrained, dataset, resume=load_resume_state(folder), **settings)


def broken_off(
    pretrained: Pretrained, dataset: Dataset, world: World, folder: Path, **how: Any
) -> list[Progress]:
    """The last worker is asked to pause in its first batch of the second evaluation."""
    settings = {"world": world, "epochs": 2, "batch_size": 8, "learning_rate": 3e-3, **how}
    marks: list[Progress] = []
    paused: list[Any] = []

    def ask(activity: str) -> bool:
        return world.rank == world.size - 1 and activity == "evaluation" and bool(marks)

    first = run_fit(pretrained, dataset, beat=ask, also=marks.append, paused=paused, **settings)
    if world.rank == 0:
        folder.mkdir()
        save_resume_state(folder, paused[0])
    else:
        assert paused == [None]
    world.sum(torch.zeros(1))
    return first + run_fit(pretrained, dataset, resume=load_resume_state(folder), **settings)


def run_worker(rank: int, size: int, model: Path, data: Path, out: Path) -> None:
    world, found = join(rank, size, out), {}
    for name in SAME:
        task, dataset = TASKS[name], open_dataset(Path((data / name).read_text()))
        pretrained = load_tiny(model, dataset, task=task, double=True)
        for micro_batch in (100, 2):
            reports = run_fit(
                pretrained,
                dataset,
                task=task,
                world=world,
                epochs=2,
                batch_size=8,
                learning_rate=1e-3,
                dropout=0.0,
                micro_batch=micro_batch,
            )
            found[name, micro_batch] = seen(pretrained, reports)
    dataset = open_dataset(Path((data / "text-classification").read_text()))
    pretrained = load_tiny(model, dataset)
    trunk_cache = TrunkCache(pretrained, dataset, world, PAD)
    for name, how in RESUMED.items():
        how = {**how, "trunk_cache": trunk_cache} if name == "head" else how
        settings = {"world": world, "epochs": 2, "batch_size": 8, "learning_rate": 3e-3, **how}
        found[name, "whole"] = seen(pretrained, run_fit(pretrained, dataset, **settings))
        if size > 1:
            rest = resume_in_files(pretrained, dataset, world, out / name, 1, **how)
            found[name, "resumed"] = seen(pretrained, rest)
            last = EveryStep()
            found[name, "saved"] = seen(
                pretrained, run_fit(pretrained, dataset, last=last, **settings)
            )
            found[name, "steps"] = {"of states": [s.facts["step"] for s in last.states]}
            rest = broken_off(pretrained, dataset, world, out / f"{name} broken off", **how)
            found[name, "broken off"] = seen(pretrained, rest)
    torch.save(found, out / f"{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_worker(int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:6]))
