"""The watch finds what hangs, says who and where, and leaves everybody else alone."""

from __future__ import annotations

from typing import Any

import pytest

from sft_ray.config import Watchdog
from sft_ray.search.watch import IDLE, LOADING, MAILBOX, SLOT, STORAGE, WORKERS, Watch

LIMITS = Watchdog(silence_seconds=60, stall_minutes=10, loading_minutes=20, placement_minutes=30)


class Bench:
    """A watch on a clock of its own, over slots that beat every second unless told otherwise."""

    def __init__(self) -> None:
        self.now, self.killed = 0.0, []
        self.watch = Watch(LIMITS, self.killed.append, lambda: self.now)
        self.places: dict[tuple[str, str], tuple[str, int]] = {}

    def add(self, slot: str, trial: str, *ranks: str) -> None:
        self.watch.enlist(slot, f"handle of {slot}")
        self.watch.works_on(slot, trial)
        self.places |= {(slot, who): (IDLE, 0) for who in (SLOT, *ranks)}

    def run(self, seconds: int, silent: tuple[Any, ...] = (), moving: tuple[Any, ...] = ()) -> None:
        for _ in range(seconds):
            self.now += 1
            for key, (activity, number) in self.places.items():
                number += key in moving
                self.places[key] = (activity, number)
                if key not in silent:
                    self.watch.pulse(*key, activity, number)
            self.watch.check()


@pytest.fixture
def bench() -> Bench:
    found = Bench()
    found.add("a", "trial a", "rank 0", "rank 1")
    found.add("b", "trial b", "rank 0", "rank 1")
    return found


def test_nobody_hangs_who_gets_on_or_waits_for_work(bench: Bench) -> None:
    bench.places["a", "rank 0"] = bench.places["a", "rank 1"] = ("training", 0)
    bench.run(5000, moving=(("a", "rank 0"), ("a", "rank 1")))
    assert bench.killed == []


def test_a_stopped_process_is_named_before_those_that_wait_for_it(bench: Bench) -> None:
    bench.places["a", "rank 0"] = bench.places["a", "rank 1"] = ("training", 7)
    bench.run(10)
    bench.run(59, silent=(("a", "rank 1"),))
    assert bench.killed == []
    bench.run(3, silent=(("a", "rank 1"),))
    assert bench.killed == ["handle of a"]
    cause = bench.watch.cause("trial a")
    assert cause is not None
    assert cause.startswith("rank 1 has not been heard of for 61 s, in training")
    assert bench.watch.cause("trial b") is None


@pytest.mark.parametrize(
    ("who", "activity", "seconds"),
    [
        ("rank 0", "training", 600),  # a collective that never ends
        ("rank 1", "evaluation", 600),
        ("rank 0", STORAGE, 600),
        ("rank 0", MAILBOX, 60),
        (SLOT, MAILBOX, 60),
        ("rank 1", LOADING, 1200),
    ],
)
def test_what_takes_too_long_is_found_at_its_limit(
    bench: Bench, who: str, activity: str, seconds: int
) -> None:
    bench.places["b", who] = (activity, 3)
    bench.run(seconds)
    assert bench.killed == []
    bench.run(3)
    assert bench.killed == ["handle of b"]
    assert f"{who} has not got on for" in str(bench.watch.cause("trial b"))
    assert f"in {activity}" in str(bench.watch.cause("trial b"))
    bench.run(100)
    assert bench.killed == ["handle of b"]  # once


def test_workers_that_are_never_placed_are_found(bench: Bench) -> None:
    bench.watch.enlist("c", "handle of c")
    bench.watch.works_on("c", "trial c")
    bench.places["c", SLOT] = (WORKERS, 0)
    bench.run(1800)
    assert bench.killed == []
    bench.run(3)
    assert bench.killed == ["handle of c"]
    assert "no room for its workers" in str(bench.watch.cause("trial c"))


def test_a_slot_whose_workers_load_is_not_one_without_workers(bench: Bench) -> None:
    bench.places["a", SLOT] = (WORKERS, 0)
    bench.places["a", "rank 0"] = (LOADING, 0)
    bench.run(1100)
    assert bench.killed == []


def test_a_machine_that_slept_kills_nobody(bench: Bench) -> None:
    bench.places["a", "rank 0"] = ("training", 1)
    bench.run(300)
    bench.now += 100_000
    bench.watch.check()
    bench.run(200)
    assert bench.killed == []
    bench.run(150)  # what was missing to the limit before
    assert bench.killed == ["handle of a"]


def test_a_slot_that_has_ended_is_not_missed(bench: Bench) -> None:
    bench.watch.forget("a")
    for who in (SLOT, "rank 0", "rank 1"):
        bench.watch.pulse("a", who, "training", 1)
    bench.run(1000, silent=(("a", SLOT), ("a", "rank 0"), ("a", "rank 1")))
    assert bench.killed == []


def test_a_worker_that_comes_up_again_begins_anew(bench: Bench) -> None:
    bench.places["a", "rank 0"] = (LOADING, 0)
    bench.run(1150)
    bench.places["a", "rank 0"] = ("training", 1)
    bench.run(100)
    bench.places["a", "rank 0"] = (LOADING, 0)  # its process died
    bench.run(1150)
    assert bench.killed == []


def test_a_pause_is_heard_with_the_next_pulse(bench: Bench) -> None:
    assert bench.watch.pulse("a", "rank 0", "training", 1) is False
    bench.watch.pause()
    assert bench.watch.pulse("a", "rank 0", "training", 2) is True


def test_a_slot_that_the_watch_does_not_know_hears_so(bench: Bench) -> None:
    assert bench.watch.pulse("unknown", SLOT, WORKERS, 0) is None
    bench.watch.enlist("unknown", "handle")
    assert bench.watch.pulse("unknown", SLOT, WORKERS, 0) is False


def test_trials_on_a_machine_that_is_to_be_left_pause_and_their_slots_end(bench: Bench) -> None:
    watch = bench.watch
    for slot, nodes in (("a", ("n1", "n2")), ("b", ("n2", "n2"))):
        for rank, node in enumerate(nodes):
            assert watch.pulse(slot, f"rank {rank}", "training", 1, node) is False
    assert watch.avoided() == []
    watch.avoid({"n1": "10.0.0.1 is taken away"})
    assert watch.avoided() == ["n1"]
    assert watch.pulse("a", "rank 1", "training", 2, "n2") is True  # its peer is on n1
    assert watch.pulse("b", "rank 1", "training", 2, "n2") is False
    assert watch.leave("b") is None
    assert watch.leave("a") == "10.0.0.1 is taken away"
    assert watch.loss("trial a") == ("10.0.0.1 is taken away", True, ["n1", "n2"])
    assert watch.loss("trial b") == (None, False, ["n2"])
    assert bench.killed == []


def test_slots_with_a_worker_on_a_machine_that_is_gone_end_at_once(bench: Bench) -> None:
    bench.watch.pulse("a", "rank 0", "training", 1, "n1")
    bench.watch.pulse("b", "rank 0", "training", 1, "n2")
    bench.watch.lost({"n1": "10.0.0.1 is gone", "n3": "10.0.0.3 is gone"})
    assert bench.killed == ["handle of a"]
    assert bench.watch.loss("trial a") == ("10.0.0.1 is gone", True, ["n1"])


def test_one_slot_too_many_is_not_to_blame_where_others_work(bench: Bench) -> None:
    bench.watch.enlist("c", "handle of c")
    bench.watch.works_on("c", "trial c")
    bench.places["c", SLOT] = (WORKERS, 0)
    bench.run(1803)
    assert bench.killed == ["handle of c"]
    assert bench.watch.loss("trial c")[1] is True
