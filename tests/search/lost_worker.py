"""One worker of a group whose last one dies while they meet; the other notes what it saw.

python -m tests.search.lost_worker RANK SIZE WHEN OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from sft_ray.search.worker import is_lost_peer
from sft_ray.training import shared_sum
from tests.training.parallel_worker import join


def run_worker(rank: int, size: int, when: str, out: Path) -> None:
    if rank == size - 1:
        reach = shared_sum._connect

        def connect(address: str | None) -> Any:
            if when == "connected":
                assert reach(address) is not None
            os._exit(0)

        shared_sum._connect = connect
    try:
        join(rank, size, out)
        saw = "nothing"
    except Exception as error:
        saw = "a lost worker" if is_lost_peer(error) else repr(error)
    (out / f"{rank}.txt").write_text(saw)
    os._exit(0)  # what is left of the group would be waited for


if __name__ == "__main__":
    run_worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
