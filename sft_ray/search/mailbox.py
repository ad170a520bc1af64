"""What a slot and its workers say to each other.

The slot hands out an assignment and, mark by mark, the permission to go on; the workers post what
they found at each mark.  All waits are long polls, so a dead peer never leaves anybody hanging.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

POLL_SECONDS = 5.0
MAX_RESTARTS_PER_TRIAL = 2
MAX_STARTS_IN_A_ROW = 6


class Mailbox:
    """State of one slot: the current assignment, how far it may go, what it has reported.

    An assignment has a generation number; whatever carries an old one is stale and ignored.
    After its workers were restarted the assignment is handed out again from its start: marks that
    were already posted are not posted twice, permissions already given still hold.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._changed = asyncio.Condition()
        self._generation = 0
        self._assignment: dict[str, Any] | None = None
        self._permitted = 0
        self._messages: list[dict[str, Any]] = []
        self._restarts = 0
        self._halvings = 0  # of the micro-batch, after a kill that left no word of its size
        self._most: int | None = None  # examples of a micro-batch, after one that did not fit
        self._begun = False  # rank 0 has taken the assignment up
        self._starts_in_a_row = 0
        self._ready: set[int] = set()
        self._came_up_at = time.monotonic()  # the last worker
        self._broken: str | None = None
        self._closed = False

    # -- the slot's side ---------------------------------------------------------------------

    async def assign(self, assignment: dict[str, Any]) -> None:
        """Replace the assignment; workers still on the previous one are told to stop."""
        self._generation += 1
        self._assignment, self._permitted = assignment, 0
        self._messages, self._begun = [], False
        self._restarts = self._halvings = 0
        self._most = None
        await self._notify()

    async def advance(self, index: int) -> None:
        """Permit the workers to go on to mark `index`."""
        self._permitted = max(self._permitted, index + 1)
        await self._notify()

    async def message(self, index: int) -> dict[str, Any] | None:
        """What was found at mark `index`; None if nothing has been posted within a poll."""
        await self._wait(lambda: len(self._messages) > index or self._broken is not None)
        if self._broken is not None:
            return {"broken": self._broken}
        return self._messages[index] if len(self._messages) > index else None

    async def ready(self) -> dict[str, float] | None:
        """What loading took once every worker has loaded model and data and asked for work.

        None if that has not come about within a poll.
        """

        def is_ready() -> bool:
            return len(self._ready) == self._workers or self._broken is not None

        await self._wait(is_ready)
        return {"loading": time.monotonic() - self._came_up_at} if is_ready() else None

    async def close(self) -> None:
        """Send the workers home."""
        self._closed = True
        await self._notify()

    # -- the workers' side -------------------------------------------------------------------

    async def register(self, rank: int) -> None:
        """A worker process has come up; if there was one before, the assignment starts over."""
        self._came_up_at = time.monotonic()
        if rank > 0:
            self._ready.discard(rank)
            return
        self._starts_in_a_row += 1
        if self._starts_in_a_row > MAX_STARTS_IN_A_ROW:
            await self.break_down(f"its workers died {MAX_STARTS_IN_A_ROW} times in a row")
        if self._begun and self._assignment is not None:
            self._restarts += 1
            if self._restarts > MAX_RESTARTS_PER_TRIAL:
                reason = f"its workers died {self._restarts} times"
                await self._end(self._generation, _failed(reason))
        self._begun = False
        self._ready.discard(rank)

    async def next_assignment(
        self, rank: int, after: int
    ) -> tuple[int, dict[str, Any]] | Literal["go home"] | None:
        """A newer assignment than `after`; None when there is none within a poll."""
        self._ready.add(rank)
        await self._notify()
        await self._wait(lambda: self._closed or self._is_to_begin(after))
        if self._closed:
            return "go home"
        if self._assignment is None or not self._is_to_begin(after):  # the former for its type
            return None
        self._begun |= rank == 0
        return self._generation, {
            **self._assignment,
            "restarts": self._restarts,
            "halvings": self._halvings,
            "most_examples": self._most,
        }

    async def post(self, generation: int, index: int, message: dict[str, Any]) -> None:
        """Report mark `index`, once; a fault or a pause at whatever mark that is."""
        self._starts_in_a_row = 0
        if "paused" in message or message.get("fault"):
            await self._end(generation, message)
        elif generation == self._generation and index == len(self._messages):
            self._messages.append(message)
            if message.get("finished"):
                self._assignment = None
            await self._notify()

    async def post_failure(self, generation: int, reason: str, traceback: str) -> None:
        """The trial raised."""
        self._starts_in_a_row = 0
        await self._end(generation, _failed(reason, traceback))

    async def post_disk_problem(self, generation: int, problem: str) -> None:
        """What the trial would write cannot be written: others would fare no better."""
        self._starts_in_a_row = 0
        await self._end(generation, {"paused": True, "disk": problem})

    async def out_of_memory(self, generation: int, micro_batch: int) -> None:
        """It did not fit: hand the trial out again with half, or call it at fault.

        Every rank may say so.  Half of what it was, and not of what new processes find to fit:
        where trials share a GPU, that changes.

        Args:
            micro_batch: that went through the model at once, or would have.
        """
        if generation != self._generation or self._assignment is None:
            return
        self._starts_in_a_row = 0
        half = max(1, micro_batch // 2)
        self._most, self._halvings = min(half, self._most or half), 0
        if micro_batch == 1 or self._restarts >= MAX_RESTARTS_PER_TRIAL:
            reason = f"out of memory at micro-batch {micro_batch}"
            await self._end(generation, {**_failed(reason), "fault": True})

    async def killed_for_memory(self) -> None:
        """The machine ran out of memory, and Ray killed the only worker."""
        if self._assignment is None or not self._begun:
            return
        self._starts_in_a_row = 0
        self._halvings += 1
        if self._restarts >= MAX_RESTARTS_PER_TRIAL:
            reason = "out of memory: Ray ended its worker because its machine had none left"
            await self._end(self._generation, {**_failed(reason), "fault": True})

    async def may_continue(self, generation: int, index: int) -> bool | None:
        """Whether to go on to mark `index`; None when nothing was decided within a poll."""

        def has_ended() -> bool:
            return self._closed or generation != self._generation or self._assignment is None

        await self._wait(lambda: has_ended() or self._permitted > index)
        if has_ended():
            return False
        return True if self._permitted > index else None

    async def break_down(self, reason: str) -> None:
        """A worker cannot even start: the slot is of no use, and everybody goes home."""
        self._broken, self._closed = reason, True
        await self._notify()

    async def _end(self, generation: int, message: dict[str, Any]) -> None:
        """Take in what ends the trial, once; it is not handed out again.

        After a restart it may have come less far than the marks that were posted before.
        """
        if generation == self._generation and self._assignment is not None:
            self._assignment = None
            self._messages.append(message)
            await self._notify()

    # -- both --------------------------------------------------------------------------------

    def _is_to_begin(self, after: int) -> bool:
        """Whether there is a newer assignment, of which a mark is owed.

        One whose workers died behind the last mark that was permitted may have ended there.
        """
        is_owed = self._restarts == 0 or self._permitted > len(self._messages)
        return self._assignment is not None and self._generation > after and is_owed

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition: Any) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(condition), POLL_SECONDS)
            except TimeoutError:
                return


def _failed(reason: str, traceback: str = "") -> dict[str, Any]:
    return {"failed": reason, "traceback": traceback}
