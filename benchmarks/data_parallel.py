"""Two workers with one thread each beside one worker with two threads, for every frozen depth.

Both take the same global batches with our training step; the two workers sum gradients through the
memory that they share, as in a trial.  Layouts take turns, each turn in new processes; seconds are
of the steps alone, behind some warm ones, with the cache of trunks filled.  A ratio of 1 says that
two processes train as fast as one with two threads.

One JSON line per turn goes to --out; turns whose line is there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.rows import once
from benchmarks.throughput import MODEL
from sft_ray.config import Experiment
from sft_ray.search.preflight import prepare_experiment
from sft_ray.training.fitting import Trial
from sft_ray.training.setup import load_setup
from sft_ray.training.world import join_world

SEED, WARM_STEPS = 0, 3
WANTED = {0: 0.75, 2: 0.9}  # at batch 32, from that depth on
DEPTHS = (0, 1, 2, 3, 4, 5, 6)


def worker(rank: int, size: int, options: dict[str, Any], meeting: str, out: str) -> None:
    """Seconds per step for every depth; the first worker writes them."""
    torch.set_num_threads(options["threads"] // size)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    world = join_world(rank, size, torch.device("cpu"))
    setup = load_setup(prepared_experiment(options), Path(options["dataset"]), world)
    found = {}
    for k in options["depths"]:
        train = Experiment.model_validate(tree_of(options)).train.model_copy(
            update={"frozen_layers": k}
        )
        trial = Trial(train, setup, "accuracy", SEED)
        steps = trial.batches_from(0)
        for _ in range(WARM_STEPS):
            trial.take_step(next(steps))
        began = time.perf_counter()
        for _ in range(options["steps"]):
            trial.take_step(next(steps))
        found[k] = (time.perf_counter() - began) / options["steps"]
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    if size > 1:
        dist.destroy_process_group()


def tree_of(options: dict[str, Any]) -> dict[str, Any]:
    data = Path(options["data"])
    return {
        "name": "parallel",
        "model": MODEL,
        "data": {
            **{s: str(data / f"trec-{s}.parquet") for s in ("train", "validation")},
            "max_length": 128,
            "limit": {"train": 1000, "validation": 100},
        },
        "train": {"batch_size": options["batch_size"], "learning_rate": 1e-4, "epochs": 50},
        "resources": {"trunk_cache_gb": 4},
    }


def prepared_experiment(options: dict[str, Any]) -> Experiment:
    return prepare_experiment(Experiment.model_validate(tree_of(options))).experiment


def seconds_per_step(size: int, options: dict[str, Any]) -> dict[int, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        spawn(worker, (size, options, f"{folder}/meeting", str(out)), nprocs=size)  # type: ignore[no-untyped-call]
        found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return {int(k): seconds for k, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of trec-*.parquet")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[32, 16])
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS))
    arguments = parser.parse_args()
    print("| batch | k | two workers, times as fast as one with two threads (wanted) |")
    print("|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFT_RAY_CACHE"] = cache
        for batch_size in arguments.batch_sizes:
            options = {
                "data": str(arguments.data),
                "batch_size": batch_size,
                "steps": arguments.steps,
                "depths": arguments.depths,
                "threads": 2,
            }
            experiment = Experiment.model_validate(tree_of(options))
            options["dataset"] = str(prepare_experiment(experiment).dataset_folder)
            turns = [
                once(
                    arguments.out,
                    {
                        "batch_size": batch_size,
                        "turn": turn,
                        "steps": arguments.steps,
                        "depths": arguments.depths,
                    },
                    partial(one_turn, turn, options),
                )
                for turn in range(arguments.turns)
            ]
            for k in arguments.depths:
                ratio = statistics.median(turn["times_as_fast"][str(k)] for turn in turns)
                wanted = max((d for d in WANTED if d <= k), default=None)
                said = f" ({WANTED[wanted]})" if batch_size == 32 and wanted is not None else ""
                print(f"| {batch_size} | {k} | {ratio:.2f}{said} |", flush=True)


def one_turn(turn: int, options: dict[str, Any]) -> dict[str, Any]:
    """Both layouts, now the one first and now the other; by depth, as JSON names it."""
    seconds = {size: seconds_per_step(size, options) for size in ((1, 2), (2, 1))[turn % 2]}
    ratios = {str(k): seconds[1][k] / seconds[2][k] for k in options["depths"]}
    return {"times_as_fast": ratios, "date": datetime.now(UTC).date().isoformat()}


if __name__ == "__main__":
    main()
