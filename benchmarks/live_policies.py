"""The default search beside random search without pruning: real searches, a fixed wall budget.

Both get the same slots, data, default space and seeds, and the same minutes; what counts is the
best validation score that a search ends with.  Random search draws from the default space without
its priors and without the default recipe.  Each search has a Ray and a cache of its own, so that
none finds outputs of frozen layers that another one has made.  Runs leave folders below --storage,
and runs that are finished there are not repeated.

--data names a folder of `<name>-train.parquet` and `-validation` files.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.stats

from benchmarks.against_trainer import CASES
from benchmarks.real_data import experiment
from sft_ray.recipes import SMALL_LAYER_PARAMETERS, recipe_of
from sft_ray.run_store import RESULTS
from sft_ray.space import default_space

DATASETS = ("trec", "mrpc")
NUM_LAYERS = 6
RANDOM: dict[str, Any] = {"sampler": "random", "pruner": "none", "default_recipe": False}
POLICIES: dict[str, dict[str, Any]] = {"default": {}, "random": RANDOM}


def space_without_priors() -> dict[str, Any]:
    space = default_space(NUM_LAYERS, recipe_of("bert", SMALL_LAYER_PARAMETERS - 1))
    for domain in space.values():
        domain.pop("prior", None)
    return space


def run_one(policy: str, dataset: str, seed: int, options: argparse.Namespace) -> None:
    from sft_ray.search.tuner import run_search

    case = next(case for case in CASES if case.name == dataset)
    search = {
        "objective": case.metric,
        "trials": 1000,
        "budget": {"wall_minutes": options.minutes},
        **POLICIES[policy],
    }
    if policy == "random":
        search["space"] = space_without_priors()
    found = experiment(
        case,
        options.data,
        options.storage,
        f"{dataset}-{policy}-{seed}",
        search=search,
        resources={"slots": options.slots, "workers_per_trial": 1, "cpus_per_worker": 1},
        seed=seed,
    )
    limit = found.data.limit.model_copy(update={"train": options.rows, "validation": options.rows})
    data = found.data.model_copy(update={"limit": limit, "test": None})
    run_search(found.model_copy(update={"data": data}))


def report(storage: Path, datasets: list[str]) -> str:
    lines = [
        "| data | policy | searches | trials begun | finished | best validation score (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for dataset in datasets:
        scores: dict[str, dict[str, float]] = {}
        for policy in POLICIES:
            trees = {
                path.parent.name.rpartition("-")[2]: json.loads(path.read_text())
                for path in sorted(storage.glob(f"{dataset}-{policy}-*/{RESULTS}"))
            }
            if len(trees) < 2:
                continue
            scores[policy] = {
                seed: tree["best"]["validation"][tree["metric"]] for seed, tree in trees.items()
            }
            states = [[t["state"] for t in tree["trials"]] for tree in trees.values()]
            begun = np.mean([len(found) for found in states])
            ended = np.mean([found.count("COMPLETE") for found in states])
            values = list(scores[policy].values())
            lines.append(
                f"| {dataset} | {policy} | {len(values)} | {begun:.1f} | {ended:.1f} | "
                f"{np.mean(values):.4f} ± {half_width(values):.4f} |"
            )
        if len(scores) == len(POLICIES):
            both = sorted(set(scores["default"]) & set(scores["random"]))
            apart = [scores["default"][seed] - scores["random"][seed] for seed in both]
            lines.append(
                f"| {dataset} | default - random, paired by seed | {len(both)} | | | "
                f"{np.mean(apart):+.4f} ± {half_width(apart):.4f} |"
            )
    return "\n".join(lines)


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of a mean."""
    error = scipy.stats.sem(values)
    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--datasets", nargs="*", default=list(DATASETS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=2.0, help="wall time of a search")
    parser.add_argument("--rows", type=int, default=400, help="of training and of validation")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args()
    if not options.report:
        for seed in range(options.repeats):
            for dataset in options.datasets:
                for policy in POLICIES:
                    with (
                        tempfile.TemporaryDirectory() as cache,
                        mock.patch.dict(os.environ, SFT_RAY_CACHE=cache),
                    ):
                        run_one(policy, dataset, seed, options)
    print(report(options.storage, options.datasets))


if __name__ == "__main__":
    main()
