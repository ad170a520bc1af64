"""Folders on their way to an object store, off the thread that trains."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from sft_ray.run_store import RunStore


class Uploads:
    """Writes whole folders: directly on a disk, by one background thread on an object store.

    Only what takes long and no memory runs beside training.  The files are written at once, on a
    disk too: until they are, a copy of weights and optimiser is in memory, which steps need.

    One upload runs and one waits; who brings a third one waits too.  A context manager: leaving it
    waits for what is under way.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    @contextmanager
    def replacing_folder(
        self, path: str, then: Callable[[], None] = lambda: None
    ) -> Iterator[Path]:
        """See `FileStore.replacing_folder`; `then` is called when the folder is in its place.

        Raises:
            SftError: an upload before has failed.
        """
        if self._store.local_root is not None:
            with self._store.replacing_folder(path) as folder:
                yield folder
            then()
            return
        self._raise()
        local = Path(tempfile.mkdtemp(prefix="sft_ray-"))

        def upload() -> None:
            try:
                self._store.put_folder(local, path)
                then()
            finally:
                shutil.rmtree(local, ignore_errors=True)

        try:
            yield local
        except BaseException:
            shutil.rmtree(local, ignore_errors=True)
            raise
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._waiting.put(upload)

    def join(self) -> None:
        """Wait until everything is in its place.

        Raises:
            SftError: an upload has failed.
        """
        self._waiting.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        while (upload := self._waiting.get()) is not None:
            try:
                upload()
            except Exception as error:
                self._error = error
            finally:
                self._waiting.task_done()
        self._waiting.task_done()
