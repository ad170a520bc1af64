"""Where the seconds go from the call of a search to the first slot that is ready for a trial.

What a command takes before, above all its own imports, is not in them.
"""

from __future__ import annotations

import time


class Startup:
    """Parts that follow one another, by the driver's clock.

    What a slot tells are seconds that have passed there: clocks of processes have nothing in
    common.

    Attributes:
        parts: name -> seconds, in the order of time; see `sft_ray.analysis.tables.STARTUP`.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._since = time.monotonic()
        self._is_over = False

    def end(self, part: str) -> None:
        """What has passed since the part before was this one."""
        now = time.monotonic()
        self.parts[part], self._since = now - self._since, now

    def hear(self, slot: dict[str, float]) -> None:
        """Take in what the first slot that tells anything tells of its own start.

        Args:
            slot: `workers`, `loading`: what these parts took; `ready`: for how long it has been.
        """
        if self._is_over:
            return
        self.end("slot")
        after = {"workers": slot["workers"], "loading": slot["loading"]}
        self.parts["slot"] -= slot["ready"] + sum(after.values())
        self.parts |= after
        self._is_over = True

    @property
    def seconds(self) -> float | None:
        """All of it; None while no slot is ready."""
        return sum(self.parts.values()) if self._is_over else None
