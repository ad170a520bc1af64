"""The run folder on a local disk or an object store: layout, atomic writes, the folder rule.

Names below are relative to the run folder.  A reader that finds `results.json` finds everything.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs

from sft_ray.cache import cache_root
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, ResourceError
from sft_ray.yaml_text import dump_yaml, parse_yaml

EXPERIMENT = "experiment.yaml"
ENVIRONMENT = "environment.json"
JOURNAL = "study.journal"
RESULTS = "results.json"
PREDICTIONS = "predictions.parquet"
TEST_ACCESS = "test_access.jsonl"
CHECKSUMS = "checksums.json"
CONFIRMATION = "confirm.json"
BEST = "best"
ERROR_LOG = "errors.log"
REPORT = "report.html"
TRIAL = "trial.json"  # in the folder of a trial that has ended
CHUNK_BYTES = 1 << 20  # of a file that is hashed
# Keys that may grow on a finished or interrupted run; everything else must stay as it was.
BUDGETS = (
    "search.trials",
    "search.budget.wall_minutes",
    "search.budget.worker_hours",
    "search.budget.patience",
)


def trial_folder(number: int) -> str:
    return f"trials/{number}"


class RunStore:
    """One run folder below a storage location.

    Args:
        storage: a folder, or a URI that pyarrow understands (`s3://…`, `gs://…`).
        name: of the run; the folder's name.

    Raises:
        ResourceError: the storage cannot be opened.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.storage, self.name = storage, name
        if "://" in storage:
            try:
                filesystem, base = fs.FileSystem.from_uri(storage)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ResourceError(f"storage: {storage!r} cannot be opened: {error}") from None
            self.local_root: Path | None = None
            self.location = f"{storage.partition('?')[0].rstrip('/')}/{name}"
        else:
            filesystem, base = fs.LocalFileSystem(), str(Path(storage).absolute())
            self.local_root = Path(base) / name
            self.location = str(Path(storage) / name)
        self._filesystem = fs.SubTreeFileSystem(f"{base}/{name}", filesystem)
        self._parent = fs.SubTreeFileSystem(base, filesystem)
        self._has_folders = filesystem.type_name == "local"  # object stores have names only

    def anchored(self) -> tuple[str, str]:
        """Storage and name that make the same store in processes that work elsewhere."""
        root = self.local_root
        return (self.storage, self.name) if root is None else (str(root.parent), root.name)

    def exists(self, path: str) -> bool:
        return bool(self._filesystem.get_file_info(path).type != fs.FileType.NotFound)

    def read_text(self, path: str) -> str | None:
        """The text of a file, None if it does not exist.

        Raises:
            ConfigError: the file is damaged.
        """
        content = self.read_bytes(path)
        try:
            return None if content is None else content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.location}/{path}: damaged, no UTF-8: {error}") from None

    def read_bytes(self, path: str) -> bytes | None:
        """The content of a file, None if it does not exist."""
        if not self.exists(path):
            return None
        with self._filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    def write_text(self, path: str, text: str) -> None:
        """Replace a file as a whole: a reader sees the old text or the new one."""
        self.write_bytes(path, text.encode("utf-8"))

    def write_json(self, path: str, value: Any) -> None:
        self.write_text(path, _json_text(value))

    def read_json(self, path: str) -> Any:
        """The value of a JSON file, None if it does not exist.

        Raises:
            ConfigError: the file is damaged.
        """
        text = self.read_text(path)
        try:
            return None if text is None else json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{self.location}/{path}: damaged JSON: {error}") from None

    def files_below(self, folder: str) -> list[str]:
        """Every file below a folder of the run, sorted; none if there is no such folder."""
        selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
        found = self._filesystem.get_file_info(selector)
        return sorted(info.path for info in found if info.type == fs.FileType.File)

    def sha256(self, path: str) -> str:
        """Of a file's content, which is never held as a whole."""
        digest = hashlib.sha256()
        # A name that ends in .gz must not make pyarrow unpack it.
        with self._filesystem.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def write_bytes(self, path: str, content: bytes) -> None:
        """Replace a file as a whole, on disk before its name changes."""
        if self.local_root is None:  # an object appears when its upload is complete
            self._make_folder(str(PurePosixPath(path).parent))
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(content)
            return
        target = self.local_root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_folder(self, path: str) -> None:
        """Make room for files at a URI of a disk."""
        if self._has_folders:
            self._filesystem.create_dir(path)

    def append_text(self, path: str, text: str) -> None:
        """Add to a text file; on object stores the whole file is written again."""
        if self.local_root is not None:
            (self.local_root / path).parent.mkdir(parents=True, exist_ok=True)
            with (self.local_root / path).open("a", encoding="utf-8") as file:
                file.write(text)
        else:
            self.write_text(path, (self.read_text(path) or "") + text)

    @contextmanager
    def replacing_folder(self, path: str) -> Iterator[Path]:
        """A local folder to fill, put in place of `path` at the end; on a disk by renaming."""
        if self.local_root is None:
            with tempfile.TemporaryDirectory(prefix="sft_ray-") as local:
                yield Path(local)
                self.delete_folder(path)
                self._make_folder(path)
                fs.copy_files(local, path, destination_filesystem=self._filesystem)
            return
        target = self.local_root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        suffix = uuid.uuid4().hex
        unfinished = target.with_name(f".{target.name}.{suffix}")
        outdated = target.with_name(f".{target.name}.{suffix}.old")
        unfinished.mkdir()
        try:
            yield unfinished
            if target.exists():
                target.rename(outdated)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(outdated, ignore_errors=True)

    def restore_folder(self, path: str) -> None:
        """Bring back what `replacing_folder` had put aside when it was killed between renames."""
        if self.local_root is None or (self.local_root / path).exists():
            return
        target = self.local_root / path
        for outdated in sorted(target.parent.glob(f".{target.name}.*.old")):
            outdated.rename(target)
            return

    def fetch_folder(self, path: str, local: Path) -> None:
        """Copy a folder of the run into a local one."""
        fs.copy_files(path, str(local), source_filesystem=self._filesystem)

    @contextmanager
    def fetched_folder(self, path: str) -> Iterator[Path]:
        """A folder of the run as a local one, for reading."""
        if self.local_root is not None:
            yield self.local_root / path
            return
        with tempfile.TemporaryDirectory(prefix="sft_ray-") as local:
            self.fetch_folder(path, Path(local))
            yield Path(local)

    def delete_folder(self, path: str) -> None:
        if self.exists(path):
            self._filesystem.delete_dir(path)

    def delete_file(self, path: str) -> None:
        if self.exists(path):
            self._filesystem.delete_file(path)

    def is_there(self) -> bool:
        return bool(self._parent.get_file_info(self.name).type != fs.FileType.NotFound)

    def delete(self) -> None:
        """Remove the whole folder."""
        if self.is_there():
            self._parent.delete_dir(self.name)

    def path_of(self, path: str) -> str:
        """Where a user finds a file of the run."""
        return f"{self.location}/{path}"

    @property
    def journal(self) -> Path:
        """The live study: the run's own file on a local disk, else a local file of this machine."""
        if self.local_root is not None:
            return self.local_root / JOURNAL
        key = hashlib.sha256(self.location.encode()).hexdigest()[:16]
        return cache_root() / "live" / key / JOURNAL

    def pull_journal(self) -> None:
        """Bring the stored study to this machine, and cut off a torn end.

        A record that a killed driver left half-written is moved beside the journal: Optuna would
        append behind it and the study would be lost.
        """
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        if self.local_root is None:
            stored = self.read_text(JOURNAL)
            if stored is None:
                self.journal.unlink(missing_ok=True)
            else:
                self.journal.write_text(stored, encoding="utf-8")
        if self.journal.exists():
            content = self.journal.read_bytes()
            whole = _whole_records(content)
            if whole < len(content):
                torn = self.journal.with_name(f"{JOURNAL}.torn-{int(time.time())}")
                torn.write_bytes(content[whole:])
                with self.journal.open("r+b") as file:
                    file.truncate(whole)
                    os.fsync(file.fileno())

    def read_journal(self) -> list[dict[str, Any]] | None:
        """The study's records without a torn end; None if there is no study.

        Changes and locks nothing, so a search may be writing meanwhile.

        Raises:
            ConfigError: the file is damaged.
        """
        content = self.read_bytes(JOURNAL)
        if content is None:
            return None
        try:
            return [json.loads(line) for line in content[: _whole_records(content)].splitlines()]
        except ValueError as error:
            raise ConfigError(f"{self.path_of(JOURNAL)}: damaged: {error}") from None

    def push_journal(self) -> None:
        """Copy the live study to object storage, with its sha256; nothing to do on a disk."""
        if self.local_root is None:
            content = self.journal.read_bytes()
            self.write_bytes(JOURNAL, content)
            self.write_bytes(f"{JOURNAL}.sha256", hashlib.sha256(content).hexdigest().encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; a dead driver holds nothing.

        Raises:
            ResourceError: another driver on this machine works on the run, or its folder cannot
                be written.
        """
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            lock = self.journal.with_name(".lock").open("w")
        except OSError as error:
            raise ResourceError(
                f"storage: {self.location} cannot be written: {error.strerror}"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResourceError(
                    f"{self.location}: another search is running in this folder; wait for it, or "
                    "choose another name=…"
                ) from None
            yield

    def is_locked(self) -> bool | None:
        """Whether a driver on this machine works on the run; None for object stores."""
        if self.local_root is None:
            return None
        try:
            with (self.local_root / ".lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def modified(self, path: str) -> datetime | None:
        """When a file was written last; None if it does not exist."""
        found: datetime | None = self._filesystem.get_file_info(path).mtime
        return found

    def set_aside(self) -> str:
        """Rename the run folder so that a fresh one can take its name; return the new name."""
        number = 1
        while self._parent.get_file_info(f"{self.name}.old-{number}").type != fs.FileType.NotFound:
            number += 1
        self._parent.move(self.name, f"{self.name}.old-{number}")
        return f"{self.name}.old-{number}"


def open_run(place: str) -> RunStore:
    """The run folder at a path or URI.

    Raises:
        ConfigError: there is no run, or it cannot be read.
        ResourceError: the storage cannot be opened.
    """
    if "://" in place:
        place_itself, mark, options = place.partition("?")
        storage, _, name = place_itself.rstrip("/").rpartition("/")
        store = RunStore(f"{storage}{mark}{options}", name)
    else:
        folder = Path(place).resolve()
        store = RunStore(str(folder.parent), folder.name)
    try:
        is_run = store.exists(EXPERIMENT)
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error}") from None
    if not is_run:
        raise ConfigError(f"{place} is no run folder; name one that a search or a training left")
    return store


def write_results(store: RunStore, tree: dict[str, Any]) -> None:
    """Write results.json, the marker of a finished run, and before it the checksums of the run.

    May be called again when the run has changed.
    """
    there = set(store.files_below("trials"))
    for row in tree["trials"]:  # a driver that was killed may have left one out
        path = f"{trial_folder(row['number'])}/{TRIAL}"
        if path not in there:
            store.write_json(path, row)
    text = _json_text(tree)
    checksums = {path: store.sha256(path) for path in checksummed_files(store) if path != RESULTS}
    checksums[RESULTS] = hashlib.sha256(text.encode("utf-8")).hexdigest()
    store.write_json(CHECKSUMS, {"sha256": checksums})
    store.write_text(RESULTS, text)


def delete_results(store: RunStore) -> None:
    """The run is not finished any more."""
    for path in (RESULTS, CHECKSUMS, CONFIRMATION):
        store.delete_file(path)


def put_winner(store: RunStore, source: str, card: str) -> None:
    """Make a trial's model folder the run's best/, with its card; its predictions go beside it."""
    with store.replacing_folder(BEST) as folder:
        store.fetch_folder(source, folder)
        store.write_bytes(PREDICTIONS, (folder / PREDICTIONS).read_bytes())
        (folder / PREDICTIONS).unlink()  # texts of others do not belong into a model folder
        (folder / "README.md").write_text(card, encoding="utf-8")


def checksummed_files(store: RunStore) -> list[str]:
    """The files a finished run vouches for: what it was, what came out, the winner."""
    known = (EXPERIMENT, ENVIRONMENT, PREDICTIONS, CONFIRMATION, RESULTS)
    single = [path for path in known if store.exists(path)]
    return [*single, *store.files_below(BEST), *trial_records(store)]


def trial_records(store: RunStore) -> list[str]:
    """The trial.json of every trial that has ended, by number."""
    paths = (path.split("/") for path in store.files_below("trials"))
    numbers = [int(p[1]) for p in paths if len(p) == 3 and p[2] == TRIAL and p[1].isdecimal()]
    return [f"{trial_folder(number)}/{TRIAL}" for number in sorted(numbers)]


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _whole_records(content: bytes) -> int:
    """Length of the leading part that consists of complete JSON lines."""
    end = content.rfind(b"\n") + 1
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        try:
            json.loads(content[start:end])
            break
        except ValueError:
            end = start
    return end


def check_folder_rule(
    store: RunStore, experiment: Experiment
) -> Literal["new", "same", "extended"]:
    """How the experiment relates to what the folder holds; only budgets may have grown.

    Raises:
        ConfigError: the folder holds another experiment; names each difference and both ways out.
    """
    text = store.read_text(EXPERIMENT)
    if text is None:
        return "new"
    old = _flat(parse_yaml(text, store.path_of(EXPERIMENT)))
    new = _flat(experiment.to_tree())
    keys = (old.keys() | new.keys()) - {"name", "storage"}  # a run folder may be moved
    keys = {key for key in keys if key.partition(".")[0] != "confirm"}  # may follow at any time
    changed = {key for key in keys if old.get(key) != new.get(key)}
    differences = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for key in sorted(changed)
        if not _grew(key, old.get(key), new.get(key))
    ]
    if differences:
        raise ConfigError(
            *(f"{store.location} holds another experiment: {text}" for text in differences),
            f"{store.location}: choose another name=…, or --fresh to set the old folder aside",
        )
    return "extended" if changed else "same"


def finished_results(store: RunStore, experiment: Experiment) -> Any:
    """results.json of exactly this experiment, if it has ended and no budget has grown since.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    return store.read_json(RESULTS) if check_folder_rule(store, experiment) == "same" else None


def read_experiment(store: RunStore) -> Experiment | None:
    """The experiment a run was made for, None if the folder holds no run.

    Raises:
        ConfigError: its experiment.yaml is damaged.
    """
    text, path = store.read_text(EXPERIMENT), store.path_of(EXPERIMENT)
    return None if text is None else Experiment.from_tree(parse_yaml(text, path), source=path)


def write_experiment(store: RunStore, experiment: Experiment) -> None:
    store.write_text(EXPERIMENT, dump_yaml(experiment.to_tree()))


def _grew(key: str, old: Any, new: Any) -> bool:
    """A budget grew when it is larger or has become unlimited."""
    return key in BUDGETS and old is not None and (new is None or new > old)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value; lists and the entries of a search space are values."""
    if not isinstance(tree, dict) or (prefix.startswith("search.space.")):
        return {prefix.rstrip("."): tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
