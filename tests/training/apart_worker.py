"""One worker of a group whose last one cannot reach the first one's memory, as on another machine.

python -m tests.training.apart_worker RANK SIZE OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sft_ray.training import shared_sum
from tests.training.parallel_worker import join


def run_worker(rank: int, size: int, out: Path) -> None:
    if rank == size - 1:
        reach = shared_sum._connect
        shared_sum._connect = lambda address: reach(f"{address}-elsewhere")
    world = join(rank, size, out)
    found = {
        "shares": world.shared is not None,
        "averaged_over": world.averaged_over,
        "sum": world.sum(torch.ones(1)).item(),
    }
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
