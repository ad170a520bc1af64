"""Kills parts of running searches at random moments, and counts what is lost.

One search is run undisturbed; then faults strike searches of the same experiment and seed, one or
several each (--per-search), at moments drawn from a seed.  A search that a fault has ended is
started again by the same command, as a user would.  Afterwards its trials must be those of the
undisturbed search, each exactly once, and its best model must score what was reported.  Where a
fault is a trial's own (it raises, is out of memory, turns NaN) the trials behind it may differ, and
each number must be there once.

Faults of disks need root: the run folder lies on a small tmpfs of its own.  Faults of storage need
moto: a proxy in front of its S3 server fails, dawdles or hangs up.  Faults inside of a trial are
planted by a `sitecustomize` in the PYTHONPATH of the search; a clock that jumps is Python's
`time.time` in all of its processes, as the kernel's belongs to the whole machine.

One JSON line per fault goes to --out, with what its search has lost and doubled; faults that are
there are not repeated.  Exit code 1 if anything was lost, doubled or hung.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from benchmarks.planting import plant_in
from benchmarks.rows import append, finished
from sft_ray.analysis.results import SearchResult
from sft_ray.run_store import JOURNAL, METRICS, RESULTS, RunStore
from sft_ray.serving.verify import run_verification
from sft_ray.yaml_text import dump_yaml
from tests import s3
from tests.models import tiny_model_folder, toy_rows, write_csv

NAME = "search"
TRIALS = 10
# Of one search from its start to its end, restarts included; what takes longer hangs.
HANG_SECONDS = 900
SILENCE_SECONDS = 40  # of the watchdog, short for the campaign


@dataclass(frozen=True)
class Process:
    pid: int
    title: str


@dataclass
class Scene:
    """One search under a fault.

    Attributes:
        driver: its process id.
        storage: what it writes to; a folder or a URI.
        folder: on this machine, with `orders/` for what is planted in its processes.
        heal: ends what a strike has begun; None if nothing lasts.
    """

    driver: int
    draw: random.Random
    experiment: Path
    storage: str
    folder: Path
    proxy: Any = None
    heal: Callable[[], None] | None = None
    heal_at: float = 0.0

    @property
    def orders(self) -> Path:
        return self.folder / "orders"

    def lasting(self, seconds: float, heal: Callable[[], None]) -> None:
        self.heal, self.heal_at = heal, time.monotonic() + seconds

    def end_fault(self) -> None:
        """At once."""
        heal, self.heal = self.heal, None
        if heal is not None:
            heal()


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        strike: does it; whether there was anything to do it to.
        place: what the search's storage is: a folder, a small disk, or S3 behind a proxy.
        is_of_a_trial: it may end a trial otherwise than the undisturbed search.
        at_end: it strikes at the last mark, just before the results are written.
    """

    name: str
    strike: Callable[[Scene], bool]
    place: str = "folder"
    is_of_a_trial: bool = False
    at_end: bool = False


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

    def strike(scene: Scene) -> bool:
        found = [p.pid for p in processes_below(scene.driver) if re.search(pattern, p.title)]
        chosen = found if which is None else found[which : which + 1]
        for pid in chosen:
            os.kill(pid, number)
        return bool(chosen)

    return strike


def to_driver(number: signal.Signals) -> Any:
    """A fault that sends a signal to the driver."""

    def strike(scene: Scene) -> bool:
        os.kill(scene.driver, number)
        return True

    return strike


def to_trial(action: str) -> Any:
    """A fault inside the next training step of one rank; see `SITECUSTOMIZE`."""

    def strike(scene: Scene) -> bool:
        (scene.orders / "step").write_text(action)
        return True

    return strike


def to_clock(seconds: float) -> Any:
    """Python's clock jumps, in every process of the search."""

    def strike(scene: Scene) -> bool:
        (scene.orders / "clock").write_text(str(seconds))
        return True

    return strike


def fill_disk(scene: Scene) -> bool:
    """To the last byte, for 15 seconds."""
    ballast = scene.folder / "disk" / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    scene.lasting(15, lambda: ballast.unlink(missing_ok=True))
    return True


def freeze_disk(scene: Scene) -> bool:
    """What is opened from now on is read-only, for 15 seconds; open files stay as they are."""
    disk = str(scene.folder / "disk")
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)
    scene.lasting(15, lambda: _unmount(Path(disk)))
    return True


def refuse_requests(scene: Scene) -> bool:
    """Every request ends with 503, for a minute."""
    scene.proxy.fail(1_000_000)
    scene.lasting(60, lambda: scene.proxy.fail(0))
    return True


def dawdle(scene: Scene) -> bool:
    """Every upload takes two seconds more, for a minute."""
    scene.proxy.delay = 2.0
    scene.lasting(60, lambda: setattr(scene.proxy, "delay", 0.0))
    return True


def hang_up(scene: Scene) -> bool:
    """All connections are closed, ten times."""
    for _ in range(10):
        scene.proxy.fail(0)
        time.sleep(scene.draw.uniform(0.1, 1.0))
    return True


def second_driver(scene: Scene) -> bool:
    """The same command again, while the first one runs: it must be turned away."""
    other = start(scene.experiment, scene.storage, scene.folder / "second.txt", scene.orders)
    try:
        code = other.wait(timeout=HANG_SECONDS / 3)
    except subprocess.TimeoutExpired:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        code = None
    said = (scene.folder / "second.txt").read_text(errors="replace")
    if code == 0 and " starts " not in said:
        return False  # the first one was over before
    if code != 2 or "another search is running" not in said:
        raise SystemExit(f"the second driver ended with {code}: {said[-500:]}")
    return True


def _unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)


# Planted in every Python process of a search.
SITECUSTOMIZE = """
import os, time
from pathlib import Path

ORDERS, honest_time = Path(__file__).parent, time.time

def jumped():
    try:
        return honest_time() + float((ORDERS / "clock").read_text())
    except (OSError, ValueError):
        return honest_time()

time.time = jumped

def taken():
    mine = ORDERS / f"step.{os.getpid()}"
    try:  # one rank only
        (ORDERS / "step").rename(mine)
        return mine.read_text()
    except OSError:
        return None

def plant(module):
    honest_step = module.Trial.take_step
    def take_step(trial, indices):
        action = taken()
        if action == "raise":
            raise ValueError("planted: a bug of the loss")
        if action == "memory":
            import torch
            torch.empty(1 << 55)
        if action == "nan":
            for parameter in trial.trainable:
                parameter.data.fill_(float("nan"))
        if action == "hang":
            time.sleep(1e6)
        return honest_step(trial, indices)
    module.Trial.take_step = take_step
"""
RANK = r"^ray::(RayTrainWorker|Worker\b)"
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
    Fault("second driver", second_driver),
    Fault("trial raises", to_trial("raise"), is_of_a_trial=True),
    Fault("trial out of memory", to_trial("memory"), is_of_a_trial=True),
    Fault("trial turns NaN", to_trial("nan"), is_of_a_trial=True),
    Fault("trial never reports", to_trial("hang")),
    Fault("full disk", fill_disk, place="disk"),
    Fault("full disk at the results", fill_disk, place="disk", at_end=True),
    Fault("read-only disk", freeze_disk, place="disk"),
    Fault("s3 answers 503", refuse_requests, place="s3"),
    Fault("s3 is slow", dawdle, place="s3"),
    Fault("s3 hangs up", hang_up, place="s3"),
    Fault("clock jumps ahead", to_clock(86_400)),
    Fault("clock jumps back", to_clock(-86_400)),
)
DISK_MEGABYTES = 64
KILLS = ("kill driver", "kill rank 0", "kill rank 1", "kill slot", "kill raylet")


def write_experiment(folder: Path, **changes: Any) -> Path:
    """Ten trials of a tiny model over two workers, or what `changes` makes of it; its file."""
    tiny_model_folder(folder / "model")
    write_csv(folder / "toy.csv", toy_rows(800, seed=0))
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
        "resources": {"workers_per_trial": 2, "cpus_per_worker": 1, "slots": 1},
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


def start(
    experiment: Path, storage: Path | str, log: Path, orders: Path | None = None
) -> subprocess.Popen[bytes]:
    """The command a user types, in a session of its own; `orders` goes into its PYTHONPATH."""
    paths = [str(orders)] if orders else []
    paths += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "sft_ray.cli", "search", str(experiment), f"storage={storage}"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={
                **os.environ,
                "RAY_ADDRESS": "local",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(paths),
            },
        )


def marks_so_far(run: RunStore) -> int:
    """Lines of all metrics files: how far a search is."""
    files = [path for path in run.files_below("trials") if path.endswith(f"/{METRICS}")]
    return sum((run.read_bytes(path) or b"").count(b"\n") for path in files)


def trials_of(run: RunStore) -> list[tuple[Any, ...]]:
    """What must be the same in every search of the experiment."""
    result = SearchResult.load(run.location)
    return [
        (row["number"], row["state"], json.dumps(row["params"], sort_keys=True), row["value"])
        for row in result.trials
    ]


def doubled_in(run: RunStore) -> int:
    """Trials or marks that the study holds twice."""
    records = run.read_journal() or []
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


@contextmanager
def storage_for(fault: Fault, folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Storage as the search sees it, as we see it, and the proxy between."""
    if fault.place == "disk":
        disk = folder / "disk"
        disk.mkdir()
        size = f"size={DISK_MEGABYTES}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)
        try:
            yield str(disk), str(disk), None
        finally:
            shutil.copytree(disk, folder / "kept", dirs_exist_ok=True)
            _unmount(disk)
    elif fault.place == "s3":
        os.environ.update(s3.CREDENTIALS)
        with s3.s3_server() as port:
            proxy = s3.Proxy(port)
            try:
                uris = [f"s3://{s3.BUCKET}/runs{s3.options(p)}" for p in (proxy.port, port)]
                yield uris[0], uris[1], proxy
            finally:
                proxy.close()
    else:
        yield str(folder), str(folder), None


@dataclass
class Strike:
    """One fault, and when it strikes.

    Attributes:
        seed: of the moment.
        mark: how far the search is then, in lines of all metrics files.
        delay: seconds behind that.
        at: when it struck; None until then.
        marks: that there were at that moment.
        starts: of the driver, up to that moment.
        recovery_seconds: until the next mark; None until then.
    """

    fault: Fault
    seed: int
    mark: int
    delay: float
    at: float | None = None
    marks: int = 0
    starts: int = 1
    recovery_seconds: float | None = None


def drawn(fault: Fault, seed: int, marks: int) -> Strike:
    """A fault at a moment of a search that has `marks` marks in all."""
    draw = random.Random(f"{fault.name} {seed}")
    mark, delay = draw.randrange(marks), draw.uniform(0.0, 0.5)
    return Strike(fault, seed, marks - 1 if fault.at_end else mark, delay)


def in_one_search(strikes: Sequence[Strike], most: int) -> Iterator[list[Strike]]:
    """Strikes that share a storage, mixed, at most so many at a time."""
    for place in dict.fromkeys(strike.fault.place for strike in strikes):
        mine = [strike for strike in strikes if strike.fault.place == place]
        if most > 1:
            random.Random(0).shuffle(mine)
        for first in range(0, len(mine), most):
            yield sorted(mine[first : first + most], key=lambda strike: strike.mark)


def suffer(
    strikes: Sequence[Strike], experiment: Path, folder: Path, expected: Sequence[Any]
) -> list[dict[str, Any]]:
    """One search under faults; what became of it, a row for each of them."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "orders").mkdir(parents=True)
    plant_in(folder / "orders", SITECUSTOMIZE)
    with storage_for(strikes[0].fault, folder) as (storage, seen, proxy):
        draw = random.Random(f"{strikes[0].fault.name} {strikes[0].seed}")
        scene = Scene(0, draw, experiment, storage, folder, proxy)
        try:
            return _suffer(strikes, scene, RunStore(seen, NAME), expected)
        finally:
            scene.end_fault()


def _suffer(
    strikes: Sequence[Strike], scene: Scene, run: RunStore, expected: Sequence[Any]
) -> list[dict[str, Any]]:
    log = scene.folder / "log.txt"

    def begin() -> subprocess.Popen[bytes]:
        started = start(scene.experiment, scene.storage, log, scene.orders)
        scene.driver = started.pid
        return started

    began = time.monotonic()
    driver = begin()
    starts, outcome = 1, "hung"
    while time.monotonic() - began < HANG_SECONDS:
        there = marks_so_far(run) if run.exists(JOURNAL) else -1
        for strike in strikes:
            if strike.at is None:
                continue
            if strike.recovery_seconds is None and there > strike.marks:
                strike.recovery_seconds = time.monotonic() - strike.at
        due = [strike for strike in strikes if strike.at is None and there >= strike.mark]
        if due and scene.heal is None:  # what lasts is over before the next one
            time.sleep(due[0].delay)
            if due[0].fault.strike(scene):
                due[0].at, due[0].marks, due[0].starts = (
                    time.monotonic(),
                    marks_so_far(run),
                    starts,
                )
        code = driver.poll()
        if scene.heal is not None and (code is not None or time.monotonic() > scene.heal_at):
            scene.end_fault()
        if code is None:
            time.sleep(0.02 if scene.proxy is None else 0.5)
            continue
        if code == 0 and run.exists(RESULTS):
            outcome = "ended"
            break
        starts += 1
        if starts > 3 + len(strikes):
            outcome = "does not go on"
            break
        driver = begin()
    left = [p.title[:60] for p in processes_below(driver.pid)]
    if driver.poll() is None:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    found = trials_of(run) if run.exists(RESULTS) else []
    numbers = [row[0] for row in found]
    if any(strike.fault.is_of_a_trial for strike in strikes):
        lost = sum(row[0] not in numbers for row in expected)
    else:
        lost = sum(row not in found for row in expected)
    search = {
        "lost": lost,
        "doubled": doubled_in(run) + len(numbers) - len(set(numbers)),
        "rescored": bool(found) and run_verification(run.location).ok,
        "left_behind": left,
        "seconds": time.monotonic() - began,
        "date": datetime.now(UTC).date().isoformat(),
        "search": " + ".join(f"{strike.fault.name} {strike.seed}" for strike in strikes),
    }
    struck = sorted((s for s in strikes if s.at is not None), key=lambda s: s.at or 0.0)
    starts_behind = [strike.starts for strike in struck[1:]] + [starts]
    rows = []
    for strike in strikes:
        end = outcome
        if outcome == "ended":
            # What ended a driver is the fault that struck last before.
            ended = strike in struck and starts_behind[struck.index(strike)] > strike.starts
            end = "resumed" if ended else "survived"
        rows.append(
            {
                "fault": strike.fault.name,
                "seed": strike.seed,
                "struck": strike.at is not None,
                "at_mark": strike.mark,
                "outcome": end,
                "starts": starts,
                "recovery_seconds": strike.recovery_seconds,
                **search,
            }
        )
    return rows


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
    parser.add_argument(
        "--per-search", type=int, default=1, metavar="N", help="faults that strike one search"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="of a trial; each has its own folder"
    )
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.name in options.faults]
    options.folder.mkdir(parents=True, exist_ok=True)
    experiment = options.folder / "experiment.yaml"
    if not experiment.exists():
        write_experiment(options.folder, resources={"workers_per_trial": options.workers})
    calm = options.folder / "calm"
    if not (calm / NAME / RESULTS).exists():
        code = start(experiment, calm, options.folder / "calm.log").wait()
        if code != 0:
            raise SystemExit(f"the undisturbed search ended with {code}: {options.folder}/calm.log")
    undisturbed = RunStore(str(calm), NAME)
    expected, marks = trials_of(undisturbed), marks_so_far(undisturbed)
    rows = finished(options.out)
    done = {(r["fault"], r["seed"]) for r in rows if r.get("workers", 2) == options.workers}
    wanted = [(chosen[i % len(chosen)], i // len(chosen)) for i in range(options.n)]
    strikes = [drawn(f, seed, marks) for f, seed in wanted if (f.name, seed) not in done]
    for together in in_one_search(strikes, options.per_search):
        folder = options.folder / "now"
        new = [
            {**row, "workers": options.workers}
            for row in suffer(together, experiment, folder, expected)
        ]
        rows += new
        for row in new:
            append(options.out, row)
            print(json.dumps(row), flush=True)
        if not all(is_flawless(row) for row in new):
            folder.rename(options.folder / f"flawed-{new[0]['search'].replace(' ', '-')}")
    print(table(rows))
    sys.exit(0 if all(is_flawless(row) for row in rows) else 1)


if __name__ == "__main__":
    main()
