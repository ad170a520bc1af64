"""What the conductor runs: one trial's plan, and whoever hands plans out and hears of their ends.

A search does so over its study, `run_fixed` over a written list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.config import Train

if TYPE_CHECKING:
    from sft_ray.search.board import Board


@dataclass(frozen=True)
class PlannedTrial:
    """One configuration to run.

    Attributes:
        label: what the screen calls it.
        said: the configuration in words.
        folder: where it writes, in the run folder.
        params: what of `train` was chosen, flat, by dotted path.
        seed: of everything that is drawn while training.
        training_share: of the training rows.
        save_finished: whether its model is kept on disk when it has finished.
        save_above: only if its score, times the direction's sign, is at least this.
        save_unfinished: no trial has finished yet, so an unfinished one may have to stand in.
        end_diverged: whether a training loss that comes to nothing ends it early.
        trunks_read: what it read when it ran before, if it is to give the same numbers.
        resumes: it may have begun before, and left a state to go on from.
    """

    number: int
    label: str
    said: str
    folder: str
    train: Train
    params: dict[str, Any]
    seed: int
    training_share: float = 1.0
    save_finished: bool = True
    save_above: float | None = None
    save_unfinished: bool = False
    end_diverged: bool = False
    trunks_read: str | None = None
    resumes: bool = False

    def assignment(self) -> dict[str, Any]:
        """What the workers are told."""
        return {
            "folder": self.folder,
            "train": self.train.model_dump(mode="json"),
            "seed": self.seed,
            "training_share": self.training_share,
            "save_finished": self.save_finished,
            "save_above": self.save_above,
            "save_unfinished": self.save_unfinished,
            "end_diverged": self.end_diverged,
            "trunks_read": self.trunks_read,
            "resumes": self.resumes,
        }


def is_to_be_saved(assignment: Mapping[str, Any], score: float, *, finished: bool) -> bool:
    """Whether the weights of this score, times the direction's sign, go to disk.

    Equal scores do: of two, the study keeps the trial with the lower number.
    """
    if assignment["save_unfinished"]:
        return True
    least = assignment["save_above"]
    beats = least is None or score >= least
    return bool(finished and assignment["save_finished"] and beats)


class Trials(Protocol):
    """Where trials come from."""

    def next_trial(self) -> PlannedTrial | None:
        """The next one to run; None while there is none."""

    def mark(self, number: int, percent: int, score: float, slot_seconds: float) -> str | None:
        """Take in one evaluation; why the trial must end now, or None."""

    def overdue(self) -> str | None:
        """Why running trials must end where they are, without another mark; None if they need not.

        Once there is a reason it stays.
        """

    def finish(self, number: int, state: TrialState, outcome: Outcome) -> None:
        """Take in the end of a trial."""

    def put_back(self, number: int) -> None:
        """Take back a trial that has not ended; it is next in line."""

    def set_slots(self, slots: int) -> None:
        """There is room for so many at a time from now on."""

    def row(self, number: int) -> dict[str, Any]:
        """A trial that has ended, for its trial.json."""

    def improves(self, score: float) -> bool:
        """Whether a finished trial of this score would be the best so far, where that counts."""

    def outdated(self) -> Iterable[str]:
        """Folders of ended trials whose models are not to be kept."""

    def is_over(self) -> bool:
        """Nothing is running, nothing is left to run."""

    def open_board(self, objective: str, slots: int) -> Board:
        """What a live view shows at first: what is planned, and what has ended before."""
