"""Search policies replayed on recorded learning curves, on a simulated clock; no Ray, no training.

Every policy runs through `SearchStudy`: the same sampler, priors and rung pruner as a real search.
A suggestion takes the nearest recorded run that the repeat has not used yet, in the normalised
space; a mark takes the first recorded point at or after it and is charged for it, in epochs.  A
repeat stops at its first hit: a run that was trained to its end and belongs to the top 1 %.

A line of --curves is one run: learning_rate, train_batch_size, num_train_epochs, total_model_steps,
warmup_steps, cls_drop_out, and learning_curves {name: [[step, score], …]}, of which the first is
used; higher is better.  Pools of our own may hold frozen_layers and regularization too.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.config import Experiment
from sft_ray.search.study import PlannedTrial, SearchStudy, default_recipe

EPOCHS_AT_MOST = 150.0
REGRET_AT = (25, 50, 100, 200)
SLOTS = (1, 4, 16, 64)
HF_RANGE = [1e-6, 1e-4]  # of transformers' hyperparameter_search
WIDE_RANGE = [1e-6, 1e-3]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Recorded runs.

    Attributes:
        ends: smallest and largest value of each dimension.
        features: what is searched, normalised to 0..1 over the pool, [runs, dimensions].
        curves: of each run (share of its schedule, score) in order.
        final: last score of each run, [runs].
        epochs: length of each run, [runs].
    """

    ends: tuple[Floats, Floats]
    features: Floats
    curves: list[list[tuple[float, float]]]
    final: Floats
    epochs: Floats

    def top(self, share: float) -> frozenset[int]:
        """The best `share` of the runs."""
        count = max(1, round(share * len(self.final)))
        return frozenset(np.argsort(-self.final)[:count].tolist())


DIMENSIONS: dict[str, Callable[[dict[str, Any]], float]] = {
    "train.learning_rate": lambda run: math.log(run["learning_rate"]),
    "train.batch_size": lambda run: run["train_batch_size"],
    "train.epochs": lambda run: run["num_train_epochs"],
    "train.warmup": lambda run: run["warmup_steps"] / run["total_model_steps"],
    "train.dropout": lambda run: run["cls_drop_out"],
}


@functools.cache  # once per process, for all its repeats
def read_pool(path: Path) -> Pool:
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    raw = np.array([[read(run) for read in DIMENSIONS.values()] for run in runs], dtype=float)
    low, high = raw.min(axis=0), raw.max(axis=0)
    curves = []
    for run in runs:
        recorded = next(iter(run["learning_curves"].values()))
        curves.append([(step / run["total_model_steps"], score) for step, score in recorded])
    return Pool(
        ends=(low, high),
        features=(raw - low) / np.maximum(high - low, 1e-12),
        curves=curves,
        final=np.array([curve[-1][1] for curve in curves]),
        epochs=np.array([float(run["num_train_epochs"]) for run in runs]),
    )


@dataclass(frozen=True)
class Policy:
    """What differs from the default search.

    Attributes:
        learning_rate: range, and prior if there is one, as YAML would write it.
        absolute_rungs: epochs at which trials are compared instead of shares of the schedule.
    """

    learning_rate: dict[str, Any]
    sampler: str = "tpe"
    pruner: str = "successive_halving"
    absolute_rungs: tuple[float, ...] = ()
    default_recipe: bool = False
    epochs_prior: dict[str, float] | None = None


PRIOR = {"center": 2e-5, "spread": 3.0}
POLICIES = {
    "default": Policy(
        {"log_uniform": [1e-6, 4e-4], "prior": PRIOR},
        default_recipe=True,
        epochs_prior={"center": 3, "spread": 1.0},
    ),
    "no_epoch_prior": Policy({"log_uniform": [1e-6, 4e-4], "prior": PRIOR}, default_recipe=True),
    "no_prior": Policy({"log_uniform": [1e-6, 4e-4]}, default_recipe=True),
    "no_prior_no_recipe": Policy({"log_uniform": [1e-6, 4e-4]}),
    "random_hf": Policy({"log_uniform": HF_RANGE}, "random", "none"),
    "tpe_hf": Policy({"log_uniform": HF_RANGE}, "tpe", "none"),
    "random_rungs_hf": Policy({"log_uniform": HF_RANGE}, "random"),
    "tpe_rungs_hf": Policy({"log_uniform": HF_RANGE}),
    "random_wide": Policy({"log_uniform": WIDE_RANGE}, "random", "none"),
    "tpe_rungs_wide": Policy({"log_uniform": WIDE_RANGE}),
    "asha_hf": Policy(
        {"log_uniform": HF_RANGE}, "random", "successive_halving", absolute_rungs=(0.25, 1.0)
    ),
}


def experiment_of(policy: Policy, seed: int, low: Floats, high: Floats) -> Experiment:
    """The search as a user would write it, over the dimensions that were recorded."""
    names = list(DIMENSIONS)
    ends = {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
    epochs: dict[str, Any] = {"int": [int(v) for v in ends["train.epochs"]]}
    if policy.epochs_prior:
        epochs["prior"] = policy.epochs_prior
    space = {
        "train.learning_rate": policy.learning_rate,
        "train.batch_size": {"int": [int(v) for v in ends["train.batch_size"]]},
        "train.epochs": epochs,
        "train.warmup": {"uniform": [0.0, min(0.99, ends["train.warmup"][1])]},
        "train.dropout": {"uniform": [0.0, min(0.99, ends["train.dropout"][1])]},
    }
    return Experiment.from_tree(
        {
            "name": "replay",
            "model": "recorded",
            "data": {"path": "recorded"},
            "search": {
                "space": space,
                "trials": 100_000,
                "sampler": policy.sampler,
                "pruner": policy.pruner,
                "default_recipe": policy.default_recipe,
            },
            "seed": seed,
        }
    )


@dataclass
class Repeat:
    """One search until its first hit."""

    epochs_to_top1: float | None
    epochs_to_top5: float | None
    regret: dict[int, float]


def replay(policy: Policy, pool: Pool, slots: int, seed: int) -> Repeat:
    experiment = experiment_of(policy, seed, *pool.ends)
    study = SearchStudy(
        experiment,
        optuna.storages.InMemoryStorage(),
        recipe=default_recipe(184_000_000),
        direction="maximize",
    )
    top1, top5 = pool.top(0.01), pool.top(0.05)
    unused = np.ones(len(pool.final), dtype=bool)
    found1: float | None = None
    found5: float | None = None
    best_final = -np.inf
    regret: dict[int, float] = {}
    spent = 0.0
    rungs = [r / 100 for r in experiment.search.rungs]
    heap: list[tuple[float, int, int, int, float, int]] = []  # time, order, number, run, share, i
    order = 0

    def start(now: float) -> None:
        nonlocal order
        planned = study.next_trial()
        if planned is None or not unused.any():
            return
        run = nearest(planned, pool, unused)
        unused[run] = False
        push(now, planned.number, run, 0.0)

    def push(now: float, number: int, run: int, done: float) -> None:
        nonlocal order
        marks = marks_of(policy, rungs, pool.epochs[run], pool.curves[run])
        nxt = next((m for m in marks if m[1] > done + 1e-9), None)
        assert nxt is not None
        order += 1
        cost = (nxt[1] - done) * pool.epochs[run]
        heapq.heappush(heap, (now + cost, order, number, run, nxt[1], nxt[0]))

    for _ in range(slots):
        start(0.0)
    progress: dict[int, float] = {}
    while heap and spent < max(REGRET_AT):
        now, _, number, run, share, percent = heapq.heappop(heap)
        spent += (share - progress.get(number, 0.0)) * pool.epochs[run]
        progress[number] = share
        score = next(s for at, s in pool.curves[run] if at >= share - 1e-9)
        reason = study.mark(number, percent, score, 0.0)
        if percent >= 100:
            outcome = Outcome(score=score, score_percent=100, schedule_percent=100)
            study.finish(number, TrialState.COMPLETE, outcome)
            best_final = max(best_final, pool.final[run])
            if run in top5 and found5 is None:
                found5 = spent
            if run in top1 and found1 is None:
                found1 = spent
        elif reason is not None:
            study.finish(
                number, TrialState.PRUNED, Outcome(reason=reason, schedule_percent=percent)
            )
        else:
            push(now, number, run, share)
            continue
        for at in REGRET_AT:
            if spent <= at:
                regret[at] = 100 * (pool.final.max() - best_final)
        if found1 is not None or spent >= EPOCHS_AT_MOST:
            break
        start(now)
    return Repeat(found1, found5, regret)


def nearest(planned: PlannedTrial, pool: Pool, unused: npt.NDArray[np.bool_]) -> int:
    low, high = pool.ends
    train = planned.train
    wanted = np.array(
        [
            math.log(train.learning_rate),
            train.batch_size,
            train.epochs,
            train.warmup,
            train.dropout or 0.0,
        ]
    )
    wanted = (wanted - low) / np.maximum(high - low, 1e-12)
    distance = np.square(pool.features - wanted).sum(axis=1)
    distance[~unused] = np.inf
    return int(distance.argmin())


def marks_of(
    policy: Policy, rungs: list[float], epochs: float, curve: list[tuple[float, float]]
) -> list[tuple[int, float]]:
    """(percent as the study counts it, share that is charged) of rungs and the end.

    Absolute rungs are told to the study under the percents of its own rungs.
    """
    wanted = list(rungs)
    if policy.absolute_rungs:
        wanted = [at / epochs for at in policy.absolute_rungs]
    found = []
    for share, percent in zip(wanted, (10, 33), strict=True):
        recorded = next((at for at, _ in curve if at >= share - 1e-9), 1.0)
        if recorded < 1.0:
            found.append((percent, recorded))
    return [*found, (100, 1.0)]


def summarize(repeats: list[Repeat]) -> dict[str, Any]:
    """Restricted means: a repeat without a hit counts the epochs at which it was given up."""
    found = {}
    for name in ("top1", "top5"):
        epochs = np.array(
            [
                min(value, EPOCHS_AT_MOST) if value is not None else EPOCHS_AT_MOST
                for value in (getattr(r, f"epochs_to_{name}") for r in repeats)
            ]
        )
        hits = [getattr(r, f"epochs_to_{name}") is not None for r in repeats]
        found[name] = {
            "epochs": float(epochs.mean()),
            "interval": float(1.96 * epochs.std(ddof=1) / math.sqrt(len(epochs))),
            "success": float(np.mean(hits)),
        }
    return found


def run_job(job: tuple[str, int, int, str]) -> tuple[str, int, Repeat]:
    name, slots, seed, path = job
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return name, slots, replay(POLICIES[name], read_pool(Path(path)), slots, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--slots", type=int, nargs="*", default=list(SLOTS))
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jobs = [
        (name, slots, seed, str(options.curves))
        for name in options.policies
        for slots in options.slots
        for seed in range(options.repeats)
    ]
    with ProcessPoolExecutor(options.processes) as workers:
        done = list(workers.map(run_job, jobs, chunksize=4))
    found: dict[str, dict[str, Any]] = {}
    for name in options.policies:
        for slots in options.slots:
            repeats = [r for n, s, r in done if (n, s) == (name, slots)]
            found.setdefault(name, {})[str(slots)] = summarize(repeats)
    for by_slots in found.values():
        for slots_text, figures in by_slots.items():
            for goal in ("top1", "top5"):
                base = found.get("random_hf", {}).get(slots_text)
                if base:
                    figures[goal]["ratio"] = base[goal]["epochs"] / figures[goal]["epochs"]
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, by_slots in found.items():
        for slots_text, figures in by_slots.items():
            one, five = figures["top1"], figures["top5"]
            print(
                f"{name:18} {slots_text:>3} slots  top 1 %: {one['epochs']:6.1f} ± "
                f"{one['interval']:4.1f} epochs, success {one['success']:.2f}, ratio "
                f"{one.get('ratio', math.nan):.2f}   top 5 %: {five['epochs']:6.1f}, ratio "
                f"{five.get('ratio', math.nan):.2f}"
            )


if __name__ == "__main__":
    main()
