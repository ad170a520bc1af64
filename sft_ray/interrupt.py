"""Ctrl-C, SIGTERM, a closed terminal: the first asks for a clean end, a second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Interruption:
    """What has come in.

    Attributes:
        is_asked: whether to come to an end, with everything kept.
    """

    is_asked: bool = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Inside, the first signal only says that an end is asked for.

    Python hands signals to the main thread; in another one nothing is caught.

    Raises:
        KeyboardInterrupt: at a second signal, wherever the program is.
    """
    found = Interruption()

    def take(number: int, frame: FrameType | None) -> None:
        if found.is_asked:
            raise KeyboardInterrupt
        found.is_asked = True

    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    # `nohup`, or a shell's background job, has some ignored: so it stays.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, take) for number in heard}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
