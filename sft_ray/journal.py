"""The live study of a run: brought to this machine, mended where it is damaged, kept safe.

Optuna only ever adds to its journal, so the last-good copy must be how it begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from sft_ray.cache import cache_root
from sft_ray.errors import ConfigError
from sft_ray.file_store import FileStore, sync

JOURNAL = "study.journal"
MOST_SECONDS = 30.0  # between two copies, if there is news
SHARE = 0.01  # of the time that last-good copies on a disk may take, if they are to come more often
# Of the time that an object store may take: what ends between two copies is lost with the machine.
SHARE_OF_STORE = 0.2


class Journal:
    """One run's study file.

    Attributes:
        live: what Optuna writes: the run's own file on a disk, else a file of this machine.
    """

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self._kept_at, self._cost, self._kept_bytes = 0.0, 0.0, -1
        if store.local_root is not None:
            self.live = store.local_root / JOURNAL
        else:
            key = hashlib.sha256(store.location.encode()).hexdigest()[:16]
            self.live = cache_root() / "live" / key / JOURNAL

    def pull(self) -> list[str]:
        """Bring the stored study to this machine and mend it; what was done, a line each.

        A record that a killed driver left half-written is moved beside the journal: Optuna would
        append behind it and the study would be lost.  Worse damage is mended from the last-good
        copy; the damaged file is kept.
        """
        self.live.parent.mkdir(parents=True, exist_ok=True)
        good = self._store.read_good(JOURNAL)
        if self._store.local_root is not None:
            content = self.live.read_bytes() if self.live.exists() else None
        else:
            content = self._store.read_bytes(JOURNAL)
            if content is None:
                self.live.unlink(missing_ok=True)
        if content is None and good is None:
            return []
        mended = recovered(content or b"", good)
        if mended == content:
            if self._store.local_root is None:
                self.live.write_bytes(mended)
            return []
        notes = []
        if content is not None and content.startswith(mended):  # only its end was torn
            aside = _free_name(self.live, "torn")
            aside.write_bytes(content[len(mended) :])
            notes.append(f"{JOURNAL} ended in the middle of a record, which was cut off")
        else:
            aside = _free_name(self.live, "damaged")
            aside.write_bytes(content or b"")
            lost = _records(content or b"") - _records(mended)
            where = f"its {_records(mended)} records come from {JOURNAL}.good"
            if good is None:
                where = f"{_records(mended)} records before the damage are used"
            more = f", up to {lost} records behind them are lost" if lost > 0 else ""
            notes.append(f"{JOURNAL} was damaged: {where}{more}; the old file is {aside.name}")
        unfinished = self.live.with_name(f".{JOURNAL}.mended")
        with unfinished.open("wb") as file:
            file.write(mended)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.live)
        return notes

    def read(self) -> list[dict[str, Any]] | None:
        """The stored records without a torn end; None if there is no study.

        Changes and locks nothing, so a search may be writing meanwhile.

        Raises:
            ConfigError: the file is damaged, and there is no last-good copy.
        """
        good = self._store.read_good(JOURNAL)  # first, as the study grows meanwhile
        content = self._store.read_bytes(JOURNAL)
        if content is None and good is None:
            return None
        if good is None:
            content = (content or b"")[: whole_records(content or b"")]
        else:
            content = recovered(content or b"", good)
        try:
            return [json.loads(line) for line in content.splitlines()]
        except ValueError as error:
            where = self._store.path_of(JOURNAL)
            raise ConfigError(f"{where}: damaged: {error}") from None

    def push(self, *, now: bool = True) -> bool:
        """Store the live study, on the platter, and a last-good copy of it.

        Args:
            now: even if the last copy is of the last seconds, or has everything.

        Returns:
            Whether the store has all of the study now.
        """
        if not self.live.exists():
            return True
        began, is_here = time.monotonic(), self._store.local_root is not None
        has_all = self.live.stat().st_size == self._kept_bytes  # it only ever grows
        if is_here and not has_all:
            sync(self.live)
        if not now:
            share = SHARE if is_here else SHARE_OF_STORE
            if has_all or began - self._kept_at < min(MOST_SECONDS, self._cost / share):
                return has_all or is_here
        content = self.live.read_bytes()
        content = content[: whole_records(content)]  # a full disk tears the last one
        if not is_here:
            self._store.write_bytes(JOURNAL, content)
        self._store.write_good(JOURNAL, content)
        self._kept_at, self._kept_bytes = time.monotonic(), len(content)
        self._cost = self._kept_at - began
        return True


def recovered(content: bytes, good: bytes | None) -> bytes:
    """A journal's whole records, with the last-good copy in place of what it contradicts."""
    if good is None:
        end = whole_records(content)
        first_bad = _first_bad(content[:end])
        return content[: end if first_bad is None else first_bad]
    good = good[: whole_records(good)]
    # Damage in place leaves what follows the copy where it was.
    added = content[len(good) :]
    first_bad = _first_bad(added)
    return good + (added if first_bad is None else added[:first_bad])


def whole_records(content: bytes) -> int:
    """Length of the leading part whose last line is complete JSON."""
    end = content.rfind(b"\n") + 1
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        if is_record(content[start:end]):
            break
        end = start
    return end


def _first_bad(content: bytes) -> int | None:
    """Where the first line begins that is no complete record; None if all are."""
    start = 0
    for line in content.splitlines(keepends=True):
        if not (line.endswith(b"\n") and is_record(line)):
            return start
        start += len(line)
    return None


def is_record(line: bytes) -> bool:
    """Whether a line holds a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _records(content: bytes) -> int:
    return content.count(b"\n")


def _free_name(path: Path, why: str) -> Path:
    found = path.with_name(f"{path.name}.{why}-{int(time.time())}")
    number = 1
    while found.exists():
        found = path.with_name(f"{path.name}.{why}-{int(time.time())}-{number}")
        number += 1
    return found
