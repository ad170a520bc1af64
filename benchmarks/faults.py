"""Kills parts of running searches at random moments, and counts what is lost.

One search is run undisturbed; then each fault strikes searches of the same experiment and seed, at
moments drawn from a seed.  A search that its fault has ended is started again by the same command,
as a user would.  Afterwards its trials must be those of the undisturbed search, each exactly once,
and its best model must score what was reported.  One JSON line per search goes to --out; those that
are there are not repeated.  Exit code 1 if anything was lost, doubled or hung.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from sft_ray.analysis.results import SearchResult
from sft_ray.run_store import JOURNAL, RESULTS, RunStore
from sft_ray.serving.verify import run_verification
from sft_ray.yaml_text import dump_yaml
from tests.models import tiny_model_folder, toy_rows, write_csv

NAME = "search"
WORKERS = 2
TRIALS = 10
# Of one search from its start to its end, restarts included; what takes longer hangs.
HANG_SECONDS = 900
SILENCE_SECONDS = 40  # of the watchdog, short for the campaign


@dataclass(frozen=True)
class Process:
    pid: int
    title: str


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        strike: does it, to the driver with this process id.
    """

    name: str
    strike: Callable[[int, random.Random], bool]


def processes_below(pid: int) -> list[Process]:
    """All descendants of a process; the titles are Ray's for its workers."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            try:
                title = (Path("/proc") / str(child) / "cmdline").read_bytes().decode()
            except OSError:
                continue
            found.append(Process(child, title.replace("\0", " ")))
    return sorted(found, key=lambda process: process.pid)


def to_process(pattern: str, number: signal.Signals, which: int | None = 0) -> Any:
    """A fault that sends a signal to a process by its title; None sends it to all of them."""

    def strike(driver: int, draw: random.Random) -> bool:
        found = [p.pid for p in processes_below(driver) if re.search(pattern, p.title)]
        chosen = found if which is None else found[which : which + 1]
        for pid in chosen:
            os.kill(pid, number)
        return bool(chosen)

    return strike


def to_driver(number: signal.Signals) -> Any:
    """A fault that sends a signal to the driver."""

    def strike(driver: int, draw: random.Random) -> bool:
        os.kill(driver, number)
        return True

    return strike


RANK = r"^ray::RayTrainWorker"
FAULTS = (
    Fault("kill driver", to_driver(signal.SIGKILL)),
    Fault("kill rank 0", to_process(RANK, signal.SIGKILL)),
    Fault("kill rank 1", to_process(RANK, signal.SIGKILL, 1)),
    Fault("kill all ranks", to_process(RANK, signal.SIGKILL, None)),
    Fault("kill slot", to_process(r"^ray::(ResourceTrainable|Slot)", signal.SIGKILL)),
    Fault("kill controller", to_process(r"^ray::TrainController", signal.SIGKILL)),
    Fault("kill mailbox", to_process(r"^ray::Mailbox", signal.SIGKILL)),
    Fault("kill watch", to_process(r"^ray::Watch", signal.SIGKILL)),
    Fault("kill raylet", to_process(r"/raylet/raylet ", signal.SIGKILL)),
    Fault("kill gcs", to_process(r"/gcs_server ", signal.SIGKILL)),
    Fault("stop rank 1", to_process(RANK, signal.SIGSTOP, 1)),
    Fault("stop slot", to_process(r"^ray::(ResourceTrainable|Slot)", signal.SIGSTOP)),
    Fault("stop mailbox", to_process(r"^ray::Mailbox", signal.SIGSTOP)),
    Fault("stop watch", to_process(r"^ray::Watch", signal.SIGSTOP)),
    Fault("ctrl-c", to_driver(signal.SIGINT)),
    Fault("sigterm", to_driver(signal.SIGTERM)),
)
KILLS = ("kill driver", "kill rank 0", "kill rank 1", "kill slot", "kill raylet")


def write_experiment(folder: Path, **changes: Any) -> Path:
    """Ten trials of a tiny model over two workers, or what `changes` makes of it; its file."""
    tiny_model_folder(folder / "model")
    write_csv(folder / "toy.csv", toy_rows(400, seed=0))
    tree: dict[str, Any] = {
        "name": NAME,
        "model": str(folder / "model"),
        "data": {
            "train": str(folder / "toy.csv"),
            "split": {"validation": 0.2, "test": 0.1},
            "max_length": 32,
        },
        "search": {
            "space": {
                "train.learning_rate": {"log_uniform": [1.0e-4, 1.0e-2]},
                "train.batch_size": {"choice": [8, 16]},
                "train.epochs": {"int": [4, 8]},
                "train.frozen_layers": {"int": [0, 2]},
            },
            "trials": TRIALS,
        },
        "resources": {"workers_per_trial": WORKERS, "slots": 1},
        "checkpoint": {"every_minutes": 0.02},
        "watchdog": {"silence_seconds": SILENCE_SECONDS, "stall_minutes": 2},
        "storage": str(folder / "unset"),
    }
    for name, value in changes.items():
        section = tree.get(name)
        tree[name] = {**section, **value} if isinstance(section, dict) else value
    path = folder / "experiment.yaml"
    path.write_text(dump_yaml(tree), encoding="utf-8")
    return path


def start(experiment: Path, storage: Path, log: Path) -> subprocess.Popen[bytes]:
    """The command a user types, in a session of its own."""
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "sft_ray.cli", "search", str(experiment), f"storage={storage}"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
        )


def marks_so_far(run: Path) -> int:
    """Lines of all metrics files: how far a search is."""
    count = 0
    for path in run.glob("trials/*/metrics.jsonl"):
        try:
            count += path.read_bytes().count(b"\n")
        except OSError:
            continue
    return count


def trials_of(run: Path) -> list[tuple[Any, ...]]:
    """What must be the same in every search of the experiment."""
    result = SearchResult.load(str(run))
    return [
        (row["number"], row["state"], json.dumps(row["params"], sort_keys=True), row["value"])
        for row in result.trials
    ]


def doubled_in(run: Path) -> int:
    """Trials or marks that the study holds twice."""
    records = RunStore(str(run.parent), run.name).read_journal() or []
    seen: set[tuple[str, int, int | None]] = set()
    doubled = 0
    for record in records:
        operation = JournalOperation(record["op_code"])
        if operation == JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE:
            key = ("mark", record["trial_id"], record["step"])
        elif (
            operation == JournalOperation.SET_TRIAL_STATE_VALUES
            and TrialState(record["state"]).is_finished()
        ):
            key = ("end", record["trial_id"], None)
        else:
            continue
        doubled += key in seen
        seen.add(key)
    return doubled


def suffer(
    fault: Fault, seed: int, experiment: Path, folder: Path, expected: Sequence[Any], marks: int
) -> dict[str, Any]:
    """One search with one fault; what became of it."""
    draw = random.Random(f"{fault.name} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, log = folder / NAME, folder / "log.txt"
    moment, extra = draw.randrange(marks), draw.uniform(0.0, 0.5)
    began = time.monotonic()
    driver = start(experiment, folder, log)
    struck_at: float | None = None
    recovered_after: float | None = None
    starts, behind = 1, 0
    outcome = "hung"
    while time.monotonic() - began < HANG_SECONDS:
        if struck_at is None and marks_so_far(run) >= moment and (run / JOURNAL).exists():
            time.sleep(extra)
            if fault.strike(driver.pid, draw):
                struck_at, behind = time.monotonic(), marks_so_far(run)
        if struck_at is not None and recovered_after is None and marks_so_far(run) > behind:
            recovered_after = time.monotonic() - struck_at
        code = driver.poll()
        if code is None:
            time.sleep(0.02)
            continue
        if (run / RESULTS).exists() and code == 0:
            outcome = "survived" if starts == 1 else "resumed"
            break
        starts += 1
        if starts > 4:
            outcome = "does not go on"
            break
        driver = start(experiment, folder, log)
    left = [p.title[:60] for p in processes_below(driver.pid)]
    if driver.poll() is None:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    found = trials_of(run) if (run / RESULTS).exists() else []
    return {
        "fault": fault.name,
        "seed": seed,
        "struck": struck_at is not None,
        "at_mark": moment,
        "outcome": outcome,
        "starts": starts,
        "lost": sum(row not in found for row in expected),
        "doubled": doubled_in(run),
        "rescored": bool(found) and run_verification(str(run)).ok,
        "left_behind": left,
        "recovery_seconds": recovered_after,
        "seconds": time.monotonic() - began,
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per fault, and one for all."""
    lines = [
        "| fault | injected | went on by itself | by the same command | lost | doubled | hung "
        "| time to recover, s: median (most) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    names = [f.name for f in FAULTS if any(row["fault"] == f.name for row in rows)]
    for name in [*names, "all"]:
        mine = [row for row in rows if row["struck"] and name in (row["fault"], "all")]
        seconds = [r["recovery_seconds"] for r in mine if r["recovery_seconds"] is not None]
        times = f"{statistics.median(seconds):.0f} ({max(seconds):.0f})" if seconds else ""
        outcomes = [row["outcome"] for row in mine]
        lines.append(
            f"| {name} | {len(mine)} | {outcomes.count('survived')} | {outcomes.count('resumed')} "
            f"| {sum(r['lost'] for r in mine)} | {sum(r['doubled'] for r in mine)} "
            f"| {outcomes.count('hung') + outcomes.count('does not go on')} | {times} |"
        )
    return "\n".join(lines)


def is_flawless(row: dict[str, Any]) -> bool:
    return (
        row["outcome"] in ("survived", "resumed")
        and not row["lost"]
        and not row["doubled"]
        and row["rescored"]
        and not row["left_behind"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the searches")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--n", type=int, default=5 * len(KILLS), help="injections, over all faults")
    parser.add_argument("--faults", nargs="*", choices=[f.name for f in FAULTS], default=KILLS)
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.name in options.faults]
    options.folder.mkdir(parents=True, exist_ok=True)
    experiment = options.folder / "experiment.yaml"
    if not experiment.exists():
        write_experiment(options.folder)
    calm = options.folder / "calm"
    if not (calm / NAME / RESULTS).exists():
        code = start(experiment, calm, options.folder / "calm.log").wait()
        if code != 0:
            raise SystemExit(f"the undisturbed search ended with {code}: {options.folder}/calm.log")
    expected, marks = trials_of(calm / NAME), marks_so_far(calm / NAME)
    rows = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    done = {(row["fault"], row["seed"]) for row in rows}
    for number in range(options.n):
        fault, seed = chosen[number % len(chosen)], number // len(chosen)
        if (fault.name, seed) in done:
            continue
        folder = options.folder / "now"
        row = suffer(fault, seed, experiment, folder, expected, marks)
        rows.append(row)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        if not is_flawless(row):
            folder.rename(options.folder / f"flawed-{fault.name.replace(' ', '-')}-{seed}")
    print(table(rows))
    sys.exit(0 if all(is_flawless(row) for row in rows) else 1)


if __name__ == "__main__":
    main()
