"""What a trial costs beside training and evaluation, and how the quickstart search ends.

Runs the quickstart search (2 workers per trial, MiniLM) in a folder of its own and prints
`overhead_seconds` of the second and later trials, over all and over COMPLETE ones (without what
frozen layers give, which is made once for many), the wall time from the call to the result, and
the winner's lead over the majority class; beside each the limit it must keep, as a ratio.  Appends
one JSON line per run to the file given with --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.startup import own_overhead
from sft_ray.config import Experiment
from sft_ray.search.tuner import run_search

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
LIMITS = {
    "overhead_median_all": 0.5,
    "overhead_median_complete": 0.5,
    "wall_seconds": 240.0,
}


def measure(overrides: list[str]) -> dict[str, Any]:
    """One quickstart search; the figures of its results.json that the table shows."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        experiment = Experiment.load(QUICKSTART, [f"storage={folder}", *overrides])
        result = run_search(experiment)
        wall_seconds = time.monotonic() - started
        tree = result.tree
        label_share = _majority_share(experiment)
    later = tree["trials"][1:]
    accuracy = tree["best"]["validation"]["accuracy"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "packages": tree["environment"]["packages"],
        "cpus": tree["environment"]["cpus"],
        "trials": len(tree["trials"]),
        "pruned_at_a_rung": sum((t["reason"] or "").startswith("rung") for t in tree["trials"]),
        "wall_seconds": wall_seconds,
        "startup_seconds": tree["startup_seconds"],
        "overhead_median_all": statistics.median(own_overhead(t) for t in later),
        "overhead_median_complete": statistics.median(
            own_overhead(t) for t in later if t["state"] == "COMPLETE"
        ),
        "overhead_max": max(own_overhead(t) for t in later),
        "share_of_slot_time_without_overhead": 1
        - sum(own_overhead(t) for t in tree["trials"])
        / sum(
            t["overhead_seconds"] + t["train_seconds"] + t["eval_seconds"] for t in tree["trials"]
        ),
        "accuracy": accuracy,
        "gain_over_default": tree["best"]["gain_over_default"],
        "points_over_majority": 100 * (accuracy - label_share),
    }


def _majority_share(experiment: Experiment) -> float:
    from sft_ray.search.preflight import prepare_experiment

    prepared = prepare_experiment(experiment)
    data = prepared.dataset
    scores = prepared.task.constant_scores(data.train, data.validation, data.label_set)
    return float(scores["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append a JSON line per run to this file")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="dotted.path=value for the experiment")
    arguments = parser.parse_args()
    for repeat in range(arguments.repeats):
        row = measure([*arguments.overrides, f"name=overhead-{repeat}"])
        print(json.dumps(row, indent=2))
        for name, limit in LIMITS.items():
            print(f"{name}: {row[name] / limit:.2f} of its limit of {limit:g} s")
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
