"""`trials/<n>/last`: the state of a running trial in its run folder, written now and then."""

from __future__ import annotations

import time

from sft_ray.run_store import RunStore
from sft_ray.training.checkpoint import (
    FACTS,
    ResumeState,
    load_resume_state,
    save_resume_state,
)
from sft_ray.training.fit import Progress


class LastState:
    """The state one trial can be taken up from.

    Args:
        store: the run folder.
        folder: of the trial, in the run folder.
        every_minutes: between two writings.
    """

    def __init__(self, store: RunStore, folder: str, every_minutes: float) -> None:
        self._store, self._every_minutes = store, every_minutes
        self._path = f"{folder}/last"
        self._written_at = time.monotonic()

    def consider(self, progress: Progress) -> None:
        """Write the state of a mark if it is time to, and the trial goes on behind it."""
        due = (time.monotonic() - self._written_at) / 60 >= self._every_minutes
        if due and progress.resume_state is not None and not progress.finished:
            with self._store.replacing_folder(self._path) as folder:
                save_resume_state(folder, progress.resume_state())
            self._written_at = time.monotonic()

    def load(self) -> ResumeState | None:
        """What was written last, None if nothing was.

        Raises:
            DataError: it is damaged.
        """
        if not self._store.exists(f"{self._path}/{FACTS}"):
            return None
        with self._store.fetched_folder(self._path) as folder:
            return load_resume_state(folder)

    def delete(self) -> None:
        self._store.delete_folder(self._path)
