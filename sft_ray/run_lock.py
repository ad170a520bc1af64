"""One driver per run: flock on this machine, and on object stores a lease beside it.

The lease is advisory: an object store cannot tell who came first, so two drivers that start
within the same second are told apart by reading back what they wrote.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sft_ray.errors import ConfigError, ResourceError
from sft_ray.file_store import FileStore

LEASE = "lease.json"
RENEW_SECONDS = 20.0
EXPIRE_SECONDS = 90.0
SETTLE_SECONDS = 1.0  # for another driver's lease to show


class RunLock:
    """Who works on a run.

    Args:
        store: the run folder.
        path: of the file on this machine whose lock counts.

    Attributes:
        taken_over: a driver elsewhere holds the run that this one held.
    """

    def __init__(self, store: FileStore, path: Path) -> None:
        self._store, self._path = store, path
        self.taken_over = False

    @contextmanager
    def held(self) -> Iterator[list[str]]:
        """Hold the run; what there is to say about it, a line each.

        Raises:
            ResourceError: another driver works on the run or has taken it over, or its folder
                cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.open("w")
        except OSError as error:
            raise ResourceError(
                f"storage: {self._store.location} cannot be written: {error.strerror}"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._busy("in this folder") from None
            except OSError as error:
                raise ResourceError(
                    f"storage: {self._store.location} cannot be locked: {error.strerror}; mount it "
                    "with locks (NFS version 4 has them), or use another storage"
                ) from None
            if self._store.local_root is not None:
                yield []
                return
            with self._leased() as notes:
                yield notes

    def is_held(self) -> bool | None:
        """Whether a driver works on the run; on object stores, one that has renewed its lease.

        None if this user may not know.
        """
        if self._store.local_root is None:
            return _is_alive(self._lease())
        try:
            with self._path.open() as lock:  # which NFS locks for readers only
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:
            return None
        return False

    def check_free(self) -> Literal[False] | None:
        """Tell early what `held` would tell; None if this user may not know.

        Raises:
            ResourceError: a driver works on the run.
        """
        is_held = self.is_held()
        if is_held:
            raise self._busy("in this folder")
        return is_held

    def _busy(self, where: str) -> ResourceError:
        return ResourceError(
            f"{self._store.location}: another search is running {where}; wait for it or stop it, "
            "or choose another name=…"
        )

    def _lease(self) -> dict[str, Any] | None:
        """What is stored; a damaged lease holds nothing."""
        try:
            lease = self._store.read_json(LEASE)
        except ConfigError:
            return None
        return lease if isinstance(lease, dict) else None

    @contextmanager
    def _leased(self) -> Iterator[list[str]]:
        before = self._lease()
        if _is_alive(before):
            raise self._busy(_whom(before))
        notes = [] if before is None else [f"the driver {_whom(before)} is gone; taking over"]
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": _process_table(),
            "id": uuid.uuid4().hex,
        }
        self._write(mine)
        time.sleep(SETTLE_SECONDS)
        if not self._is_mine(mine):
            raise self._busy(_whom(self._lease()))
        self.taken_over, done = False, threading.Event()
        renewing = threading.Thread(target=self._renew, args=(mine, done), daemon=True)
        renewing.start()
        try:
            yield notes
        except BaseException:
            if self.taken_over:
                raise self._lost() from None
            raise
        finally:
            done.set()
            renewing.join(RENEW_SECONDS)
            if not self.taken_over and self._is_mine(mine):
                self._store.delete_file(LEASE)
        if self.taken_over:
            raise self._lost()

    def _lost(self) -> ResourceError:
        return ResourceError(
            f"{self._store.location}: a driver {_whom(self._lease())} has taken the run over; this "
            "one has stopped, the other one goes on"
        )

    def _write(self, mine: dict[str, Any]) -> None:
        self._store.write_json(LEASE, {**mine, "renewed": time.time()})

    def _is_mine(self, mine: dict[str, Any]) -> bool:
        lease = self._lease()
        return lease is not None and lease.get("id") == mine["id"]

    def _renew(self, mine: dict[str, Any], done: threading.Event) -> None:
        while not done.wait(RENEW_SECONDS):
            try:
                if not self._is_mine(mine):
                    self.taken_over = True
                    return
                self._write(mine)
            except ResourceError:  # out of reach: the others cannot see it either
                continue


def _is_alive(lease: dict[str, Any] | None) -> bool:
    """Renewed lately, and not by a process that is seen from here to have ended."""
    renewed = (lease or {}).get("renewed")
    if lease is None or not isinstance(renewed, int | float):
        return False
    table = _process_table()
    is_seen = table is not None and lease.get("processes") == table
    if is_seen and not Path(f"/proc/{lease.get('pid')}").exists():
        return False
    return time.time() - renewed < EXPIRE_SECONDS


def _process_table() -> str | None:
    """Names what process numbers here belong to; None where that is not known.

    A host's name does not: containers may have its name and processes of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _whom(lease: dict[str, Any] | None) -> str:
    lease = lease or {}
    return f"on {lease.get('host', 'another machine')}, process {lease.get('pid', 'unknown')}"
