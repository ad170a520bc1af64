"""One worker of a data-parallel `fit`: python -m tests.training.parallel_worker RANK SIZE ...

Writes what it saw as a file of its own; `test_data_parallel.py` starts the workers and compares.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_ray.config import Regularization
from sft_ray.training.data import open_dataset
from sft_ray.training.examples import Dataset
from sft_ray.training.forward import evaluate
from sft_ray.training.model import Pretrained
from sft_ray.training.world import World, join_world
from tests.models import PAD, TASK, load_tiny, run_fit

ROOT = Path(__file__).parents[2]
# Every trial of a slot runs on the same model object, the last one as the first.
TRIALS = {"frozen": 1, "whole": 0, "head": "all", "whole again": 0}
WAYS = ("memory", "sockets")  # that gradients of several workers are summed


def run_trial(pretrained: Pretrained, dataset: Dataset, world: World, k: Any) -> dict[str, Any]:
    reports = run_fit(
        pretrained,
        dataset,
        world=world,
        frozen_layers=k,
        epochs=2,
        batch_size=16,
        learning_rate=1e-3,
        max_grad_norm=0.1,
        regularization=Regularization(kind="l2", strength=1e-2),
    )
    return {
        "marks": [(r.index, r.percent, r.step, r.num_steps, r.examples_seen) for r in reports],
        "train_loss": [r.train_loss for r in reports],
        "penalty": [r.penalty for r in reports],
        "metrics": [r.metrics for r in reports],
        "best": reports[-1].best and reports[-1].best.score,
        "weights": {n: p.detach().clone() for n, p in pretrained.trainable().items()},
        "logits": torch.from_numpy(
            evaluate(pretrained.model, TASK, dataset.validation, PAD, world)
        ),
    }


def join(rank: int, size: int, out: Path) -> World:
    """Meet the other workers, if there are any, through a file in `out`."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{out / 'store'}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=40),
        )
    return join_world(rank, size, torch.device("cpu"))


def run_group(module: str, size: int, arguments: list[Path], out: Path) -> None:
    """Start `size` workers that may not outlive this call: python -m MODULE RANK SIZE ... OUT."""
    workers = []
    for rank in range(size):
        told = [str(rank), str(size), *map(str, arguments), str(out)]
        log = (out / f"{rank}.log").open("w")
        command = [sys.executable, "-m", module, *told]
        workers.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
        log.close()
    try:
        codes = [worker.wait(timeout=250) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    logs = "\n".join((out / f"{rank}.log").read_text()[-2000:] for rank in range(size))
    assert codes == [0] * size, logs
    assert "Warning" not in logs, logs


def wait_for_the_last(world: World) -> None:
    """The last worker comes late, twice; the others wait, and say that they do."""
    for _ in range(2):
        beats: list[None] = []
        if world.rank == world.size - 1:
            time.sleep(0.3)
        world.wait_for_all(lambda beats=beats: beats.append(None))
        assert bool(beats) == (world.rank < world.size - 1)


def run_worker(rank: int, size: int, model: Path, data: Path, out: Path) -> None:
    joined = join(rank, size, out)
    assert (joined.shared is not None) == (size > 1)
    wait_for_the_last(joined)
    worlds = {"memory": joined, "sockets": replace(joined, shared=None)}
    dataset = open_dataset(data)
    for way in WAYS if size > 1 else WAYS[:1]:
        seen = {}
        for precision in ("fp32", "float64"):
            pretrained = load_tiny(model, dataset, double=precision == "float64")
            for trial, k in TRIALS.items():
                seen[precision, trial] = run_trial(pretrained, dataset, worlds[way], k)
        torch.save(seen, out / f"{rank}-{way}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_worker(int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:6]))
