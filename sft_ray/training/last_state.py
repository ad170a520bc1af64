"""`last/`: the state of a running trial in its run folder, written now and then and at a pause."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sft_ray.config import Train
from sft_ray.errors import DataError
from sft_ray.run_store import RunStore
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import ResumeState, load_resume_state, save_resume_state
from sft_ray.uploads import Uploads

FORMAT = 3  # of the facts; a state of another one is not taken


class LastState:
    """The state one trial can be taken up from.

    Args:
        store: the run folder.
        folder: of the trial, in the run folder.
        every_minutes: between two writings.
        train, seed: of the trial; a state of any other is not taken.
        facts: plain values that whoever takes a state up needs too, asked for at every writing.
        may_write: asked when one is due: whether the trial is still this worker's.
        uploads: writes the state; the store itself if None.
    """

    def __init__(
        self,
        store: RunStore,
        folder: str,
        every_minutes: float,
        train: Train,
        seed: int,
        facts: Callable[[], dict[str, Any]],
        uploads: Uploads | None = None,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store, self._every_minutes = store, every_minutes
        self._facts, self._may_write, self._writer = facts, may_write, uploads or store
        self._path = f"{folder}/last"
        self._written_at = time.monotonic()
        self._trial = {"train": train.model_dump(mode="json"), "seed": seed, "format": FORMAT}

    def is_due(self) -> bool:
        """Whether it is time to write one."""
        due = (time.monotonic() - self._written_at) / 60 >= self._every_minutes
        return due and self._may_write()

    def consider(self, progress: Progress) -> None:
        """Write the state of a mark if it is time to, and the trial goes on behind it."""
        if progress.resume_state is not None and not progress.finished and self.is_due():
            self.write(progress.resume_state())

    def write(self, state: ResumeState) -> None:
        """Put a state in place of the one before."""
        state.facts.update(trial=self._trial, **self._facts())
        with self._writer.replacing_folder(self._path) as folder:
            save_resume_state(folder, state)
        self._written_at = time.monotonic()

    def load(self) -> ResumeState | None:
        """What was written last; None if nothing was, it is damaged, or it is of another trial."""
        self._store.restore_folder(self._path)
        if not self._store.is_intact(self._path):
            return None
        try:
            with self._store.fetched_folder(self._path) as folder:
                state = load_resume_state(folder)
        except DataError:
            return None
        return state if state.facts.get("trial") == self._trial else None

    def delete(self) -> None:
        self._store.delete_folder(self._path)
