"""Search policies replayed on recorded learning curves, on a simulated clock; no Ray, no training.

Every policy runs through `SearchStudy`: the same sampler, priors and rung pruner as a real search.
A suggestion takes the nearest recorded run that the repeat has not used yet, in the normalised
space of what is searched: those dimensions of the default space that the recorded runs vary.
What else they vary is chance.  A mark takes the first recorded point at or after it and is
charged for it, in epochs.  A repeat stops at its first hit: a run that was trained to its end and
belongs to the top 1 %; what the other slots have trained by then is charged, too.  A repeat that
never hits counts as all epochs of the pool, and is told as missed.

A line of --curves is one run: learning_rate, train_batch_size (or 32), num_train_epochs (or 1),
total_model_steps, and learning_curves {name: [[step, score], …]}, of which the first is used, or
--curve NAME; higher is better.  frozen_layers and regularization {kind, strength} may be there too
(`record_curves.py`), and num_layers, model_type and layer_parameters (or num_parameters), from
which the default space and its priors follow; without them family and size in the file's name
count.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import optuna
from optuna.trial import TrialState
from scipy import stats

from sft_ray.analysis.outcome import Outcome
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.recipes import (
    BY_MODEL_TYPE,
    LARGE_LAYER_PARAMETERS,
    SMALL_LAYER_PARAMETERS,
    Recipe,
    default_recipe,
    recipe_of,
)
from sft_ray.search import samplers
from sft_ray.search.study import SearchStudy
from sft_ray.space import default_space

WITHIN_EPOCHS = 150.0  # of which success is told
REGRET_AT = (25, 50, 100, 200)
SLOTS = (1, 4, 16, 64)
HF_RANGE = [1e-6, 1e-4]  # of transformers' hyperparameter_search
WIDE_RANGE = [1e-6, 1e-3]
# Parameters of the layers, where the file says no more than its name.
SIZES = {
    **dict.fromkeys(("tiny", "mini", "small"), SMALL_LAYER_PARAMETERS - 1),
    "large": LARGE_LAYER_PARAMETERS,
}
BASE_SIZE = 85_000_000
FAMILIES = {**{name: name for name in BY_MODEL_TYPE}, "minilm": "bert"}
KIND_DISTANCE = 0.5  # between two kinds of regularisation, as a share of a dimension's range
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Recorded runs.

    Attributes:
        searched: paths of the default space that differ between runs.
        values: of the searched numbers, [runs, dimensions]; the learning rate as a logarithm.
        kinds: of regularisation, [runs], and the logarithm of the strength or 0.
        curves: of each run (share of its schedule, score) in order.
        final: last score of each run, [runs].
        epochs: length of each run, [runs].
    """

    searched: list[str]
    values: Floats
    kinds: list[str]
    strengths: Floats
    curves: list[list[tuple[float, float]]]
    final: Floats
    epochs: Floats
    recipe: Recipe
    layer_parameters: int
    num_layers: int

    @functools.cached_property
    def low(self) -> Floats:
        return np.asarray(self.values.min(axis=0))

    @functools.cached_property
    def extent(self) -> Floats:
        return np.asarray(np.maximum(np.ptp(self.values, axis=0), 1e-12))

    def top(self, share: float) -> frozenset[int]:
        """The best `share` of the runs."""
        count = max(1, round(share * len(self.final)))
        least = np.sort(self.final)[-count]  # of equal ones all
        return frozenset(np.flatnonzero(self.final >= least).tolist())

    def nearest(self, train: Mapping[str, Any], unused: npt.NDArray[np.bool_]) -> int:
        """The unused run that is closest to a configuration."""
        wanted = np.array([READ[path](train) for path in self.searched if path in READ])
        distance = np.square((self.values - wanted) / self.extent).sum(axis=1)
        if REGULARIZATION in self.searched:
            kind, strength = train["regularization"]["kind"], _strength(train)
            same = np.array([one == kind for one in self.kinds])
            scale = max(float(np.ptp(self.strengths[same])), 1e-12) if same.any() else 1.0
            apart = np.clip((self.strengths - strength) / scale, -1, 1)
            distance += np.where(same, np.square(apart), KIND_DISTANCE)
        distance[~unused] = np.inf
        return int(distance.argmin())


REGULARIZATION = "train.regularization"
READ: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "train.learning_rate": lambda train: math.log(train["learning_rate"]),
    "train.batch_size": lambda train: train["batch_size"],
    "train.epochs": lambda train: train["epochs"],
    "train.frozen_layers": lambda train: train["frozen_layers"],
}
COUNTS = ("train_batch_size", "num_train_epochs", "total_model_steps")  # may be left out


def _strength(train: Mapping[str, Any]) -> float:
    strength = train["regularization"].get("strength")
    return math.log(strength) if strength else 0.0


@functools.cache  # once per process, for all its repeats
def read_pool(path: Path, curve: str | None = None) -> Pool:
    """Recorded runs of a file; one without a score is left out.

    A run that was stopped keeps its last score to the end of its schedule, and a score that is no
    number counts as the worst of all.

    Args:
        curve: name of those to score by; None takes the first of each run.

    Raises:
        ConfigError: no file of such runs.
    """
    runs = _runs(path, curve)
    found = [_scores(run, curve) for run in runs]
    worst = min(score for scores in found for _, score in scores if math.isfinite(score))
    depths = [_recorded(run, "frozen_layers", 0) for run in runs]
    counted = [_recorded(run, "num_layers", 0) for run in runs] + [n for n in depths if n != "all"]
    num_layers = max(map(int, counted))
    trains = [
        {
            "learning_rate": run["learning_rate"],
            "batch_size": _recorded(run, "train_batch_size", 32),
            "epochs": _recorded(run, "num_train_epochs", 1),
            "frozen_layers": num_layers if depth == "all" else depth,
            "regularization": _recorded(run, "regularization", {"kind": "none"}),
        }
        for run, depth in zip(runs, depths, strict=True)
    ]
    name = path.stem.lower()
    families = [model_type for known, model_type in FAMILIES.items() if known in name]
    model_type = _recorded(runs[0], "model_type", max(families, key=len, default=""))
    size = next((size for word, size in SIZES.items() if word in name), BASE_SIZE)
    num_parameters = _recorded(runs[0], "num_parameters", size)
    layer_parameters = _recorded(runs[0], "layer_parameters", num_parameters)
    recipe = recipe_of(model_type, layer_parameters)
    searched = [
        f"train.{name}"
        for name in trains[0]
        if len({json.dumps(train[name], sort_keys=True) for train in trains}) > 1
    ]
    branches = default_space(num_layers, recipe)[REGULARIZATION]["one_of"]
    kinds = {train["regularization"]["kind"] for train in trains}
    if not any(branch["kind"] in kinds for branch in branches):
        searched = [path for path in searched if path != REGULARIZATION]
    regularized = REGULARIZATION in searched
    curves = [
        _curve(scores, run.get("total_model_steps"), worst)
        for scores, run in zip(found, runs, strict=True)
    ]
    return Pool(
        searched=searched,
        values=np.array([[READ[p](t) for p in searched if p in READ] for t in trains], dtype=float),
        kinds=[t["regularization"]["kind"] if regularized else "" for t in trains],
        strengths=np.array([_strength(t) if regularized else 0.0 for t in trains]),
        curves=curves,
        final=np.array([curve[-1][1] for curve in curves]),
        epochs=np.array([float(train["epochs"]) for train in trains]),
        recipe=recipe,
        layer_parameters=layer_parameters,
        num_layers=num_layers,
    )


def _runs(path: Path, curve: str | None) -> list[dict[str, Any]]:
    """Those with a score."""
    runs = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                run = json.loads(line)
                if problem := _problem(run):
                    raise ConfigError(f"{path}, line {number}: a run needs {problem}")
                curves = list(run["learning_curves"])
                if curve is not None and curve not in curves:
                    there = " or ".join(curves) or "none"
                    raise ConfigError(f"{path}, line {number}: no curve {curve}, choose {there}")
                runs.append(run)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no file of recorded runs: {error}") from None
    runs = [run for run in runs if any(math.isfinite(score) for _, score in _scores(run, curve))]
    if not runs:
        raise ConfigError(f"{path}: no run with a score")
    return runs


def _problem(run: Any) -> str | None:
    """What a line lacks to be a run."""
    if not isinstance(run, dict):
        return f"names and values, got {run!r}"
    for name in ("learning_rate", *COUNTS):
        value: Any = run.get(name)
        if not (_is_number(value) and value > 0) and (value is not None or name not in COUNTS):
            return f"{name}, a number above 0, got {value!r}"
    curves = run.get("learning_curves")
    if not isinstance(curves, dict):
        return f"learning_curves {{name: [[step, score], …]}}, got {curves!r}"
    for name, curve in curves.items():
        if not isinstance(curve, list) or not all(map(_is_point, curve)):
            return f"[step, score] pairs of numbers in learning_curves.{name}"
        no_steps = run.get("total_model_steps") is None and max([0, *(s for s, _ in curve)]) <= 0
        if curve and no_steps:
            return f"total_model_steps, or a step above 0 in learning_curves.{name}"
    return None


def _is_point(pair: Any) -> bool:
    is_pair = isinstance(pair, list) and len(pair) == 2 and _is_number(pair[0])
    return is_pair and (pair[1] is None or _is_number(pair[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _recorded(run: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """What a run says; null says nothing."""
    found = run.get(name)
    return otherwise if found is None else found


def _scores(run: Mapping[str, Any], name: str | None) -> list[tuple[float, float]]:
    """(step, score) of a run's curve of this name, or of its first, in order."""
    curves: dict[str, list[tuple[float, float | None]]] = run["learning_curves"]
    curve = next(iter(curves.values()), []) if name is None else curves[name]
    return sorted((step, math.nan if score is None else score) for step, score in curve)


def _curve(
    found: list[tuple[float, float]], total_steps: float | None, worst: float
) -> list[tuple[float, float]]:
    """(share of the schedule, score), with one at its end."""
    steps = total_steps or found[-1][0]
    curve = [(step / steps, score if math.isfinite(score) else worst) for step, score in found]
    return curve if curve[-1][0] >= 1 else [*curve, (1.0, curve[-1][1])]


@dataclass(frozen=True)
class Policy:
    """What differs from the default search.

    Attributes:
        learning_rates: range; None takes that of the default space.
        priors: those of the default space.
        search: other keys of the experiment's `search`.
        absolute_rungs: epochs at which trials are compared, instead of shares of the schedule.
        good_share: of the trials that TPE takes as good.
    """

    learning_rates: list[float] | None = None
    priors: bool = True
    search: dict[str, Any] = field(default_factory=dict)
    absolute_rungs: tuple[float, ...] = ()
    good_share: float | None = None


PLAIN = {"default_recipe": False}
EARLY = {"rungs": [10, 33], "reduction_factor": 3}
NO_PRUNER = {**PLAIN, "pruner": "none"}
POLICIES = {
    "default": Policy(),
    "no_recipe": Policy(search=PLAIN),
    "no_prior": Policy(priors=False),
    "no_rungs": Policy(search={"pruner": "none"}),
    "optunas_tenth": Policy(good_share=0.1),
    "early_rungs": Policy(search=EARLY),
    "rungs_33_66": Policy(search={"rungs": [33, 66]}),
    "reduction_3": Policy(search={"reduction_factor": 3}),
    # In the default space, nothing else, and with one of the ingredients.
    "random": Policy(None, False, {**NO_PRUNER, "sampler": "random"}),
    "random_recipe": Policy(None, False, {"pruner": "none", "sampler": "random"}),
    "random_prior": Policy(search={**NO_PRUNER, "sampler": "random"}),
    "random_rungs": Policy(None, False, {**PLAIN, "sampler": "random"}),
    "tpe": Policy(None, False, NO_PRUNER),
    "tpe_tenth": Policy(None, False, NO_PRUNER, good_share=0.1),
    "random_hf": Policy(HF_RANGE, False, {**NO_PRUNER, "sampler": "random"}),
    "random_rungs_hf": Policy(HF_RANGE, False, {**PLAIN, "sampler": "random"}),
    "tpe_hf": Policy(HF_RANGE, False, NO_PRUNER),
    "tpe_rungs_hf": Policy(HF_RANGE, False, PLAIN),
    "tpe_rungs_wide": Policy(WIDE_RANGE, False, PLAIN),
    # In place of the default's sampler or pruner.
    "gp": Policy(search={"sampler": "gp"}),
    "qmc": Policy(search={"sampler": "qmc"}),
    "median": Policy(search={"pruner": "median"}),
    "hyperband": Policy(search={"pruner": "hyperband", "rungs": [10, 20, 40, 80]}),
    "patient": Policy(search={"pruner": "patient", "rungs": [10, 20, 33]}),
    "asha_hf": Policy(
        HF_RANGE, False, {**PLAIN, **EARLY, "sampler": "random"}, absolute_rungs=(0.25, 1.0)
    ),
}
SLOW = ("gp",)  # which fits a model for every draw: by name only
# The others with one slot.
EVERY_SLOTS = ("default", "random_hf", "tpe_hf", "tpe_rungs_hf", "asha_hf")


def space_of(policy: Policy, pool: Pool) -> dict[str, Any]:
    """The default space as far as it was recorded, with the recorded ends."""
    space = {
        path: domain
        for path, domain in default_space(pool.num_layers, pool.recipe).items()
        if path in pool.searched
    }
    columns = [path for path in pool.searched if path in READ]
    for path in ("train.batch_size", "train.epochs"):
        if path in space:
            found = sorted(set(pool.values[:, columns.index(path)].astype(int).tolist()))
            few = path == "train.batch_size" and len(found) <= 8
            space[path] = {"choice": found} if few else {"int": [found[0], found[-1]]}
    if "train.learning_rate" in space:
        rate = space["train.learning_rate"]
        if policy.learning_rates is not None:
            rate["log_uniform"] = policy.learning_rates
        if not policy.priors:
            rate.pop("prior", None)
    if REGULARIZATION in space:
        kinds = set(pool.kinds)
        branches = space[REGULARIZATION]["one_of"]
        space[REGULARIZATION] = {"one_of": [b for b in branches if b["kind"] in kinds]}
    return space


def experiment_of(policy: Policy, pool: Pool, seed: int) -> Experiment:
    """The search as a user would write it."""
    return Experiment.from_tree(
        {
            "name": "replay",
            "model": "recorded",
            "data": {"path": "recorded"},
            "search": {"space": space_of(policy, pool), "trials": 100_000, **policy.search},
            "seed": seed,
        }
    )


@dataclass
class Repeat:
    """One search until its first hit.

    Attributes:
        top1, top5: epochs that were spent until then, by all slots; None if it never came.
        regret: points below the best run, by epochs spent.
    """

    top1: float | None
    top5: float | None
    regret: dict[int, float]


@dataclass(frozen=True)
class Running:
    """One trial on one slot."""

    number: int
    run: int
    marks: list[tuple[int, float]]  # those to come: percent, share of the schedule
    done: float  # share


def replay(policy: Policy, pool: Pool, slots: int, seed: int) -> Repeat:
    experiment = experiment_of(policy, pool, seed)
    study = SearchStudy(
        experiment,
        optuna.storages.InMemoryStorage(),
        recipe=default_recipe(pool.layer_parameters),
        num_layers=max(1, pool.num_layers),
        direction="maximize",
    )
    top1, top5 = pool.top(0.01), pool.top(0.05)
    unused = np.ones(len(pool.final), dtype=bool)
    hits: dict[str, float] = {}
    best, spent = -np.inf, 0.0
    best_after: list[tuple[float, float]] = []
    queue: list[tuple[float, int, Running]] = []  # when the next mark is reached, tie-break

    def push(now: float, trial: Running) -> None:
        cost = (trial.marks[0][1] - trial.done) * pool.epochs[trial.run]
        heapq.heappush(queue, (now + cost, trial.number, trial))

    def start(now: float) -> None:
        planned = study.next_trial() if unused.any() else None
        if planned is not None:
            run = pool.nearest(planned.train.model_dump(), unused)
            unused[run] = False
            marks = marks_of(policy, experiment.search.rungs, pool.epochs[run], pool.curves[run])
            push(now, Running(planned.number, run, marks, 0.0))

    def under_way(now: float) -> float:
        """Epochs that running trials have trained behind their last marks."""
        done = [
            (trial.marks[0][1] - trial.done) * pool.epochs[trial.run] - (at - now)
            for at, _, trial in queue
        ]
        return float(sum(done))

    for _ in range(slots):
        start(0.0)
    while queue and "top1" not in hits:
        now, _, trial = heapq.heappop(queue)
        (percent, share), number, run = trial.marks[0], trial.number, trial.run
        spent += (share - trial.done) * pool.epochs[run]
        score = next(s for at, s in pool.curves[run] if at >= share - 1e-9)
        reason = study.mark(number, percent, score, 0.0)
        if percent >= 100:
            study.finish(number, TrialState.COMPLETE, Outcome(score=score, schedule_percent=100))
            best = max(best, score)
            charged = spent + under_way(now)
            best_after.append((charged, best))
            for name, top in (("top5", top5), ("top1", top1)):
                if run in top:
                    hits.setdefault(name, charged)
        elif reason is not None:
            end = Outcome(reason=reason, score=score, schedule_percent=percent)
            study.finish(number, TrialState.PRUNED, end)
        else:
            push(now, Running(number, run, trial.marks[1:], share))
            continue
        start(now)
    worst = float(pool.final.min())
    scale = 1 if pool.final.max() > 1 else 100  # points per score
    regret = {
        at: scale * (pool.final.max() - max([b for e, b in best_after if e <= at], default=worst))
        for at in REGRET_AT
    }
    return Repeat(hits.get("top1"), hits.get("top5"), regret)


def marks_of(
    policy: Policy, rungs: list[int], epochs: float, curve: list[tuple[float, float]]
) -> list[tuple[int, float]]:
    """(percent as the study counts it, share that is charged) of rungs and the end.

    Absolute rungs are told to the study under the percents of its own rungs.
    """
    wanted = [rung / 100 for rung in rungs]
    if policy.absolute_rungs:
        wanted = [at / epochs for at in policy.absolute_rungs]
    found: list[tuple[int, float]] = []
    for share, percent in zip(wanted, rungs, strict=True):
        recorded = next((at for at, _ in curve if at >= share - 1e-9), 1.0)
        if recorded < 1.0:
            found.append((percent, recorded))
    return [*found, (100, 1.0)]


def summarize(repeats: list[Repeat], all_epochs: float) -> dict[str, Any]:
    """Means over repeats with the half width of their 95 % interval.

    Args:
        all_epochs: of the pool; what a repeat counts as that never hit.
    """
    found: dict[str, Any] = {}
    for name in ("top1", "top5"):
        hits = [getattr(repeat, name) for repeat in repeats]
        epochs = epochs_of(hits, all_epochs)
        success = np.array([hit is not None and hit <= WITHIN_EPOCHS for hit in hits], dtype=float)
        found[name] = {
            "epochs": float(epochs.mean()),
            "interval": half_width(epochs),
            "success": float(success.mean()),
            "success_interval": half_width(success),
            "missed": hits.count(None),
        }
    for at in REGRET_AT:
        regret = np.array([repeat.regret[at] for repeat in repeats])
        found.setdefault("regret", {})[str(at)] = {
            "points": float(regret.mean()),
            "interval": half_width(regret),
        }
    return found


def epochs_of(hits: list[float | None], all_epochs: float) -> Floats:
    return np.array([all_epochs if hit is None else hit for hit in hits])


def half_width(values: Floats) -> float:
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def ratio_of(base: Mapping[str, float], one: Mapping[str, float]) -> dict[str, float]:
    """How many times fewer epochs, and the half width of its interval (delta method)."""
    ratio = base["epochs"] / one["epochs"]
    parts = [figures["interval"] / figures["epochs"] for figures in (base, one)]
    return {"ratio": ratio, "ratio_interval": 0.0 if base is one else ratio * math.hypot(*parts)}


def without_nan(tree: Any) -> Any:
    """An interval of one repeat is no number, which JSON has no word for but null."""
    if isinstance(tree, dict):
        return {name: without_nan(value) for name, value in tree.items()}
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def run_job(job: tuple[str, int, int, Path, str | None]) -> Repeat:
    name, slots, seed, path, curve = job
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    policy, share = POLICIES[name], POLICIES[name].good_share
    if share is None:
        return replay(policy, read_pool(path, curve), slots, seed)
    with mock.patch.object(samplers, "num_good", lambda trials: math.ceil(share * trials)):
        return replay(policy, read_pool(path, curve), slots, seed)


def print_paired(options: argparse.Namespace) -> None:
    """Epochs to the top 1 % minus those of the default on the same seeds, a line per policy."""
    recorded = (options.curves, options.curve)
    all_epochs = float(read_pool(*recorded).epochs.sum())
    with ProcessPoolExecutor(options.processes) as workers:
        for slots in options.slots:
            epochs = {}
            for name in ("default", *options.paired):
                jobs = [(name, slots, seed, *recorded) for seed in range(options.repeats)]
                hits = [repeat.top1 for repeat in workers.map(run_job, jobs, chunksize=4)]
                epochs[name] = epochs_of(hits, all_epochs)
            for name in options.paired:
                apart = epochs[name] - epochs["default"]
                print(
                    f"{name:16} {slots:>2} slots  top 1 %: {apart.mean():+.1f} ± "
                    f"{half_width(apart):.1f} of {epochs['default'].mean():.1f} epochs",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--curve", metavar="NAME", help="to score by, instead of the first one")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--slots", type=int, nargs="+", default=list(SLOTS))
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=list(POLICIES),
        help="%(default)s",
        default=[name for name in POLICIES if name not in SLOW],
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--paired",
        nargs="+",
        choices=list(POLICIES),
        metavar="POLICY",
        help="only how far these are from the default on the same seeds, with a 95 %% interval",
    )
    options = parser.parse_args()
    recorded = (options.curves, options.curve)
    try:
        all_epochs = float(read_pool(*recorded).epochs.sum())
    except ConfigError as error:
        parser.error(str(error))
    if options.paired and options.json:
        parser.error("--paired prints a line per policy; leave --json out")
    if options.paired:
        print_paired(options)
        return
    cells = [
        (name, slots)
        for name in dict.fromkeys(["random_hf", *options.policies])
        for slots in options.slots
        if slots == min(options.slots) or name in EVERY_SLOTS
    ]
    jobs = [(*cell, seed, *recorded) for cell in cells for seed in range(options.repeats)]
    found: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(options.processes) as workers:
        repeats = workers.map(run_job, jobs, chunksize=4)
        for name, slots in cells:
            mine = [next(repeats) for _ in range(options.repeats)]
            figures = summarize(mine, all_epochs)
            base = found.get("random_hf", {}).get(str(slots), figures)
            for goal in ("top1", "top5"):
                figures[goal] |= ratio_of(base[goal], figures[goal])
            found.setdefault(name, {})[str(slots)] = figures
            line = line_of(name, slots, figures)
            print(line, file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps(without_nan(found), indent=2, allow_nan=False))


def line_of(name: str, slots: int, figures: dict[str, Any]) -> str:
    goals = (
        f"top {share} %: {goal['epochs']:6.1f} ± {goal['interval']:4.1f} epochs, "
        f"missed {goal['missed']}, success {goal['success']:.2f} ± {goal['success_interval']:.2f}, "
        f"ratio {goal['ratio']:.2f} ± {goal['ratio_interval']:.2f}"
        for share, goal in (("1", figures["top1"]), ("5", figures["top5"]))
    )
    regret = ", ".join(
        f"{at}: {r['points']:.2f} ± {r['interval']:.2f}" for at, r in figures["regret"].items()
    )
    return f"{name:16} {slots:>2} slots  {'  '.join(goals)}  regret {regret}"


if __name__ == "__main__":
    main()
