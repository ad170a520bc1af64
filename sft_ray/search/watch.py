"""Where every process of every slot is and since when: finds what hangs, says it, kills its slot.

A slot and its workers send a pulse each second.  Whoever falls silent, or stays too long at one
thing, has its slot killed: Tune then gives the trial to another one, which goes on from its last
state.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import cloudpickle

from sft_ray.config import Watchdog

SECONDS_PER_PULSE = 1.0
LONGEST_GAP_SECONDS = 10.0  # between two checks; what is beyond it was not the slots' fault
# What a process may be at, beside what `fit` names.
LOADING, STORAGE, MAILBOX = "loading", "storage", "asking the mailbox"
WORKERS, IDLE = "waiting for workers", "between marks"  # of a slot
SLOT = "the slot"


@dataclass
class _Place:
    """Where one process is, and when it said so."""

    activity: str
    count: int
    changed_at: float
    heard_at: float
    node: str = ""


@dataclass
class _SlotSeen:
    handle: bytes
    trial_id: str | None = None
    places: dict[str, _Place] = field(default_factory=dict)  # by who


class Watch:
    """Hears all pulses; lives in an actor of its own.

    Args:
        limits: how long what may take.
        kill: ends a slot, given its pickled handle.
        clock: seconds.
    """

    def __init__(
        self,
        limits: Watchdog,
        kill: Callable[[bytes], None] = lambda handle: ray.kill(cloudpickle.loads(handle)),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._silence = limits.silence_seconds
        self._placement = 60 * limits.placement_minutes
        self._stall = 60 * limits.stall_minutes
        self._longest = {
            LOADING: 60 * limits.loading_minutes,
            MAILBOX: limits.silence_seconds,
            WORKERS: math.inf,
            IDLE: math.inf,
        }
        self._kill, self._clock = kill, clock
        self._slots: dict[str, _SlotSeen] = {}
        self._causes: dict[str, str] = {}  # by trial id
        self._excused: set[str] = set()  # trial ids whose slots ended for no fault of theirs
        self._nodes: dict[str, dict[str, str]] = {}  # of ranks, by trial id
        self._avoided: dict[str, str] = {}  # why, by node id
        self._is_pausing = False
        self._checked_at = clock()

    def enlist(self, slot: str, handle: bytes) -> None:
        """A slot has come up."""
        self._slots[slot] = _SlotSeen(handle)

    def works_on(self, slot: str, trial_id: str) -> None:
        """The trial, by Tune's id, that a slot has in hand."""
        if slot in self._slots:
            self._slots[slot].trial_id = trial_id

    def forget(self, slot: str) -> None:
        """A slot ends by itself."""
        self._slots.pop(slot, None)

    def pulse(self, slot: str, who: str, activity: str, count: int, node: str = "") -> bool | None:
        """Take in where a process is; whether it is to pause, None if its slot is not known.

        Args:
            who: the slot itself, or a rank of its workers.
            count: changes whenever the process gets on.
            node: Ray's id of its machine.
        """
        if slot not in self._slots:
            return None
        now, seen = self._clock(), self._slots[slot]
        place = seen.places.get(who)
        if place is None or (place.activity, place.count) != (activity, count):
            seen.places[who] = _Place(activity, count, now, now, node)
        else:
            place.heard_at = now
        if seen.trial_id is not None and who != SLOT:
            self._nodes.setdefault(seen.trial_id, {})[who] = node
        return self._is_pausing or self._to_leave(seen) is not None

    def pause(self) -> None:
        """Ask every trial to write its state and end."""
        self._is_pausing = True

    def avoid(self, nodes: dict[str, str]) -> None:
        """Have the trials on these machines pause, and no slot use them any more.

        Args:
            nodes: why, by node id.
        """
        self._avoided |= nodes

    def avoided(self) -> list[str]:
        """Ids of the machines that a new slot is not to use."""
        return sorted(self._avoided)

    def leave(self, slot: str) -> str | None:
        """Why a slot whose trial has paused is to end, if it is: its workers cannot stay."""
        seen = self._slots.get(slot)
        reason = None if seen is None else self._to_leave(seen)
        if seen is not None and reason is not None and seen.trial_id is not None:
            self._causes[seen.trial_id] = reason
            self._excused.add(seen.trial_id)
        return reason

    def _to_leave(self, seen: _SlotSeen) -> str | None:
        found = (self._avoided.get(place.node) for who, place in seen.places.items() if who != SLOT)
        return next((reason for reason in found if reason is not None), None)

    def lost(self, nodes: dict[str, str]) -> None:
        """Kill the slots with a worker on machines that are gone: its group waits in vain.

        Args:
            nodes: what to say, by node id.
        """
        for slot, seen in list(self._slots.items()):
            there = [place.node for who, place in seen.places.items() if who != SLOT]
            reason = next((nodes[node] for node in there if node in nodes), None)
            if reason is not None:
                self._end(slot, seen, reason, excused=True)

    def cause(self, trial_id: str) -> str | None:
        """Why the slot under a trial was killed, if it was here."""
        return self._causes.get(trial_id)

    def loss(self, trial_id: str) -> tuple[str | None, bool, list[str]]:
        """Cause, whether neither trial nor slot is to blame, and the machines, by node id."""
        nodes = self._nodes.get(trial_id, {})
        return self.cause(trial_id), trial_id in self._excused, sorted(set(nodes.values()))

    def check(self) -> None:
        """Kill the slots in which something hangs."""
        now = self._clock()
        # When all stood still, the machine slept or the driver was stopped: nobody hangs.
        late = max(0.0, now - self._checked_at - LONGEST_GAP_SECONDS)
        self._checked_at = now
        for slot, seen in list(self._slots.items()):
            for place in seen.places.values():
                place.changed_at += late
                place.heard_at += late
            cause = self._what_hangs(seen, now)
            if cause is not None:
                self._end(slot, seen, cause)
                continue
            cause = self._waits_in_vain(seen, now)
            if cause is not None:  # where others have room, only this one is too many
                others = any(len(s.places) > 1 for s in self._slots.values())
                self._end(slot, seen, cause, excused=others)

    def _end(self, slot: str, seen: _SlotSeen, cause: str, excused: bool = False) -> None:
        if seen.trial_id is not None:
            self._causes[seen.trial_id] = cause
            if excused:
                self._excused.add(seen.trial_id)
        del self._slots[slot]
        self._kill(seen.handle)

    def _what_hangs(self, seen: _SlotSeen, now: float) -> str | None:
        # Who is silent first: the others of its group wait for it.
        for who, place in seen.places.items():
            silent = now - place.heard_at
            if silent > self._silence:
                return f"{who} has not been heard of for {silent:.0f} s, in {place.activity}"
        for who, place in seen.places.items():
            seconds = now - place.changed_at
            if seconds > self._longest.get(place.activity, self._stall):
                return f"{who} has not got on for {seconds:.0f} s, in {place.activity}"
        return None

    def _waits_in_vain(self, seen: _SlotSeen, now: float) -> str | None:
        waiting = seen.places.get(SLOT)
        if waiting is not None and waiting.activity == WORKERS and len(seen.places) == 1:
            seconds = now - waiting.changed_at
            if seconds > self._placement:
                return f"the cluster has had no room for its workers for {seconds:.0f} s"
        return None


def start_watch(limits: Watchdog, resources: dict[str, float]) -> Any:
    """The actor that watches a run; it ends with the driver.

    One that dies comes up again and knows of a slot with its next pulse.
    """
    actor = ray.remote(Watch).options(num_cpus=0, resources=resources, max_restarts=-1)
    return actor.remote(limits)


class Pulse:
    """Tells the watch every second where this process is, from a thread of its own.

    Args:
        handle: of the slot, pickled, from the slot itself.

    Attributes:
        is_to_pause: whether the trial is to write its state and end.
    """

    def __init__(
        self, watch: Any, slot: str, who: str, activity: str, handle: bytes | None = None
    ) -> None:
        self.is_to_pause = False
        self._watch, self._slot, self._who, self._handle = watch, slot, who, handle
        self._place = (activity, 0)
        self._node = ray.get_runtime_context().get_node_id()
        self._ended = threading.Event()
        threading.Thread(target=self._send, daemon=True).start()

    def enter(self, activity: str) -> bool:
        """This process begins with something, or gets on with it; whether it is to pause."""
        self._place = (activity, self._place[1] + 1)
        return self.is_to_pause

    def end(self) -> None:
        """Send no more."""
        self._ended.set()

    def _send(self) -> None:
        while not self._ended.is_set():
            try:
                answer = ray.get(
                    self._watch.pulse.remote(self._slot, self._who, *self._place, self._node)
                )
                if answer is not None:
                    self.is_to_pause = answer
                elif self._handle is not None:
                    self._watch.enlist.remote(self._slot, self._handle)
            except ray.exceptions.ActorUnavailableError:
                pass  # it will be back
            except ray.exceptions.RayError:  # the run is over
                return
            self._ended.wait(SECONDS_PER_PULSE)
