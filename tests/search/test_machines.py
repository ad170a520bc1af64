"""Which machines a running search uses: what is said, and when the slots are counted again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from sft_ray.search.machines import Machines

PER_MACHINE = 2  # slots


class Desk:
    """Three machines that a test can take away, and a watch that writes down what it hears."""

    def __init__(self) -> None:
        self.alive = {"n1": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}
        self.draining: dict[str, int] = {}
        self.said, self.slots, self.avoided, self.lost = list[str](), list[int](), {}, {}
        watch = SimpleNamespace(
            avoid=SimpleNamespace(remote=self.avoided.update),
            lost=SimpleNamespace(remote=self.lost.update),
        )
        self.machines = Machines(
            watch,
            self.said.append,
            self.slots.append,
            lambda: self.alive,
            lambda: self.draining,
            self.count_slots,
            slots=6,
        )

    def count_slots(self, without: Sequence[str]) -> int:
        return PER_MACHINE * len(set(self.alive) - set(without))


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_nothing_is_said_while_nothing_changes(desk: Desk) -> None:
    desk.machines.look()
    assert (desk.said, desk.slots, desk.avoided, desk.lost) == ([], [], {}, {})


def test_slots_grow_and_shrink_with_the_machines(desk: Desk) -> None:
    desk.alive = {**desk.alive, "n4": "10.0.0.4"}
    desk.machines.look()
    desk.alive = {"n1": "10.0.0.1"}
    desk.machines.look()
    desk.alive = {}
    desk.machines.look()
    assert desk.slots == [8, 2, 1]  # one asks on, so that a new machine is heard of
    assert desk.said[0] == "10.0.0.4 joins"
    assert desk.said[1] == "room for 8 slots now, before for 6"
    assert set(desk.lost) == {"n1", "n2", "n3", "n4"}
    assert desk.lost["n2"] == "10.0.0.2 is gone"


def test_a_machine_that_drains_is_left(desk: Desk) -> None:
    desk.draining = {"n2": int(1000 * (time.time() + 90))}
    desk.machines.look()
    desk.machines.look()
    assert desk.avoided == {"n2": "10.0.0.2 is taken away"}
    assert [line for line in desk.said if "taken away" in line][1:] == []
    assert "taken away in 90 s" in desk.said[0] or "taken away in 89 s" in desk.said[0]
    assert desk.slots == [4]


def fail(desk: Desk, node: str, times: int) -> list[bool]:
    return [desk.machines.failed([node]) for _ in range(times)]


def test_a_machine_that_only_fails_is_not_used_again(desk: Desk) -> None:
    desk.machines.succeeded()
    assert fail(desk, "n3", 3) == [False, False, True]
    assert desk.said[0] == "10.0.0.3 failed 3 trials in a row: not used again"
    assert desk.avoided == {"n3": "10.0.0.3 failed too often"}
    assert desk.slots == [4]
    desk.alive = {"n1": "10.0.0.1", "n2": "10.0.0.2"}
    desk.machines.look()
    desk.alive = {**desk.alive, "n9": "10.0.0.3"}  # it has come up again
    desk.machines.look()
    assert desk.avoided["n9"] == "10.0.0.3 failed too often"
    assert desk.slots == [4]


def test_a_success_in_between_clears_a_machine(desk: Desk) -> None:
    desk.machines.succeeded()
    assert fail(desk, "n3", 2) == [False, False]
    assert desk.machines.has_failures
    desk.machines.succeeded(["n3"])
    assert not desk.machines.has_failures
    assert fail(desk, "n3", 2) == [False, False]


def test_where_nothing_works_it_is_not_the_machines(desk: Desk) -> None:
    assert fail(desk, "n3", 3) == [False, False, True]
    assert fail(desk, "n2", 4) == [False] * 4  # nothing has worked since
    desk.machines.succeeded(["n1"])
    assert fail(desk, "n2", 1) == [True]


def test_the_last_machine_stays(desk: Desk) -> None:
    desk.alive = {"n1": "10.0.0.1"}
    desk.machines.look()
    desk.machines.succeeded()
    assert fail(desk, "n1", 4) == [False] * 4
