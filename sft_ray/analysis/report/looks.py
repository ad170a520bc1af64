"""How the trials of a run are drawn: colours by score, the winner on top, some of very many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from sft_ray.analysis.report.blocks import Legend
from sft_ray.analysis.report.facts import BANDS, bands
from sft_ray.analysis.report.run import Run, Trial

STATE_STYLE = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "fail", "RUNNING": "running"}
WORDS = {
    "winner": "the winner",
    "complete": "COMPLETE",
    "band4": "COMPLETE, best fifth",
    "band2": "middle",
    "band0": "worst fifth",
    "pruned": "PRUNED: stopped early",
    "fail": "FAIL",
    "running": "running",
}
LAYERS = ("fail", "running", "pruned", *(f"band{i}" for i in range(BANDS)), "winner")
MANY = 100  # lines, from which they are thin and pale
MOST_LINES = 2000  # that are drawn


@dataclass(frozen=True)
class Looks:
    """The colours of a run's trials.

    Attributes:
        winner: number of the winner.
        bands: COMPLETE trial -> its fifth by score.
    """

    winner: int | None
    bands: dict[int, int]

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls(run.winner.number if run.winner else None, bands(run))

    def style(self, trial: Trial) -> str:
        """The class of a trial's marks."""
        if trial.number == self.winner:
            return "winner"
        band = self.bands.get(trial.number)
        return state_style(trial) if band is None else f"band{band}"

    def lines(self, trials: Sequence[Trial]) -> list[Trial]:
        """From the bottom layer to the top; of very many an even choice with the winner in it."""
        step = -(-len(trials) // MOST_LINES) or 1
        chosen = {trial.number for trial in trials[::step]} | {self.winner}
        shown = [trial for trial in trials if trial.number in chosen]
        return sorted(shown, key=lambda t: (LAYERS.index(self.style(t)), t.number))

    def legend(self, trials: Iterable[Trial]) -> Legend:
        """Of the colours that occur; three stand for all fifths."""
        found = {self.style(trial) for trial in trials}
        if any(style.startswith("band") for style in found):
            found |= {"band0", "band2", "band4"}
        return Legend({style: words for style, words in WORDS.items() if style in found})


def state_style(trial: Trial) -> str:
    """The class of marks that tell states apart."""
    return STATE_STYLE.get(trial.state, "pruned")


def state_legend(styles: Iterable[str]) -> Legend:
    """Of the states that occur."""
    found = set(styles)
    return Legend({style: words for style, words in WORDS.items() if style in found})
