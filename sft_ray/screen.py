"""What a search says: the resolved truth, one line per evaluation and end of trial, the outcome."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

PARAM_LABELS = {
    "train.learning_rate": "lr",
    "train.batch_size": "batch",
    "train.epochs": "epochs",
    "train.frozen_layers": "frozen",
}


class Screen:
    """Prints plain lines, each led by the minutes and seconds since it was made."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._started = time.monotonic()
        self._live_write: Callable[[str], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it is given, and no terminal can be pickled."""
        return {**self.__dict__, "_live_write": None}

    @property
    def is_terminal(self) -> bool:
        """Whether somebody may be looking at it."""
        return not self._quiet and sys.stdout.isatty()

    def say(self, line: str = "") -> None:
        if self._quiet:
            return
        try:
            if self._live_write is not None:
                self._live_write(line)
            else:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
        except OSError:  # nobody reads any more; the run is not to suffer
            self._quiet = True
            silence(sys.stdout)

    def event(self, line: str, *, passing: bool = False) -> None:
        """A line with the time; a passing one is left to a live view, if there is one."""
        if not (passing and self._live_write is not None):
            self.say(f"{self.clock()}  {line}")

    def clock(self) -> str:
        """`  3:07`, minutes and seconds so far."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes:3d}:{seconds:02d}"

    @contextmanager
    def writing_through(self, write: Callable[[str], None]) -> Iterator[None]:
        """While a live view holds the bottom of the terminal, it writes the lines above."""
        self._live_write = write
        try:
            yield
        finally:
            self._live_write = None

    def facts(self, facts: Mapping[str, str]) -> None:
        """Aligned `name  value` lines."""
        width = max(map(len, facts)) + 2
        columns = 100
        if self.is_terminal:  # which may be narrower
            columns = min(columns, shutil.get_terminal_size().columns)
        for name, value in facts.items():
            room = max(columns - width, 20)
            lines = textwrap.wrap(value, room, break_on_hyphens=False, break_long_words=False)
            lines = lines or [""]
            self.say(f"{name:<{width}}{lines[0]}")
            for line in lines[1:]:
                self.say(" " * width + line)


def silence(stream: TextIO) -> None:
    """Let a stream whose reader has gone lead nowhere: Python flushes it once more at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def short_params(params: Mapping[str, Any]) -> str:
    """`lr 3e-05, batch 32, epochs 3, l2_sp 0.01, frozen 2`."""
    parts = []
    for name, value in params.items():
        if name == "train.regularization.kind":
            strength = params.get(f"train.regularization.{value}.strength")
            parts.append("no penalty" if strength is None else f"{value} {strength:.2g}")
        elif not name.startswith("train.regularization."):
            label = PARAM_LABELS.get(name, name.removeprefix("train."))
            parts.append(f"{label} {_short(value)}")
    return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def count(number: float, noun: str) -> str:
    """`1 slot`, `2 slots`."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
