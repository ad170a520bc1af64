"""A run folder that is taken up again: what is damaged in it is written anew from the study."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from sft_ray.errors import ConfigError
from sft_ray.journal import is_record
from sft_ray.run_store import (
    BEST,
    CONFIRMATION,
    EXPERIMENT,
    METRICS,
    PREDICTIONS,
    RESULTS,
    TEST_ACCESS,
    TRIAL,
    RunStore,
    is_experiment_damaged,
    trial_folder,
)
from sft_ray.search.study import SearchStudy


def damage_found(store: RunStore, damaged: Sequence[str]) -> list[str]:
    """What of a finished run is made anew, a line each; to be asked before it is.

    Args:
        damaged: files of the run.
    """
    lines = []
    for path in damaged:
        if path == CONFIRMATION:
            lines.append(
                f"{path} was damaged; `sft-ray confirm {shlex.quote(store.location)}` makes it "
                "anew from the runs that are there"
            )
        elif not path.endswith(f"/{TRIAL}") and path != EXPERIMENT:  # spoken of elsewhere
            lines.append(f"{path} was damaged and is written anew")
    if is_experiment_damaged(store):
        lines.append(f"{EXPERIMENT} was damaged and is written anew from its last-good copy")
    return lines


def records_back(store: RunStore, damaged: Sequence[str]) -> list[str]:
    """Write the records of a finished run's trials anew from its results; a line for each damaged.

    Those that are gone were cleared away.

    Args:
        damaged: files of the run.
    """
    tree = store.read_json(RESULTS)
    there = set(store.files_below("trials"))
    for row in tree["trials"]:
        path = f"{trial_folder(row['number'])}/{TRIAL}"
        if path in damaged:
            store.write_json(path, row)
    return [f"{path} was damaged and is written anew" for path in damaged if path in there]


def winner_back(store: RunStore, damaged: Sequence[str]) -> list[str]:
    """Copy a finished run's winner back to its trial, if only best/ still has it; a line if so.

    What a confirmation has put there was trained from another seed.

    Args:
        damaged: files of the run.
    """
    try:
        results = store.read_json(RESULTS)
        folder = f"{trial_folder(int(results['best']['trial']))}/{BEST}"
    except (ConfigError, TypeError, KeyError, ValueError):
        return []
    is_whole = not any(path.startswith(f"{BEST}/") or path == PREDICTIONS for path in damaged)
    is_winner = is_whole and not store.exists(CONFIRMATION) and store.exists(PREDICTIONS)
    if store.files_below(folder) or not is_winner:
        return []
    with store.replacing_folder(folder) as local:
        store.fetch_folder(BEST, local)
        (local / PREDICTIONS).write_bytes(store.read_bytes(PREDICTIONS) or b"")
    return [f"{folder} was gone; it comes back from {BEST}/"]


def mend(store: RunStore, study: SearchStudy) -> list[str]:
    """Write the records of ended trials anew where they are damaged; what was done, a line each."""
    lines, there = list[str](), set(store.files_below("trials"))
    for trial in study.trials:
        if not trial.state.is_finished():
            continue
        folder, row = trial_folder(trial.number), study.row(trial.number)
        record, marks = f"{folder}/{TRIAL}", f"{folder}/{METRICS}"
        if record in there and _json_of(store, record) != json.loads(json.dumps(row)):
            store.write_json(record, row)
            lines.append(f"{record} was damaged and is written anew from the study")
        if marks in there and len(found := _lines(store, marks)[0]) < len(row["curve"]):
            lines.append(
                f"{marks} is damaged: {len(found)} of its {len(row['curve'])} marks can be read; "
                f"their scores are in {TRIAL}"
            )
    if (count := len(_lines(store, TEST_ACCESS)[1])) > 0:
        lines.append(
            f"{TEST_ACCESS} is damaged in {count} of its lines: a scoring of the test split may be "
            "missing from the record"
        )
    return lines


def _json_of(store: RunStore, path: str) -> Any:
    try:
        return store.read_json(path)
    except ConfigError:
        return None


def _lines(store: RunStore, path: str) -> tuple[list[bytes], list[bytes]]:
    """The lines of a JSONL file that can be read, and those that cannot."""
    readable, damaged = list[bytes](), list[bytes]()
    for line in (store.read_bytes(path) or b"").splitlines(keepends=True):
        (readable if line.endswith(b"\n") and is_record(line) else damaged).append(line)
    return readable, damaged
