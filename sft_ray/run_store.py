"""The run folder on a local disk or an object store: layout, what was kept, marker last.

Names below are relative to the run folder.  A reader that finds `results.json` finds everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, ResourceError
from sft_ray.file_store import CHECKSUMS, GOOD, NEXT, FileStore, json_text
from sft_ray.journal import JOURNAL, Journal
from sft_ray.run_lock import RunLock
from sft_ray.yaml_text import dump_yaml, parse_yaml

__all__ = ["CHECKSUMS", "JOURNAL", "RunStore", "open_run"]

EXPERIMENT = "experiment.yaml"
ENVIRONMENT = "environment.json"
RESULTS = "results.json"
PREDICTIONS = "predictions.parquet"
TEST_ACCESS = "test_access.jsonl"
CONFIRMATION = "confirm.json"
BEFORE = ".before.json"  # the winner and its confirmation, while a finished run goes on
BEST = "best"
ERROR_LOG = "errors.log"
REPORT = "report.html"
TRIAL = "trial.json"  # in the folder of a trial that has ended
METRICS = "metrics.jsonl"  # there too: a line for every mark


def trial_folder(number: int) -> str:
    return f"trials/{number}"


class RunStore(FileStore):
    """One run folder below a storage location, with its study and its lock.

    Args:
        storage: a folder, or a URI that pyarrow understands (`s3://…`, `gs://…`).
        name: of the run; the folder's name.

    Raises:
        ResourceError: the storage cannot be opened.
    """

    def __init__(self, storage: str, name: str) -> None:
        super().__init__(storage, name)
        self._journal = Journal(self)
        self._lock = RunLock(self, self.journal.with_name(".lock"))

    def anchored(self) -> tuple[str, str]:
        """Storage and name that make the same store in processes that work elsewhere."""
        root = self.local_root
        return (self.storage, self.name) if root is None else (str(root.parent), root.name)

    @property
    def journal(self) -> Path:
        """The live study: the run's own file on a local disk, else a local file of this machine."""
        return self._journal.live

    def pull_journal(self) -> list[str]:
        """See `Journal.pull`."""
        return self._journal.pull()

    def read_journal(self) -> list[dict[str, Any]] | None:
        """See `Journal.read`."""
        return self._journal.read()

    def push_journal(self, *, now: bool = True) -> bool:
        """See `Journal.push`.

        Raises:
            ResourceError: another driver has taken the run over.
        """
        if self.is_taken_over:
            raise ResourceError(f"{self.location}: another driver has taken the run over")
        return self._journal.push(now=now)

    @contextmanager
    def locked(self) -> Iterator[list[str]]:
        """See `RunLock.held`."""
        with self._lock.held() as notes:
            yield notes

    def is_locked(self) -> bool | None:
        """See `RunLock.is_held`."""
        return self._lock.is_held()

    @property
    def is_taken_over(self) -> bool:
        """Whether another driver holds the run that this one held."""
        return self._lock.taken_over

    def check_free(self) -> None:
        """See `RunLock.check_free`."""
        self._lock.check_free()

    def check_writable(self) -> None:
        """Tell early where no folder can be made; object stores are asked when a search starts.

        Raises:
            ResourceError: what is there is no folder, or may not be written to.
        """
        if self.local_root is None:
            return
        try:
            there = next(p for p in (self.local_root, *self.local_root.parents) if p.exists())
        except OSError as error:  # a folder above that lets nobody in, a name too long
            raise ResourceError(
                f"storage: {self.local_root}: {error.strerror}; name another storage=…"
            ) from None
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise ResourceError(
                f"storage: {there} is no folder that can be written to; name another storage=…"
            )

    def set_aside(self) -> str:
        """Rename the run folder so that a fresh one can take its name; return the new name.

        Raises:
            ResourceError: a driver works on it.
        """
        if self._lock.check_free() is None:
            raise ResourceError(
                f"{self.location}: whether a search runs there cannot be seen; move it by hand"
            )
        number = 1
        while RunStore(self.storage, f"{self.name}.old-{number}").is_there():
            number += 1
        self.rename(f"{self.name}.old-{number}")
        return f"{self.name}.old-{number}"

    def tidy(self) -> None:
        """Finish or undo what a killed writer left; the caller holds the run.

        Folders come back that were between two names; unfinished ones go.
        """
        if self.local_root is None:
            folders = {path.split(f"{NEXT}/")[0] for path in self.files_below("") if NEXT in path}
            for folder in sorted(folders):
                self.restore_folder(folder)
            return
        for outdated in self.local_root.glob("**/.*.old"):
            self.restore_folder(
                str(outdated.parent.relative_to(self.local_root) / outdated.name.split(".")[1])
            )
        hexadecimal = "[0-9a-f]" * 32
        for pattern in (f"**/.*.{hexadecimal}", f"**/.*.{hexadecimal}.old"):
            for left in list(self.local_root.glob(pattern)):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)


def open_run(place: str) -> RunStore:
    """The run folder at a path or URI.

    Raises:
        ConfigError: there is no run, or it cannot be read.
        ResourceError: the storage cannot be opened.
    """
    if not place:
        raise ConfigError(
            "the name of the run folder is empty; name one that a search or a training left"
        )
    if "://" in place:
        place_itself, mark, options = place.partition("?")
        storage, _, name = place_itself.rstrip("/").rpartition("/")
        if "://" not in storage:
            raise ConfigError("a run is a folder inside of a bucket, got a bucket; name the folder")
        store = RunStore(f"{storage}{mark}{options}", name)
    else:
        folder = Path(place).resolve()
        store = RunStore(str(folder.parent), folder.name)
    try:
        is_run = store.exists(EXPERIMENT) or store.exists(f"{EXPERIMENT}{GOOD}")
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error}") from None
    if not is_run:
        raise ConfigError(f"{place} is no run folder; name one that a search or a training left")
    return store


def winner_of(model: str) -> str:
    """The winner's folder in a run folder; any other model as it is."""
    best = Path(model) / BEST
    return str(best) if best.is_dir() else model


def write_results(store: RunStore, tree: dict[str, Any]) -> None:
    """Write results.json, the marker of a finished run, and before it the checksums of the run.

    May be called again when the run has changed.
    """
    there = set(store.files_below("trials"))
    for row in tree["trials"]:  # a driver that was killed may have left one out
        path = f"{trial_folder(row['number'])}/{TRIAL}"
        if path not in there:
            store.write_json(path, row)
    text = json_text(tree)
    checksums = {path: store.sha256(path) for path in checksummed_files(store) if path != RESULTS}
    checksums[RESULTS] = hashlib.sha256(text.encode("utf-8")).hexdigest()
    store.write_json(CHECKSUMS, {"sha256": checksums})
    store.write_text(RESULTS, text)


def delete_results(store: RunStore) -> None:
    """The run is not finished any more."""
    for path in (RESULTS, CHECKSUMS, CONFIRMATION):
        store.delete_file(path)


def damaged_files(store: RunStore) -> list[str]:
    """What of a finished run is not as it was written; nothing of one that has not finished.

    The model card may be edited.  On object stores, which check what they take in themselves, the
    winner's weights are not read again.
    """
    if not store.exists(RESULTS):
        return []
    try:
        store.read_json(RESULTS)
        kept = store.read_json(CHECKSUMS)
    except ConfigError as error:
        return [RESULTS if RESULTS in str(error) else CHECKSUMS]
    if kept is None:  # the run was made before checksums were kept
        return []
    listed = kept.get("sha256") if isinstance(kept, dict) else None
    if not isinstance(listed, dict):
        return [CHECKSUMS]
    found = []
    for path, digest in listed.items():
        is_model = path.startswith(f"{BEST}/")
        if path == f"{BEST}/README.md" or (is_model and store.local_root is None):
            continue
        try:
            if store.sha256(path) != digest:
                found.append(path)
        except FileNotFoundError:
            found.append(path)
    return found


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


def scorings_of_test(store: RunStore) -> list[dict[str, Any]]:
    """What test_access.jsonl tells of every scoring of the test split, in their order.

    Lines that a kill has torn are left out.
    """
    found = []
    for line in (store.read_text(TEST_ACCESS) or "").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def kept_environment(store: RunStore) -> Any:
    """What environment.json says; None if there is none, or it is damaged."""
    try:
        return store.read_json(ENVIRONMENT)
    except ConfigError:
        return None


def read_results(store: RunStore) -> Any:
    """results.json, None if there is none; its checkpoint is where the run folder is now.

    Raises:
        ConfigError: it is damaged.
    """
    tree = store.read_json(RESULTS)
    if isinstance(tree, dict) and isinstance(tree.get("best"), dict):
        tree["best"]["checkpoint"] = store.path_of(BEST)
    return tree


def read_experiment(store: RunStore) -> Experiment:
    """The experiment a run was made for.

    Raises:
        ConfigError: its experiment.yaml is damaged, or gone with its last-good copy.
    """
    text, path = experiment_text(store), store.path_of(EXPERIMENT)
    if text is None:
        raise ConfigError(f"{path} is gone, and so is a whole {EXPERIMENT}{GOOD}; bring one back")
    return Experiment.from_tree(parse_yaml(text, path), source=path)


def write_experiment(store: RunStore, experiment: Experiment) -> None:
    """With a last-good copy, because nothing else tells what the run was made for."""
    text = dump_yaml(experiment.to_tree())
    store.write_good(EXPERIMENT, text.encode("utf-8"))
    store.write_text(EXPERIMENT, text)


def experiment_text(store: RunStore) -> str | None:
    """experiment.yaml, from its last-good copy if there is one; None if the folder holds no run."""
    good = store.read_good(EXPERIMENT)
    return store.read_text(EXPERIMENT) if good is None else good.decode("utf-8")


def is_experiment_damaged(store: RunStore) -> bool:
    """Whether experiment.yaml is not what its last-good copy says."""
    good = store.read_good(EXPERIMENT)
    return good is not None and store.read_bytes(EXPERIMENT) != good
