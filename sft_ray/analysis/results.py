"""What a run has left: results.json or the records of its trials, its study, and its table."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from sft_ray.analysis.outcome import FIGURES
from sft_ray.errors import ConfigError
from sft_ray.location import check_ending
from sft_ray.run_store import (
    ENVIRONMENT,
    RESULTS,
    RunStore,
    open_run,
    read_experiment,
    read_results,
    trial_records,
)

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

# What a row tells before and behind its parameters and metrics.
ENDING = ("state", "role", "reason", "value")
COLUMNS = (
    "seed",
    "restarts",
    "schedule_percent",
    "epochs_run",
    "examples_per_second",
    *FIGURES,
)
FRAME_TYPES = (".csv", ".parquet")


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search; `tree` is results.json.

    Of a run that has not finished, `tree` holds the trials that have ended and no `best`.
    """

    location: str
    tree: dict[str, Any]

    @classmethod
    def load(cls, location: str) -> Self:
        """What a run has left so far.

        Args:
            location: path or URI of the run folder.

        Raises:
            SftError: there is no run, or a file of it is damaged.
        """
        store = open_run(location)
        tree = read_results(store)
        if tree is not None:
            check_tree(tree, store.path_of(RESULTS))
            return cls(store.location, tree)
        experiment = read_experiment(store)
        rows = []
        for path in trial_records(store):
            rows.append(store.read_json(path))
            check_row(rows[-1], store.path_of(path))
        tree = {
            "name": experiment.name,
            "metric": experiment.search.score,  # None: the task's first
            "direction": None,
            "trials": rows,
            "environment": store.read_json(ENVIRONMENT),
        }
        unfinished = cls(store.location, tree)
        if store.read_journal():
            tree["direction"] = unfinished.study.directions[0].name.lower()
        return unfinished

    @property
    def is_finished(self) -> bool:
        return "best" in self.tree

    @property
    def best(self) -> dict[str, Any]:
        """The winner: trial, params, validation, gain_over_default, checkpoint.

        Raises:
            ConfigError: the run has not finished.
        """
        if not self.is_finished:
            raise ConfigError(f"{self.location} has not finished, so it has no winner yet")
        best: dict[str, Any] = self.tree["best"]
        return best

    @property
    def trials(self) -> list[dict[str, Any]]:
        """One row per trial, by number."""
        trials: list[dict[str, Any]] = self.tree["trials"]
        return trials

    @property
    def checkpoint(self) -> str:
        """Folder of the winner, for `from_pretrained`; on object stores the URI to copy it from."""
        return str(self.best["checkpoint"])

    @cached_property
    def study(self) -> optuna.Study:
        """The search's Optuna study as it is now, in memory: nothing can be added to it.

        Raises:
            SftError: the run has none, or it is damaged.
        """
        return load_study(open_run(self.location))

    def frame(self) -> pd.DataFrame:
        """One row per trial by number: how it ended, hyperparameters, metrics, times.

        Hyperparameters keep their dotted paths, metrics are called `metric.<name>`; what a trial
        does not have is missing.
        """
        import pandas as pd

        rows = sorted(self.trials, key=lambda row: row["number"])
        params = dict.fromkeys(name for row in rows for name in row["params"])
        metrics = dict.fromkeys(name for row in rows for name in row["metrics"])
        columns: dict[str, list[Any]] = {
            **{name: [row.get(name) for row in rows] for name in ENDING},
            **{name: [row["params"].get(name) for row in rows] for name in params},
            **{f"metric.{name}": [row["metrics"].get(name) for row in rows] for name in metrics},
            **{name: [row.get(name) for row in rows] for name in COLUMNS},
        }
        return pd.DataFrame(
            {
                name: pd.array(*(_as_texts(values) if name in ENDING[:3] else _typed(values)))
                for name, values in columns.items()
            },
            index=pd.Index([row["number"] for row in rows], name="number", dtype="int64"),
        )


def load_study(store: RunStore) -> optuna.Study:
    """The Optuna study of a run as it is now, in memory: nothing can be added to it.

    Raises:
        ConfigError: the run has none, or it is damaged.
    """
    records = store.read_journal()
    if not records:
        raise ConfigError(f"{store.location} has no study; only a search keeps one")
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # else every copy of it is announced
    try:
        storage = JournalStorage(_Records(records, store.location))
        [only] = storage.get_all_studies()
        return optuna.load_study(study_name=only.study_name, storage=storage)
    except Exception as error:  # Optuna takes the records at their word
        raise ConfigError(
            f"{store.location}: the study is damaged: {type(error).__name__}: {error}"
        ) from None


class _Records(BaseJournalBackend):
    """The records of a journal, for a storage that is only read."""

    def __init__(self, records: list[dict[str, Any]], location: str) -> None:
        self._records, self._location = records, location

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self._records[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise ConfigError(
            f"{self._location}: its study is open for reading only; copy it with optuna.copy_study"
        )


def _typed(values: list[Any]) -> tuple[list[Any], str]:
    """Values of one kind and the column type for them; None is missing."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, bool) for value in present):
        return values, "bool" if len(present) == len(values) else "boolean"
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in present):
        return _as_texts(values)
    if present and len(present) == len(values) and all(isinstance(v, int) for v in present):
        return values, "int64"
    return [float("nan") if value is None else float(value) for value in values], "float64"


def _as_texts(values: list[Any]) -> tuple[list[Any], str]:
    """Texts as they are and anything else as JSON, such as the 2 among "all", 0 and 2."""
    kept = (str, type(None))
    return [v if isinstance(v, kept) else json.dumps(v) for v in values], "string"


def write_frame(frame: pd.DataFrame, path: str) -> None:
    """Write a table as csv or parquet, by the ending; the file appears when it is whole.

    Raises:
        ConfigError: another ending, or the file cannot be written.
    """
    target = Path(path)
    check_ending(path, FRAME_TYPES, "a table")
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if target.suffix.lower() == ".csv":
            frame.to_csv(unfinished)
        else:
            frame.to_parquet(unfinished)
        unfinished.replace(target)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Take a file at its word; one that lacks what it should hold is damaged.

    Raises:
        ConfigError: it is.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: damaged: {type(error).__name__}: {reason}") from None


def check_tree(tree: Any, where: str) -> None:
    """Whether results.json holds what readers rely on; its figures may still be false.

    Raises:
        ConfigError: the file is damaged.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("trials"), list):
        raise ConfigError(f"{where}: damaged: must hold an object with a list of trials")
    best = tree.get("best")
    # A confirmation may find that the default recipe wins, which need not be among the trials.
    parts: dict[str, type | tuple[type, ...]]
    parts = {"trial": (int, type(None)), "params": dict, "validation": dict}
    if not isinstance(best, dict) or not _holds(best, parts):
        raise ConfigError(f"{where}: damaged: its `best` must hold {', '.join(parts)}")
    for row in tree["trials"]:
        check_row(row, where)


def check_row(row: Any, where: str) -> None:
    """The same for one trial's record.

    Raises:
        ConfigError: the file is damaged.
    """
    parts = {"number": int, "state": str, "role": str, "params": dict, "metrics": dict}
    number = (int, float, type(None))
    if not isinstance(row, dict) or not _holds(row, parts):
        raise ConfigError(f"{where}: damaged: a trial must hold {', '.join(parts)}")
    if not all(isinstance(v, number) for v in (row.get("value"), *row["metrics"].values())):
        raise ConfigError(f"{where}: damaged: value and metrics of a trial must be numbers")


def _holds(tree: dict[str, Any], parts: Mapping[str, type | tuple[type, ...]]) -> bool:
    return all(name in tree and isinstance(tree[name], kind) for name, kind in parts.items())
