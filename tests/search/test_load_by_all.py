"""Ranks that read the same state, or none: three of them as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sft_ray.search.worker import load_by_all

RANKS = 3


def load_on_all(read: Callable[[int], Any]) -> list[Any]:
    """What every rank gets if each reads `read(rank)`."""
    barrier, values, found = threading.Barrier(RANKS), [0] * RANKS, [object()] * RANKS

    def work(rank: int) -> None:
        def minimum(value: int) -> int:
            values[rank] = value
            barrier.wait(5)
            least = min(values)
            barrier.wait(5)
            return least

        world = SimpleNamespace(rank=rank, minimum=minimum)
        found[rank] = load_by_all(SimpleNamespace(load=lambda: read(rank)), world)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def state(step: int) -> Any:
    return SimpleNamespace(facts={"step": step})


def test_the_first_rank_reads_before_the_others() -> None:
    order: list[int] = []

    def read(rank: int) -> Any:
        order.append(rank)
        return state(7)

    found = load_on_all(read)
    assert order[0] == 0
    assert [one.facts["step"] for one in found] == [7] * RANKS


def test_nobody_goes_on_from_what_another_one_has_not_read() -> None:
    assert load_on_all(lambda rank: None) == [None] * RANKS
    assert load_on_all(lambda rank: None if rank == 1 else state(7)) == [None] * RANKS
    assert load_on_all(lambda rank: state(7 + rank)) == [None] * RANKS
