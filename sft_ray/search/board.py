"""What a live view of trials shows, as data: the conductor feeds it, `live_view` draws it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from sft_ray.search.trials import PlannedTrial

NUM_BEST = 5
RELIABLE_FROM = 2  # ended trials before a time to go is worth telling


@dataclass(frozen=True)
class RunningTrial:
    """A trial in a slot.

    Attributes:
        percent: of its schedule, at its last mark.
        score: at its last mark; None before the first.
        heard_seconds: since it began or its last mark.
        settings: its configuration in words.
    """

    label: str
    percent: int
    score: float | None
    train_loss: float | None
    heard_seconds: float
    settings: str


@dataclass(frozen=True)
class EndedTrial:
    """A trial that has ended.

    Attributes:
        seconds: of its slot.
    """

    number: int
    label: str
    state: str
    score: float | None
    train_loss: float | None
    seconds: float
    settings: str


@dataclass(frozen=True)
class View:
    """All trials at one moment, in a size that does not grow with their number.

    Attributes:
        noun: what one of them is called.
        planned: how many there will be at most.
        counts: of those that have ended, by state.
        running: in the order they began.
        best: the best COMPLETE ones, best first; None if nothing is to be improved.
        seconds_to_go: a rough guess; None while there is nothing to guess from.
        budget_seconds: what is left of the tightest budget of time, if there is one.
    """

    noun: str
    objective: str
    planned: int
    counts: dict[str, int]
    running: tuple[RunningTrial, ...]
    best: tuple[EndedTrial, ...] | None
    seconds_to_go: float | None
    budget_seconds: float | None

    @property
    def num_ended(self) -> int:
        return sum(self.counts.values())


@dataclass
class _Live:
    planned: PlannedTrial
    began_at: float
    heard_at: float
    percent: int = 0
    score: float | None = None
    train_loss: float | None = None


class Board:
    """Trials as they start, pass marks and end.

    One thread feeds it, another may look at it: `view` copies in single steps, and no list is
    changed in place.  It has no lock because Tune pickles whatever its searcher holds.

    Args:
        objective: name of the score.
        planned: trials at most, those that ended before included.
        slots: trials at a time.
        sign: 1 if a high score is good, -1 if a low one is; None if nothing is to be improved.
        noun: what a trial is called.
        wall_seconds: what is left of a budget of time.
        slot_seconds: what is left of a budget of slot time.
        clock: seconds from any moment.
    """

    def __init__(
        self,
        objective: str,
        planned: int,
        slots: int,
        *,
        sign: int | None = None,
        noun: str = "trial",
        wall_seconds: float | None = None,
        slot_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.objective, self.planned, self.slots = objective, planned, slots
        self.sign, self.noun = sign, noun
        self._wall_seconds, self._slot_seconds = wall_seconds, slot_seconds
        self._clock, self._opened_at = clock, clock()
        self._live: dict[int, _Live] = {}  # by number
        self._best: list[EndedTrial] = []
        self._counts: Counter[str] = Counter()
        self._ended_seconds = self._ended_here_seconds = 0.0

    def add(self, trial: EndedTrial) -> None:
        """A trial that ended in an earlier session."""
        self._take_in(trial)

    def start(self, planned: PlannedTrial) -> None:
        now = self._clock()
        self._live[planned.number] = _Live(planned, now, now)

    def mark(self, number: int, percent: int, score: float, train_loss: float) -> None:
        live = self._live[number]
        live.percent, live.score, live.train_loss = percent, score, train_loss
        live.heard_at = self._clock()

    def lose(self, number: int) -> None:
        """A trial lost its slot and will start again."""
        del self._live[number]

    def end(self, number: int, state: str, score: float | None, seconds: float) -> None:
        live = self._live.pop(number)
        label, settings = live.planned.label, live.planned.said
        self._ended_here_seconds += seconds
        self._take_in(EndedTrial(number, label, state, score, live.train_loss, seconds, settings))

    def _take_in(self, trial: EndedTrial) -> None:
        self._counts[trial.state] += 1
        self._ended_seconds += trial.seconds
        if self.sign is not None and trial.state == "COMPLETE" and trial.score is not None:
            self._best = sorted([*self._best, trial], key=self._rank)[:NUM_BEST]

    def _rank(self, trial: EndedTrial) -> tuple[float, int]:
        assert self.sign is not None
        assert trial.score is not None
        return -self.sign * trial.score, trial.number

    def view(self) -> View:
        """The state now; takes time by slots, not by trials."""
        now = self._clock()
        lives, counts = list(self._live.values()), dict(self._counts)
        ended = sum(counts.values())
        return View(
            noun=self.noun,
            objective=self.objective,
            planned=max(self.planned, ended + len(lives)),
            counts=counts,
            running=tuple(
                RunningTrial(
                    live.planned.label,
                    live.percent,
                    live.score,
                    live.train_loss,
                    now - live.heard_at,
                    live.planned.said,
                )
                for live in lives
            ),
            best=None if self.sign is None else tuple(self._best),
            seconds_to_go=self._seconds_to_go(ended, lives),
            budget_seconds=self._budget_seconds(now, lives),
        )

    def _seconds_to_go(self, ended: int, lives: list[_Live]) -> float | None:
        """As if the rest took as long on average as what has ended."""
        if ended < RELIABLE_FROM:
            return None
        done = ended + sum(live.percent for live in lives) / 100
        rest = max(self.planned - done, 0.0)
        return self._ended_seconds / ended * rest / min(self.slots, max(rest, 1.0))

    def _budget_seconds(self, now: float, lives: list[_Live]) -> float | None:
        left = []
        if self._wall_seconds is not None:
            left.append(self._wall_seconds - (now - self._opened_at))
        if self._slot_seconds is not None:
            running = sum(now - live.began_at for live in lives)
            left.append((self._slot_seconds - self._ended_here_seconds - running) / self.slots)
        return max(min(left), 0.0) if left else None
