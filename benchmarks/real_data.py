"""What the training core and a search reach on real data with MiniLM, on a CPU.

`floors` trains a few written configurations per data set (`sft-ray train`), chooses by the
validation split, and scores the test split of the chosen one, once.  `search` runs a 16-trial
search over the default space and scores its winner the same way.  Both leave run folders below
--storage and go on from there when they are started again; `--report` prints what is there.

--data names a folder of `<name>-train.parquet`, `-validation` and `-test` files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.against_trainer import CASES, MODEL, Case
from sft_ray.config import Experiment
from sft_ray.run_store import RESULTS, TEST_ACCESS

FLOORS = {
    "sst2": 0.87,
    "trec": 0.94,
    "mrpc": 0.72,
    "stsb-en": 0.80,
    "wikiann": 0.65,
    "semeval8": 0.72,
    "xquad-en": 0.0,  # tiny: reported, not required
}
SEARCHED = ("trec", "stsb-en")
TRIALS = 16
# Learning rate and epochs; tried in this order, chosen by validation.
CONFIGURATIONS: dict[str, list[tuple[float, int]]] = {
    "sst2": [(1e-4, 2)],
    "trec": [(2e-4, 3)],
    "mrpc": [(2e-4, 4)],
    "stsb-en": [(2e-4, 3)],
    "wikiann": [(5e-4, 3)],
    "semeval8": [(2e-4, 3)],
    "xquad-en": [(3e-4, 4)],
}
# F1 over the relations that say something; the field reports accuracy too, which the floor is of.
FLOOR_METRIC = {"semeval8": "accuracy"}


def experiment(case: Case, folder: Path, storage: Path, name: str, **tree: Any) -> Experiment:
    return Experiment.from_tree(
        {
            "name": name,
            "model": MODEL,
            "task": case.task,
            "data": case.data(folder).model_dump(mode="json"),
            "storage": str(storage),
            **tree,
        }
    )


def run_floor(case: Case, folder: Path, storage: Path) -> None:
    from sft_ray.single_trial import run_training

    results = []
    for rate, epochs in CONFIGURATIONS[case.name]:
        name = f"{case.name}-{rate:g}-{epochs}"
        train = {"learning_rate": rate, "epochs": epochs, "precision": "fp32"}
        # A single configuration is judged at the ends of its epochs.
        found = experiment(
            case, folder, storage, name, train=train, search={"objective": case.metric, "rungs": []}
        )
        results.append(run_training(found))
    best = max(results, key=lambda result: float(result.best["validation"][case.metric]))
    score_test_once(Path(best.location))


def run_search_of(case: Case, folder: Path, storage: Path, limit: int | None, cpus: int) -> None:
    from sft_ray.search.tuner import run_search

    found = experiment(
        case,
        folder,
        storage,
        f"search-{case.name}",
        search={"objective": case.metric, "trials": TRIALS},
        resources={"workers_per_trial": 1, "cpus_per_worker": cpus, "slots": 1},
    )
    if limit is not None:
        data = found.data.model_copy(
            update={"limit": found.data.limit.model_copy(update={"train": limit})}
        )
        found = found.model_copy(update={"data": data})
    score_test_once(Path(run_search(found).location))


def score_test_once(run: Path) -> None:
    from sft_ray.serving.evaluate import run_evaluation

    if not (run / TEST_ACCESS).is_file():
        print(run_evaluation(str(run), "test"))


def report(storage: Path) -> str:
    lines = [
        "| data | run | settings | validation | test | floor |",
        "|---|---|---|---|---|---|",
    ]
    cases = {case.name: case for case in CASES}
    for run in sorted(path.parent for path in storage.glob(f"*/{RESULTS}")):
        if not (run / TEST_ACCESS).is_file():
            continue
        tree = json.loads((run / RESULTS).read_text())
        tested = json.loads((run / TEST_ACCESS).read_text().splitlines()[0])
        name = next(n for n in cases if n in run.name)
        metric = FLOOR_METRIC.get(name, cases[name].metric)
        params = tree["best"]["params"]
        settings = (
            f"lr {params['train.learning_rate']:.2g}, {params['train.epochs']} epochs, batch "
            f"{params['train.batch_size']}, frozen {params['train.frozen_layers']}"
        )
        kind = f"search of {len(tree['trials'])}" if run.name.startswith("search") else "single"
        lines.append(
            f"| {name} | {kind} | {settings} | {tree['best']['validation'][metric]:.4f} {metric} "
            f"| {tested['metrics'][metric]:.4f} (n {tested['num_examples']}) | {FLOORS[name]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["floors", "search"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of data sets; default: all")
    parser.add_argument("--limit", type=int, help="training rows of a search; default: all")
    parser.add_argument("--cpus", type=int, default=2, help="that the one slot of a search has")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args()
    chosen = options.only or (SEARCHED if options.what == "search" else list(FLOORS))
    for case in CASES:
        if case.name in chosen and not options.report:
            if options.what == "floors":
                run_floor(case, options.data, options.storage)
            else:
                run_search_of(case, options.data, options.storage, options.limit, options.cpus)
    print(report(options.storage))


if __name__ == "__main__":
    main()
