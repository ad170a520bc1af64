"""Record the learning curves of random configurations, for `search_policies.py` to replay.

Trains every configuration to its end, in single-thread processes, on the data and the model
of an experiment (the quickstart's, made smaller, unless another is given).  All five dimensions
of the default space are drawn, the learning rate over a range wide enough to fail at both ends.

A line of --out is one run: iteration, model_type, num_parameters, layer_parameters, learning_rate,
train_batch_size, num_train_epochs, total_model_steps, warmup_steps, frozen_layers,
regularization, trained_parameters, and learning_curves {metric: [[step, score], …]}.  A
configuration that diverges keeps the score of always answering the same.  Lines that are there
already are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import append, finished
from sft_ray.config import Experiment, Train, apply_values
from sft_ray.space import DEFAULT_STRENGTH, Choice, Numeric, draw, parse_space
from sft_ray.training.preparation import Prepared, prepare_training
from sft_ray.training.seeds import derived_seed
from sft_ray.training.setup import Setup, load_setup

LEARNING_RATES = [1.0e-6, 3.0e-3]
PERCENTS = [10, 20, 33, 50]  # beside the ends of epochs
OVERRIDES = ["data.limit.train=480", "data.limit.validation=300"]
loaded: dict[str, tuple[Prepared, Setup]] = {}  # of this process


def configuration(base: Train, num_layers: int, seed: int, iteration: int) -> Train:
    """A random configuration; it depends on nothing but its arguments."""
    rng = np.random.default_rng(derived_seed(seed, "record", iteration))
    kinds = [{"kind": "none"}, *({"kind": k, "strength": r} for k, r in DEFAULT_STRENGTH.items())]
    space = parse_space(
        {
            "train.learning_rate": {"log_uniform": LEARNING_RATES},
            "train.batch_size": {"choice": [16, 32, 64]},
            "train.epochs": {"int": [1, 4]},
            "train.regularization": {"one_of": kinds},
            "train.frozen_layers": {"int": [0, num_layers]},
        }
    )

    def uniform(name: str, domain: Numeric | Choice) -> Any:
        if isinstance(domain, Choice):
            return domain.options[int(rng.integers(len(domain.options)))]
        if domain.integer:
            return int(rng.integers(int(domain.low), int(domain.high) + 1))
        low, high = np.log([domain.low, domain.high]) if domain.log else (domain.low, domain.high)
        value = float(rng.uniform(low, high))
        return float(np.exp(value)) if domain.log else value

    return apply_values(base, draw(space, uniform))


def record(iteration: int, tree: dict[str, Any]) -> dict[str, Any]:
    """Train one configuration to its end."""
    import torch

    from sft_ray.training.fitting import fit
    from sft_ray.training.progress import Progress
    from sft_ray.training.world import World

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    experiment = Experiment.from_tree(tree)
    key = json.dumps(tree, sort_keys=True)
    if key not in loaded:
        prepared = prepare_training(experiment)
        loaded[key] = prepared, load_setup(experiment, prepared.dataset_folder, World())
    prepared, setup = loaded[key]
    metric = prepared.objective
    train = configuration(experiment.train, prepared.model.num_layers, experiment.seed, iteration)
    curve: list[tuple[int, float]] = []
    last: list[Progress] = []

    def report(progress: Progress) -> bool:
        last[:] = [progress]
        if not progress.fault and (not curve or curve[-1][0] < progress.step):
            curve.append((progress.step, progress.metrics[metric]))
        return True

    fit(
        train,
        setup,
        objective=metric,
        rungs=PERCENTS,
        seed=experiment.seed,
        report=report,
    )
    end = last[-1]
    if end.fault:
        data = setup.dataset
        scores = setup.task.constant_scores(data.train, data.validation, data.label_set)
        curve.append((end.num_steps, scores.get(metric, 0.0)))
    return {
        "iteration": iteration,
        "model_type": prepared.model.model_type,
        "num_parameters": prepared.model.num_parameters,
        "layer_parameters": prepared.model.layer_parameters,
        "learning_rate": train.learning_rate,
        "train_batch_size": train.batch_size,
        "num_train_epochs": train.epochs,
        "total_model_steps": end.num_steps,
        "warmup_steps": round(train.warmup * end.num_steps),
        "frozen_layers": train.frozen_layers,
        "regularization": train.regularization.model_dump(exclude_none=True),
        "trained_parameters": sum(p.numel() for p in setup.pretrained.trainable().values()),
        "learning_curves": {metric: [[step, round(score, 5)] for step, score in curve]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", type=Path, default=Path("experiments/quickstart.yaml"))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*", default=OVERRIDES, help="dotted.path=value")
    options = parser.parse_args()
    tree = Experiment.load(options.experiment, options.overrides).anchored().to_tree()
    tree["search"]["space"] = None
    prepared = prepare_training(Experiment.from_tree(tree))  # encoded once, before the processes
    if prepared.direction == "minimize":
        sys.exit(
            f"a replay takes higher scores as better, got {prepared.objective}; choose another"
        )
    done = {row["iteration"] for row in finished(options.out)}
    todo = [i for i in range(options.runs) if i not in done]
    with ProcessPoolExecutor(options.processes) as workers:
        for future in as_completed([workers.submit(record, i, tree) for i in todo]):
            append(options.out, future.result())
            print(f"iteration {future.result()['iteration']} recorded", flush=True)


if __name__ == "__main__":
    main()
