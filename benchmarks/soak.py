"""A long search under faults: does anything grow that should not?

Searches 300 trials of a tiny model over two slots, strikes a part of it every minute, and writes
down every five seconds what driver, slots, workers and Ray hold: memory, file descriptors, threads,
`/dev/shm` and the study's file, one JSON line each to --out.  A driver that a fault ends is started
again by the same command.  With --plot the samples become a picture, and a table with the slope of
every curve per 100 trials behind the first fifth of the trials.  Figures of several processes of a
kind are sums.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults import FAULTS, NAME, Process, Scene, processes_below, start, write_experiment
from sft_ray.run_store import JOURNAL, RESULTS

SAMPLE_SECONDS = 5.0
WARM_SHARE = 0.2  # of the trials: what is loaded once is loaded then
FLAT = 0.05  # of a curve's median, over 100 trials
# Those that leave the driver alive, so that its curves are of one process.
STRIKES = ("kill rank 0", "kill slot", "kill mailbox", "kill watch", "stop rank 1", "stop slot")
KINDS = {
    "workers": r"^ray::(RayTrainWorker|Worker\b)",
    "slots": r"^ray::(ResourceTrainable|Slot)",
    "mailboxes": r"^ray::(Mailbox|Watch)",
    "controllers": r"^ray::(TrainController|PlacementGroupCleaner)",
    "raylet": r"/raylet/raylet ",
    "gcs": r"/gcs_server ",
}
FIGURES = ("memory_bytes", "descriptors", "threads", "processes")


def held_by(pid: int) -> dict[str, int]:
    """Resident memory, open files and threads of a process; nothing if it has gone."""
    folder = Path("/proc") / str(pid)
    try:
        status = dict(
            line.split(":", 1)
            for line in (folder / "status").read_text().splitlines()
            if ":" in line
        )
        descriptors = len(os.listdir(folder / "fd"))  # noqa: PTH208  # counted, not walked
    except OSError:
        return {}
    return {
        "memory_bytes": int(status.get("VmRSS", "0 kB").split()[0]) * 1024,
        "descriptors": descriptors,
        "threads": int(status["Threads"]),
        "processes": 1,
    }


def summed(processes: list[Process]) -> dict[str, int]:
    held = [held_by(process.pid) for process in processes]
    return {name: sum(one.get(name, 0) for one in held) for name in FIGURES}


def sample(driver: int, run: Path, began: float, starts: int) -> dict[str, Any]:
    """Everything at one moment, flat: `driver.memory_bytes`, `journal_bytes`, …"""
    below = processes_below(driver)
    kinds = {"driver": [Process(driver, "")], "all": below}
    kinds |= {
        kind: [p for p in below if re.search(title, p.title)] for kind, title in KINDS.items()
    }
    journal = run / JOURNAL
    row: dict[str, Any] = {
        "seconds": time.monotonic() - began,
        "starts": starts,
        "trials": sum(1 for _ in run.glob("trials/*/trial.json")),
        "journal_bytes": journal.stat().st_size if journal.exists() else 0,
        "shm_bytes": shutil.disk_usage("/dev/shm").used,
    }
    for kind, processes in kinds.items():
        row |= {f"{kind}.{name}": value for name, value in summed(processes).items()}
    return row


def soak(options: argparse.Namespace) -> int:
    """Run the search to its end; the driver's last exit code."""
    options.folder.mkdir(parents=True, exist_ok=True)
    experiment = write_experiment(
        options.folder,
        search={"trials": options.trials},
        resources={"workers_per_trial": 1, "slots": 2},
    )
    storage, log = options.folder / "runs", options.folder / "log.txt"
    run, draw = storage / NAME, random.Random(options.seed)
    strikes = [fault for fault in FAULTS if fault.name in options.faults]
    began, starts = time.monotonic(), 1
    struck_at = sampled_at = began
    driver = start(experiment, storage, log)
    with options.out.open("a", encoding="utf-8") as out:
        while True:
            now, code = time.monotonic(), driver.poll()
            row: dict[str, Any] = {}
            if not any(run.glob("trials/*")):
                struck_at = now  # the first fault comes a minute behind the first mark
            if code is not None:
                if (run / RESULTS).exists() or starts > options.trials:
                    return code
                starts, driver = starts + 1, start(experiment, storage, log)
            if now - struck_at >= options.fault_seconds and strikes:
                struck_at, fault = now, draw.choice(strikes)
                scene = Scene(driver.pid, draw, experiment, str(storage), options.folder)
                row["fault"] = fault.name if fault.strike(scene) else None
            if row or now - sampled_at >= SAMPLE_SECONDS:
                sampled_at = now
                row |= sample(driver.pid, run, began, starts)
                out.write(json.dumps(row) + "\n")
                out.flush()
            if now - began > options.most_minutes * 60:
                os.kill(driver.pid, signal.SIGKILL)
                return 124
            time.sleep(0.2)


def slopes(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Curve -> its median and its least-squares slope per 100 trials, behind the warm-up."""
    most = max(row["trials"] for row in rows)
    later = [row for row in rows if row["trials"] >= WARM_SHARE * most]
    trials = np.array([row["trials"] for row in later], dtype=float)
    found = {}
    for name in rows[0]:
        if name in ("seconds", "starts", "trials", "fault") or len(set(trials)) < 3:
            continue
        values = np.array([row[name] for row in later], dtype=float)
        slope = float(np.polyfit(trials, values, 1)[0])
        found[name] = (float(np.median(values)), 100 * slope)
    return found


def statement(median: float, slope: float) -> str:
    if abs(slope) <= FLAT * max(median, 1.0):
        return "flat"
    return "grows" if slope > 0 else "shrinks"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | median | slope per 100 trials | |", "|---|---:|---:|---|"]
    for name, (median, slope) in slopes(rows).items():
        scale, unit = (2**20, " MiB") if name.endswith("bytes") else (1, "")
        lines.append(
            f"| {name} | {median / scale:.4g}{unit} | {slope / scale:+.3g}{unit} "
            f"| {statement(median, slope)} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory, descriptors, threads, and what lies in files, against trials."""
    from matplotlib.figure import Figure

    kinds = ("driver", "slots", "workers", "all")
    trials = [row["trials"] for row in rows]
    figure = Figure(figsize=(9, 6), layout="constrained")
    parts = figure.subplots(2, 2)
    for part, name, scale in zip(parts.flat, FIGURES[:3], (2**20, 1, 1), strict=False):
        for kind in kinds:
            part.plot(trials, [row[f"{kind}.{name}"] / scale for row in rows], label=kind, lw=1)
        part.set(title=name.replace("_bytes", ", MiB"), xlabel="trials ended", yscale="log")
    for name in ("journal_bytes", "shm_bytes"):
        parts[1, 1].plot(trials, [row[name] / 2**20 for row in rows], label=name[:-6], lw=1)
    parts[1, 1].set(title="files, MiB", xlabel="trials ended")
    for part in parts.flat:
        part.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="for the search; without it, only --plot")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--fault-seconds", type=float, default=60.0)
    parser.add_argument("--faults", nargs="*", choices=STRIKES, default=STRIKES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-minutes", type=float, default=600.0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    code = soak(options) if options.folder else 0
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    struck = [row["fault"] for row in rows if row.get("fault")]
    print(f"{rows[-1]['trials']} trials, {len(struck)} faults, {rows[-1]['starts']} starts")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
