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


@dataclass
class _SlotSeen:
    handle: Any
    trial_id: str | None = None
    places: dict[str, _Place] = field(default_factory=dict)  # by who


class Watch:
    """Hears all pulses; lives in an actor of its own.

    Args:
        limits: how long what may take.
        kill: ends a slot, given its handle.
        clock: seconds.
    """

    def __init__(
        self,
        limits: Watchdog,
        kill: Callable[[Any], None] = ray.kill,
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
        self._is_pausing = False
        self._checked_at = clock()

    def enlist(self, slot: str, handle: Any) -> None:
        """A slot has come up."""
        self._slots[slot] = _SlotSeen(handle)

    def works_on(self, slot: str, trial_id: str) -> None:
        """The trial, by Tune's id, that a slot has in hand."""
        if slot in self._slots:
            self._slots[slot].trial_id = trial_id

    def forget(self, slot: str) -> None:
        """A slot ends by itself."""
        self._slots.pop(slot, None)

    def pulse(self, slot: str, who: str, activity: str, count: int) -> bool | None:
        """Take in where a process is; whether it is to pause, None if its slot is not known.

        Args:
            who: the slot itself, or a rank of its workers.
            count: changes whenever the process gets on.
        """
        if slot not in self._slots:
            return None
        now, places = self._clock(), self._slots[slot].places
        place = places.get(who)
        if place is None or (place.activity, place.count) != (activity, count):
            places[who] = _Place(activity, count, now, now)
        else:
            place.heard_at = now
        return self._is_pausing

    def pause(self) -> None:
        """Ask every trial to write its state and end."""
        self._is_pausing = True

    def cause(self, trial_id: str) -> str | None:
        """Why the slot under a trial was killed, if it was here."""
        return self._causes.get(trial_id)

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
                if seen.trial_id is not None:
                    self._causes[seen.trial_id] = cause
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
        handle: of the slot, from the slot itself.

    Attributes:
        is_to_pause: whether the trial is to write its state and end.
    """

    def __init__(self, watch: Any, slot: str, who: str, activity: str, handle: Any = None) -> None:
        self.is_to_pause = False
        self._watch, self._slot, self._who, self._handle = watch, slot, who, handle
        self._place = (activity, 0)
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
                answer = ray.get(self._watch.pulse.remote(self._slot, self._who, *self._place))
                if answer is not None:
                    self.is_to_pause = answer
                elif self._handle is not None:
                    self._watch.enlist.remote(self._slot, self._handle)
            except ray.exceptions.ActorUnavailableError:
                pass  # it will be back
            except ray.exceptions.RayError:  # the run is over
                return
            self._ended.wait(SECONDS_PER_PULSE)
