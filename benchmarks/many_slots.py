"""Whether one driver keeps up with many slots: seconds of work in every simulated minute.

Every slot reports one mark a minute, at a second of its own.  The marks go through the code of a
search: Tune's searcher and scheduler, the conductor, the study with its journal on disk, the run
folder.  What is simulated is training and Ray; Tune's own loop is not in the figures.  A trial has
marks at 10, 33, 67 and 100 % and scores that depend on its configuration.  The journal is not
copied to storage here: on disk it is the run's own file.

Prints per number of slots what a minute takes the driver (60 s is all it has), the parts, the
longest single ask, and the size of the journal.  Appends one JSON line each to --out.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sft_ray.config import Experiment
from sft_ray.recipes import default_recipe
from sft_ray.run_store import RunStore
from sft_ray.screen import Screen
from sft_ray.search.conductor import Conductor
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.search.tune_run import TrialScheduler, TrialSearcher

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
MARKS = (10, 33, 67, 100)
NO_END = 100_000  # trials


class Slots:
    """A search whose slots are simulated."""

    def __init__(self, slots: int, folder: Path, overrides: list[str]) -> None:
        words = [f"search.trials={NO_END}", f"storage={folder}", *overrides]
        experiment = Experiment.load(QUICKSTART, words)
        store = RunStore(experiment.storage, experiment.name)
        self.study = SearchStudy(
            experiment,
            open_storage_in(store),
            recipe=default_recipe(22_000_000),
            num_layers=6,
            direction="maximize",
            slots=slots,
        )
        conductor = Conductor(self.study, store, Screen(quiet=True), "accuracy", slots)
        self.journal, self.conductor = store.journal, conductor
        self._searcher = TrialSearcher(conductor)
        healthy = SimpleNamespace(has_failures=False, succeeded=lambda where=(): None)
        self._scheduler = TrialScheduler(conductor, None, healthy)  # type: ignore[arg-type]
        self._random = random.Random(17)
        self._quality: dict[str, float] = {}
        self._asked = 0

    def ask(self) -> str:
        """A trial for a free slot, by Tune's id."""
        self._asked += 1
        tune_id = f"t{self._asked}"
        self._searcher.suggest(tune_id)
        train = self.conductor.planned[tune_id].train
        off = abs(math.log10(train.learning_rate) + 4) + 0.01 * train.batch_size / 16
        self._quality[tune_id] = 0.9 - 0.2 * off + self._random.gauss(0, 0.02)
        return tune_id

    def mark(self, tune_id: str, index: int) -> bool:
        """One mark of a trial; whether it goes on."""
        percent = MARKS[index]
        score = self._quality[tune_id] * (0.5 + percent / 200)
        message = {
            "index": index,
            "percent": percent,
            "metrics": {"accuracy": score},
            "train_loss": 1 - score,
            "epochs_run": 3 * percent / 100,
            "finished": percent == 100,
            "fault": None,
            "score": score,
            "score_percent": percent,
            "best_metrics": {"accuracy": score},
            "slot_seconds": 60.0 * (index + 1),
            "train_seconds": 55.0 * (index + 1),
            "eval_seconds": 4.0 * (index + 1),
        }
        trial: Any = SimpleNamespace(trial_id=tune_id)
        said = self._scheduler.on_trial_result(None, trial, {"message": json.dumps(message)})
        if said == TrialScheduler.CONTINUE:
            return True
        self._searcher.on_trial_complete(tune_id)
        return False


def open_storage_in(store: RunStore) -> Any:
    store.journal.parent.mkdir(parents=True, exist_ok=True)
    return open_storage(store.journal)


def measure(slots: int, minutes: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds of the driver by simulated minute, after all slots have begun."""
    with tempfile.TemporaryDirectory() as folder:
        search = Slots(slots, Path(folder), overrides)
        line = [(60 * i / slots, search.ask(), 0) for i in range(slots)]
        heapq.heapify(line)
        spent: dict[str, list[float]] = {k: [0.0] * minutes for k in ("ask", "mark", "end")}
        counts: dict[str, int] = defaultdict(int)
        longest, cpu, last_from = 0.0, time.process_time(), 0.0
        while line[0][0] < 60 * minutes:
            now, tune_id, index = heapq.heappop(line)
            minute = int(now // 60)
            if minute == minutes - 1 and not last_from:
                last_from = time.process_time()
            began = time.perf_counter()
            goes_on = search.mark(tune_id, index)
            kind = "mark" if goes_on else "end"
            spent[kind][minute] += time.perf_counter() - began
            counts[kind] += 1
            if not goes_on:
                began = time.perf_counter()
                tune_id, index = search.ask(), -1
                took = time.perf_counter() - began
                spent["ask"][minute] += took
                longest = max(longest, took)
                counts["ask"] += 1
                began = time.perf_counter()
                search.conductor.settle()  # as Tune's loop does, many times a minute
                spent["end"][minute] += time.perf_counter() - began
            heapq.heappush(line, (now + 60, tune_id, index + 1))
        ended = time.process_time()
        size = search.journal.stat().st_size
    per_minute = [sum(parts) for parts in zip(*spent.values(), strict=True)]
    return {
        "slots": slots,
        "minutes": minutes,
        "trials": counts["end"],
        "seconds_per_minute": sum(per_minute) / minutes,
        "cpu_seconds_per_minute": (ended - cpu) / minutes,
        "last_minute_seconds": per_minute[-1],
        "last_minute_cpu_seconds": ended - last_from,
        "longest_ask_seconds": longest,
        "milliseconds": {k: 1000 * sum(spent[k]) / max(counts[k], 1) for k in spent},
        "journal_megabytes": size / 1e6,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    for slots in given.slots:
        found = measure(slots, given.minutes, given.overrides)
        parts = ", ".join(f"{k} {v:.1f} ms" for k, v in found["milliseconds"].items())
        print(
            f"{slots} slots, {found['minutes']} minutes, {found['trials']} trials ended: "
            f"{found['seconds_per_minute']:.1f} s of 60 ({found['cpu_seconds_per_minute']:.1f} s "
            f"CPU), in the last minute {found['last_minute_seconds']:.1f} s "
            f"({found['last_minute_cpu_seconds']:.1f} s CPU); {parts}; longest ask "
            f"{found['longest_ask_seconds']:.2f} s; journal {found['journal_megabytes']:.1f} MB",
            flush=True,
        )
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
