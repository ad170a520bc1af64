"""The machines under a running search: who joins, is taken away, is gone, or only fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft_ray.screen import count

MAX_FAILURES_IN_A_ROW = 3  # of trials on one machine
RECOUNT_SECONDS = 10.0


class Machines:
    """What the driver knows of them, and tells the watch and the user.

    Args:
        watch: actor that has trials leave machines.
        say: shows a line.
        set_slots: takes how many slots there is room for by now.
        alive: names of the machines that are there, by node id.
        draining: when those that are to go will be gone, in milliseconds since 1970, by node id;
            0 where nobody has said.
        count_slots: that fit, without the machines of these ids.
        slots: that the search begins with.
    """

    def __init__(
        self,
        watch: Any,
        say: Callable[[str], None],
        set_slots: Callable[[int], None],
        alive: Callable[[], Mapping[str, str]],
        draining: Callable[[], Mapping[str, int]],
        count_slots: Callable[[Sequence[str]], int],
        slots: int,
    ) -> None:
        self._watch, self._say, self._set_slots = watch, say, set_slots
        self._alive, self._draining, self._count_slots = alive, draining, count_slots
        self._names = dict(alive())
        self._avoided: dict[str, str] = {}  # why, by node id
        self._banned: set[str] = set()  # by name: a machine may come back under another id
        self._failures: dict[str, int] = {}  # in a row, by node id
        self._may_ban = True
        self._slots, self._counted_at = slots, -RECOUNT_SECONDS

    @property
    def has_failures(self) -> bool:
        """Whether a success on some machine would be news."""
        return bool(self._failures)

    def look(self) -> None:
        """Take in what has changed since the last time."""
        now = dict(self._alive())
        joined = {node: name for node, name in now.items() if node not in self._names}
        gone = {node: name for node, name in self._names.items() if node not in now}
        self._names = now
        for node, name in joined.items():
            self._say(f"{name} joins")
            if name in self._banned:
                self._avoided[node] = f"{name} failed too often"
        if gone:
            for node, name in gone.items():
                self._say(f"{name} is gone")
                self._avoided.pop(node, None)
                self._failures.pop(node, None)
            self._watch.lost.remote({node: f"{name} is gone" for node, name in gone.items()})
        leaving = False
        for node, until_ms in self._draining().items():
            if node in now and node not in self._avoided:
                left = f" in {until_ms / 1000 - time.time():.0f} s" if until_ms else ""
                self._say(f"{now[node]} is taken away{left}: its trials write their states")
                self._avoided[node] = f"{now[node]} is taken away"
                leaving = True
        if self._avoided:
            self._watch.avoid.remote(self._avoided)  # again: it may have come up anew
        is_due = time.monotonic() - self._counted_at >= RECOUNT_SECONDS
        if joined or gone or leaving or is_due:
            self._recount()

    def failed(self, nodes: Sequence[str]) -> bool:
        """A trial failed on these machines; whether one of them is not used any more, for that.

        After one machine, another follows only when something has worked in between: else it is
        not the machines.  The last one stays.
        """
        for node in nodes:
            self._failures[node] = self._failures.get(node, 0) + 1
        often = [n for n in nodes if self._failures[n] >= MAX_FAILURES_IN_A_ROW]
        if not often or not self._may_ban or not self._count_slots([*often, *self._avoided]):
            return False
        for node in often:
            name = self._names.get(node, node)
            self._say(f"{name} failed {MAX_FAILURES_IN_A_ROW} trials in a row: not used again")
            self._banned.add(name)
            self._avoided[node] = f"{name} failed too often"
            del self._failures[node]
        self._may_ban = False
        self._watch.avoid.remote(self._avoided)
        self._recount()
        return True

    def succeeded(self, nodes: Sequence[str] = ()) -> None:
        """A trial got to a mark, on these machines if that was asked for."""
        self._may_ban = True
        for node in nodes:
            self._failures.pop(node, None)

    def _recount(self) -> None:
        self._counted_at = time.monotonic()
        slots = max(1, self._count_slots(list(self._avoided)))
        if slots != self._slots:
            self._say(f"room for {count(slots, 'slot')} now, before for {self._slots}")
            self._slots = slots
            self._set_slots(slots)
