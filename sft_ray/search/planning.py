"""What a search will cost, before it is spent: drawn configurations times a short measurement.

Nothing is written into the run folder, and nothing but a look at a cluster asks for Ray.
"""

from __future__ import annotations

import itertools
import math
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from sft_ray import space as spaces
from sft_ray.config import Experiment, Train, apply_values, explain
from sft_ray.errors import ConfigError, ResourceError
from sft_ray.recipes import YARDSTICK, default_recipe
from sft_ray.run_store import JOURNAL, RESULTS, RunStore, check_folder_rule
from sft_ray.screen import Screen, count, duration
from sft_ray.search.cluster import Layout, capacity, capacity_here, connected, plan_layout
from sft_ray.search.finite_space import FiniteSpace, key_of
from sft_ray.search.narration import budget, search_rules
from sft_ray.search.preflight import prepare_experiment
from sft_ray.search.proposals import first_trials, prior_draw
from sft_ray.search.warm_start import warm_configurations
from sft_ray.space import Choice, Numeric, Space
from sft_ray.training import batches
from sft_ray.training.examples import Examples
from sft_ray.training.fit import _Trial, evaluate, schedule_marks
from sft_ray.training.micro_batch import NothingFitsError
from sft_ray.training.preparation import Prepared, collect
from sft_ray.training.seeds import derived_seed
from sft_ray.training.setup import Setup, load_setup
from sft_ray.training.world import World, resolve_precision

DRAWS = 400  # configurations that stand for the sampled trials
STARTUP_SECONDS = 20.0  # assumed: Ray, processes, model and data, once per search
PROBE_SECONDS = 20.0
EVAL_SHARE = 0.2  # of the probe's time
FIRST_LOOK = 8  # examples of a first, cold measurement, which sizes the next one
MOST_PROBE_STEPS = 50  # per frozen depth: more do not tell more
LEAST_PROCESSOR_SHARE = 0.75  # below it, other programs are worth a note
LOW_LEARNING_RATE = 1e-8  # of the probe, which must not diverge
JOURNAL_BYTES_PER_TRIAL = 8_000
RESUME_STATE_MODELS = 4  # weights, two moments of Adam, best weights


class Spread(NamedTuple):
    """A count over the trials of a search."""

    least: int
    median: int
    most: int

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        return f"{self.least} to {self.most} (median {self.median})"


class Range(NamedTuple):
    """An expectation: as much as possible is pruned, and nothing is."""

    low: float
    high: float


@dataclass(frozen=True)
class Plan:
    """What a search will do and what that takes.

    Attributes:
        trials: that will run, unless a budget ends the search before.
        confirm_runs: unpruned runs on fresh seeds after the search.
        steps: optimiser steps of a trial that is not pruned.
        marks: evaluations of a trial that is not pruned.
        train_seconds_per_example: frozen layers -> seconds of one worker.
        eval_seconds_per_example: of one worker.
        worker_hours: slot time times the workers of a slot.
        wall_seconds: with `STARTUP_SECONDS`.
        dollars: None without a price.
        disk_bytes: most that lies in run folder and cache at once.
        notes: what is worth knowing, one sentence each.
    """

    trials: int
    confirm_runs: int
    slots: int
    workers_per_trial: int
    steps: Spread
    marks: Spread
    train_seconds_per_example: dict[int, float]
    eval_seconds_per_example: float
    worker_hours: Range
    wall_seconds: Range
    dollars: Range | None
    disk_bytes: int
    notes: list[str]


def run_plan(
    experiment: Experiment,
    *,
    address: str | None = None,
    price_per_hour: float | None = None,
    probe_seconds: float = PROBE_SECONDS,
    quiet: bool = False,
    source: str | None = None,
) -> Plan:
    """Say what a search of the experiment will do and take; starts neither it nor Ray.

    Args:
        experiment: what would be searched.
        address: of a Ray cluster to lay the slots out on; None takes a cluster that runs on this
            machine, else this machine.
        price_per_hour: dollars for one worker and hour.
        probe_seconds: at most about this long is training and evaluation measured; each at least
            once.
        quiet: print nothing.
        source: the command's arguments, for the command that starts the search.

    Raises:
        SftError: what the search would refuse, every problem found.
    """
    screen = Screen(quiet)
    screen.say("reading model and data …")
    has = capacity_here(address)
    on_cluster = has is None
    prepared = prepare_experiment(experiment, has)
    experiment = prepared.experiment
    problems: list[str] = []
    folder_note = collect(problems, _folder_note, experiment)
    warm = collect(problems, _warm, prepared) or []
    if has is None:
        has = collect(problems, _capacity_of, address)
    layout = None if has is None else collect(problems, plan_layout, experiment, has)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    assert has is not None  # no problems
    assert layout is not None

    trials, space_note = drawn_trials(
        experiment, default_recipe(prepared.model.num_parameters), warm
    )
    speed = measure(prepared, layout, [t.train for t in trials], probe_seconds, screen)
    costing = _Costing(prepared, layout, speed)
    low, high = (costing.total(trials, pruned=pruned) for pruned in (True, False))
    # The journal is of the trials that run; confirmation is not one of them.
    num_trials = round(sum(trial.weight for trial in trials))
    disk_bytes = costing.disk_bytes(num_trials, max(costing.seconds(t.train) for t in trials))
    hours = Range(low.worker_hours, high.worker_hours)
    plan = Plan(
        trials=num_trials,
        confirm_runs=costing.confirm_runs,
        slots=layout.slots,
        workers_per_trial=layout.workers_per_trial,
        steps=_spread(trials, costing.steps),
        marks=_spread(trials, lambda train: len(costing.looks(train))),
        train_seconds_per_example=speed.train_seconds,
        eval_seconds_per_example=speed.eval_seconds,
        worker_hours=hours,
        wall_seconds=Range(low.wall_seconds, high.wall_seconds),
        dollars=None
        if price_per_hour is None
        else Range(*(price_per_hour * some for some in hours)),
        disk_bytes=disk_bytes,
        notes=[
            note
            for note in (
                folder_note,
                space_note,
                _budget_note(experiment, num_trials, low, high),
                _slots_note(experiment, layout, has),
                _speed_note(layout, speed, on_cluster),
                _busy_note(speed),
                _disk_note(experiment, disk_bytes),
            )
            if note
        ],
    )
    say_plan(screen, plan, prepared, layout, source=source, address=address)
    return plan


# -- what stands in the way ----------------------------------------------------------------------


def _folder_note(experiment: Experiment) -> str | None:
    """What a search would find in the run folder, in words; None if there is none.

    Raises:
        SftError: the folder holds another experiment, or cannot be read.
    """
    store = RunStore(experiment.storage, experiment.name)
    relation = check_folder_rule(store, experiment)
    if relation == "new":
        return None
    if relation == "same" and store.exists(RESULTS):
        return (
            f"{store.location} holds this search, finished: the same command shows its outcome "
            "and runs nothing; a larger search.trials goes on with it, --fresh begins again"
        )
    return (
        f"{store.location} holds this search, begun: it would go on with what is there; these "
        "numbers are for all of its trials"
    )


def _warm(prepared: Prepared) -> list[dict[str, Any]]:
    """Configurations of other runs, for a search that has not begun."""
    experiment = prepared.experiment
    if RunStore(experiment.storage, experiment.name).exists(JOURNAL):
        return []
    return warm_configurations(experiment, prepared.facts(), prepared.objective)


def _capacity_of(address: str | None) -> dict[str, float]:
    """What a running cluster has.

    Raises:
        ResourceError: it cannot be reached.
    """
    with connected(address):
        return capacity()


# -- what would be drawn -------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnTrial:
    """A configuration a search would run.

    Attributes:
        weight: how many trials of the search it stands for.
        prunable: the default recipe is not.
    """

    train: Train
    weight: float = 1.0
    prunable: bool = True


def drawn_trials(
    experiment: Experiment, recipe: Mapping[str, Any], warm: Sequence[dict[str, Any]] = ()
) -> tuple[list[DrawnTrial], str | None]:
    """What a search would run before it learns anything, and what the space's size does to it.

    What runs first stands for itself; draws, by the priors in their share and else uniform, stand
    for the sampled trials.

    Args:
        experiment: with its search space written out.
        recipe: values of the default recipe by dotted path.
        warm: flat parameters of other runs.

    Raises:
        ConfigError: a combination of drawn values is no valid configuration.
    """
    search, train = experiment.search, experiment.train
    space, seed = search.domains, derived_seed(experiment.seed, "plan")
    rng = np.random.default_rng(seed)
    first = list(
        itertools.islice(first_trials(experiment, space, recipe, list(warm)), search.trials)
    )
    found = [
        DrawnTrial(_applied(train, dict(recipe)), prunable=False)
        if role == YARDSTICK
        else DrawnTrial(_applied(train, _draw(space, params, rng)))
        for params, role in first
    ]
    finite = FiniteSpace.of(space, train)
    left = search.trials - len(first)
    if search.sampler == "grid":
        untried = []
    elif finite is not None:
        tried = {key_of(trial.train.model_dump()) for trial in found}
        untried = [point for key, point in finite.points.items() if key not in tried]
    if finite is not None or search.sampler == "grid":
        note = _space_note(finite, len(found) + len(untried), search.trials)
        if len(untried) <= left:
            points = (_applied(train, _draw(space, point, rng)) for point in untried)
            return [*found, *map(DrawnTrial, points)], note
    else:
        note = None
    for i in range(DRAWS if left else 0):
        # The priors' share falls with the trial's number.
        number = len(first) + i * left // DRAWS
        params = prior_draw(space, derived_seed(seed, i), number)
        found.append(DrawnTrial(_applied(train, _draw(space, params, rng)), left / DRAWS))
    return found, note


def _space_note(finite: FiniteSpace | None, most: int, trials: int) -> str | None:
    """How a space that can be counted out goes with the number of trials."""
    points = "" if finite is None else f", {len(finite.points)} of them in the space"
    if most < trials:
        return (
            f"there are only {count(most, 'configuration')} to try{points}: the search ends there, "
            f"before its {trials} trials"
        )
    if most == trials:
        return f"the {trials} trials are all the configurations there are to try{points}"
    if finite is None:
        return None
    return f"the space has {len(finite.points)} configurations, of which {trials} trials run some"


def _applied(train: Train, values: dict[str, Any]) -> Train:
    try:
        return apply_values(train, values)
    except ValidationError as error:
        raise ConfigError(f"search.space: not all combinations work: {explain(error)[0]}") from None


def _draw(space: Space, params: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Values for every path: those that are given, the others uniform over their range."""

    def suggest(name: str, domain: Numeric | Choice) -> Any:
        if name in params:
            return params[name]
        if isinstance(domain, Choice):
            return domain.options[int(rng.integers(len(domain.options)))]
        # A whole number is as wide as its rounding.
        half = 0.5 if domain.integer else 0.0
        low, high = domain.low - half, domain.high + half
        if domain.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            value = rng.uniform(low, high)
        value = min(max(value, domain.low), domain.high)
        return round(value) if domain.integer else float(value)

    return spaces.draw(space, suggest)


# -- what it takes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        device: CPU or GPU.
        train_seconds: frozen layers -> seconds per training example of one worker, its part of
            every optimiser step included.
        eval_seconds: per evaluated example of one worker.
        processor_share: processor seconds per second; below 1, others took the rest.
    """

    device: str
    train_seconds: dict[int, float]
    eval_seconds: float
    processor_share: float = 1.0

    def per_train_example(self, depth: int) -> float:
        """Seconds, on a line between the depths that were measured."""
        depths = sorted(self.train_seconds)
        return float(np.interp(depth, depths, [self.train_seconds[d] for d in depths]))


def measure(
    prepared: Prepared, layout: Layout, trains: Sequence[Train], seconds: float, screen: Screen
) -> Speed:
    """Train and evaluate for a short while on this machine, as one worker of a trial would.

    Args:
        trains: configurations that will run; their frozen depths and batch sizes are measured.
        seconds: for all of it; loading the model comes on top, and so does a first step that
            takes longer than that.

    Raises:
        SftError: the model cannot be loaded, or not one example fits into memory.
    """
    experiment = prepared.experiment
    found = sorted({_depth(train, prepared) for train in trains})
    depths = sorted({found[0], found[len(found) // 2], found[-1]})
    # Of two batch sizes in the middle the smaller: its steps take longer per example.
    batch_size = sorted(train.batch_size for train in trains)[(len(trains) - 1) // 2]
    on_gpu = layout.gpus_per_worker > 0 and torch.cuda.is_available()
    world = World(device=torch.device("cuda" if on_gpu else "cpu"))
    screen.say(
        f"loading the model, then measuring training at {count(len(depths), 'frozen depth')}, and "
        f"evaluation: at most about {seconds:g} s …"
    )
    threads = max(1, math.floor(layout.cpus_per_worker))  # as a worker has
    with _undisturbed(threads, world):
        setup = load_setup(experiment, prepared.dataset_folder, world)
        began, processor_began = time.monotonic(), time.process_time()
        train_seconds = {}
        for depth in depths:
            train = experiment.train.model_copy(
                update={
                    "batch_size": batch_size,
                    "frozen_layers": depth,
                    "reinit_layers": 0,
                    "epochs": MOST_PROBE_STEPS + 1,  # always enough steps
                    "learning_rate": LOW_LEARNING_RATE,
                }
            )
            train_seconds[depth] = _train_seconds(
                train, setup, prepared, layout, seconds * (1 - EVAL_SHARE) / len(depths)
            )
        eval_seconds = _eval_seconds(setup, experiment.train.precision, seconds * EVAL_SHARE)
        processor_share = (time.process_time() - processor_began) / (time.monotonic() - began)
    return Speed("GPU" if on_gpu else "CPU", train_seconds, eval_seconds, processor_share)


def _depth(train: Train, prepared: Prepared) -> int:
    return prepared.model.num_layers if train.frozen_layers == "all" else train.frozen_layers


@contextmanager
def _undisturbed(threads: int, world: World) -> Iterator[None]:
    """So many torch threads; afterwards threads and random numbers are what they were."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(
        devices=[torch.cuda.current_device()] if world.device.type == "cuda" else []
    ):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _train_seconds(
    train: Train, setup: Setup, prepared: Prepared, layout: Layout, seconds: float
) -> float:
    """Per example of one worker's share of a step; a first, cold step warms up and sizes the rest.

    Where a whole share would take too long it is measured in part.
    """
    until = time.monotonic() + seconds
    workers, world = layout.workers_per_trial, setup.world
    try:
        trial = _Trial(train, setup, prepared.objective, prepared.experiment.seed, None)
    except NothingFitsError:
        raise ResourceError(
            f"data.max_length: not one example of {int(setup.dataset.train.lengths.max())} tokens "
            "fits into the memory of this machine's GPU; shorten it or take a smaller model"
        ) from None
    examples, took, most = 0, 0.0, FIRST_LOOK
    per_example = math.inf
    for indices in itertools.islice(trial.batches_from(0), MOST_PROBE_STEPS):
        # Every so many-th of a batch that is sorted by length: a share with its mix of lengths.
        part = batches.share(indices, 0, max(workers, -(-len(indices) // most)))
        started = time.monotonic()
        trial.take_step(part)
        world.synchronize()
        now = time.monotonic()
        if math.isinf(per_example):
            per_example = (now - started) / len(part)
            most = max(FIRST_LOOK, int((until - now) / per_example))
        else:
            examples, took = examples + len(part), took + now - started
            per_example = took / examples
        if now + per_example * len(part) > until:
            break
    return per_example


def _eval_seconds(setup: Setup, precision: str, seconds: float) -> float:
    """Per example, over as many of the validation split as there is time for."""
    until = time.monotonic() + seconds
    dtype, _ = resolve_precision(precision, setup.world.device)
    validation, per_example, most = setup.dataset.validation, math.inf, FIRST_LOOK
    for _ in range(2):
        part = _across_lengths(validation, most)
        started = time.monotonic()
        evaluate(
            setup.pretrained.model,
            setup.task,
            part,
            setup.tokenizer.pad_token_id,
            setup.world,
            dtype,
        )
        setup.world.synchronize()
        now = time.monotonic()
        per_example = (now - started) / len(part)
        most = int((until - now) / per_example)
        if most < FIRST_LOOK:
            break
    return per_example


def _across_lengths(examples: Examples, most: int) -> Examples:
    """At most so many examples, evenly over all lengths."""
    if len(examples) <= most:
        return examples
    ranked = np.argsort(examples.lengths, kind="stable")
    keep = np.zeros(len(examples), dtype=bool)
    keep[ranked[np.linspace(0, len(examples) - 1, most).astype(int)]] = True
    return examples.chosen(keep)


@dataclass(frozen=True)
class _Total:
    """Of a whole search, as far as its budget lets it come.

    Attributes:
        share: of the search that the budget lets it do.
        limit: which one ends it, in words; None if it comes to its end.
    """

    worker_hours: float
    wall_seconds: float
    share: float
    limit: str | None


class _Costing:
    """Turns configurations into seconds and bytes."""

    def __init__(self, prepared: Prepared, layout: Layout, speed: Speed) -> None:
        self.prepared, self.layout, self.speed = prepared, layout, speed
        self.search = prepared.experiment.search
        dataset = prepared.dataset
        self.num_train, self.num_validation = len(dataset.train), len(dataset.validation)
        confirm: Any = prepared.experiment.confirm
        # The top configurations and the default recipe.
        self.confirm_runs = 0 if confirm is None else (confirm.top + 1) * confirm.seeds

    def steps(self, train: Train) -> int:
        return train.epochs * batches.steps_per_epoch(self.num_train, train.batch_size)

    def looks(self, train: Train) -> dict[int, list[int]]:
        """Step -> percents of the marks that fall on it; it is evaluated once."""
        found: dict[int, list[int]] = {}
        per_epoch = batches.steps_per_epoch(self.num_train, train.batch_size)
        for mark in schedule_marks(self.search.rungs, train.epochs, per_epoch):
            found.setdefault(mark.step, []).append(mark.percent)
        return found

    def seconds(self, train: Train, goes_on: float = 1.0) -> float:
        """Slot time of one trial, without what its workers say to each other.

        Args:
            goes_on: share of the trials at a rung that do.
        """
        per_example = self.speed.per_train_example(_depth(train, self.prepared))
        per_step = per_example * self.num_train * train.epochs / self.steps(train)
        per_look = self.speed.eval_seconds * self.num_validation
        total, reached, before = 0.0, 1.0, 0
        for step, percents in self.looks(train).items():
            total += reached * ((step - before) * per_step + per_look)
            reached *= goes_on ** sum(percent in self.search.rungs for percent in percents)
            before = step
        return total / self.layout.workers_per_trial

    def goes_on(self, trials: float) -> float:
        """The least share of the trials at a rung that goes on; the first one there always does."""
        if self.search.pruner == "none":
            return 1.0
        factor = 2 if self.search.pruner == "median" else self.search.reduction_factor
        return max(1 / factor, 1 / trials)

    def total(self, trials: Sequence[DrawnTrial], *, pruned: bool) -> _Total:
        """What a search takes if as much as possible is pruned, or nothing."""
        goes_on = self.goes_on(sum(t.weight for t in trials)) if pruned else 1.0
        unpruned = [t.weight * self.seconds(t.train) for t in trials]
        slot_seconds = sum(
            t.weight * self.seconds(t.train, goes_on if t.prunable else 1.0) for t in trials
        )
        mean_unpruned = sum(unpruned) / sum(t.weight for t in trials)
        slot_seconds += self.confirm_runs * mean_unpruned
        # The default recipe runs to its end, however many slots there are.
        longest = max((self.seconds(t.train) for t in trials if not t.prunable), default=0.0)
        search_seconds = max(slot_seconds / self.layout.slots, longest)
        hours = slot_seconds * self.layout.workers_per_trial / 3600
        limits = self.search.budget
        shares: dict[str | None, float] = {None: 1.0}
        if limits.wall_minutes is not None:
            left = 60 * limits.wall_minutes - STARTUP_SECONDS
            shares[f"{limits.wall_minutes:g} min"] = max(0.0, left) / search_seconds
        if limits.worker_hours is not None:
            shares[f"{limits.worker_hours:g} worker hours"] = limits.worker_hours / hours
        limit = min(shares, key=lambda name: shares[name])
        share = shares[limit]
        return _Total(hours * share, STARTUP_SECONDS + search_seconds * share, share, limit)

    def disk_bytes(self, trials: int, longest_trial_seconds: float) -> int:
        """Models that are kept, running and best, the study, and the data as it was encoded."""
        experiment = self.prepared.experiment
        model = 4 * self.prepared.model.num_parameters  # written in fp32
        # With several objectives any number of trials can be worth keeping.
        kept = trials if self.search.costs else min(trials, experiment.checkpoint.keep)
        models = kept + self.layout.slots + 1
        if longest_trial_seconds > 60 * experiment.checkpoint.every_minutes:
            models += RESUME_STATE_MODELS * self.layout.slots
        files = self.prepared.dataset_folder.rglob("*")
        data = sum(file.stat().st_size for file in files if file.is_file())
        return models * model + trials * JOURNAL_BYTES_PER_TRIAL + data


def _spread(trials: Sequence[DrawnTrial], value: Any) -> Spread:
    """Of a count, each trial by its weight."""
    ranked = sorted((value(trial.train), trial.weight) for trial in trials)
    weights = np.cumsum([weight for _, weight in ranked])
    middle = int(np.searchsorted(weights, weights[-1] / 2))
    return Spread(ranked[0][0], ranked[middle][0], ranked[-1][0])


# -- what is worth knowing -----------------------------------------------------------------------


def _budget_note(experiment: Experiment, trials: int, low: _Total, high: _Total) -> str | None:
    """Where a budget ends the search; None if none does."""
    if high.limit is None:
        return None
    least, most = (round(trials * total.share) for total in (high, low))
    if low.limit is None:
        return (
            f"the budget of {high.limit} ends the search after about {least} of {trials} trials "
            "if little is pruned"
        )
    between = str(least) if least == most else f"{least} to {most}"
    return f"the budget of {high.limit} ends the search after about {between} of {trials} trials"


def _slots_note(experiment: Experiment, layout: Layout, has: Mapping[str, float]) -> str | None:
    """What of the cluster the search would leave idle."""
    kinds = layout.resources_per_worker
    needs = {kind: amount * layout.workers_per_trial for kind, amount in kinds.items()}
    room = min(int(has[kind] / amount + 1e-9) for kind, amount in needs.items())
    if layout.slots < room and layout.slots == experiment.search.trials:
        return (
            f"{count(layout.slots, 'trial')} leave {room - layout.slots} of {room} slots idle; "
            "trials with more workers_per_trial would use them"
        )
    if layout.slots < room:
        return (
            f"resources.slots is {layout.slots}, there is room for {room}; `slots: auto` takes "
            "them all"
        )
    if has.get("GPU", 0) >= 1 and not layout.gpus_per_worker:
        return f"{count(has['GPU'], 'GPU')} would stay idle; `gpus_per_worker: auto` takes them"
    return None


def _speed_note(layout: Layout, speed: Speed, on_cluster: bool) -> str | None:
    """How far the measurement can be trusted."""
    reasons = []
    if layout.gpus_per_worker and speed.device == "CPU":
        reasons.append(
            "on the CPU of this machine, while the trials will have GPUs: expect far less"
        )
    elif on_cluster:
        reasons.append(f"on the {speed.device} of this machine, not on the cluster's")
    if layout.workers_per_trial > 1:
        reasons.append("without the communication between the workers of a trial")
    if layout.slots > 1:
        reasons.append("alone, while slots share a machine's memory")
    return f"the speed was measured {', and '.join(reasons)}" if reasons else None


def _busy_note(speed: Speed) -> str | None:
    if speed.device == "GPU" or speed.processor_share >= LEAST_PROCESSOR_SHARE:
        return None
    return (
        f"other programs took about {1 - speed.processor_share:.0%} of the processor meanwhile; "
        "without them the search takes less"
    )


def _disk_note(experiment: Experiment, disk_bytes: int) -> str | None:
    """A warning if the disk is too small; None for an object store."""
    if "://" in experiment.storage:
        return None
    folder = Path(experiment.storage).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free > disk_bytes:
        return None
    return f"the disk of {folder} has only {_size(free)} free; lower checkpoint.keep"


# -- saying it -----------------------------------------------------------------------------------


def say_plan(
    screen: Screen,
    plan: Plan,
    prepared: Prepared,
    layout: Layout,
    *,
    source: str | None = None,
    address: str | None = None,
) -> None:
    """The plan, what is worth knowing about it, and the command that starts it."""
    experiment = prepared.experiment
    device = "GPU" if layout.gpus_per_worker else "CPU"
    gpus = f" and {count(layout.gpus_per_worker, 'GPU')}" if layout.gpus_per_worker else ""
    wall, hours = plan.wall_seconds, plan.worker_hours
    pruning = "; the less is pruned, the more" if wall.low < wall.high else ""
    confirm = f", then {plan.confirm_runs} runs to confirm the best" if plan.confirm_runs else ""
    screen.say()
    screen.facts(
        {
            "plan": f"{experiment.name} in {RunStore(experiment.storage, experiment.name).location}"
            "; nothing has been started",
            **prepared.described(),
            "device": f"{device}, {prepared.precision(device)}",
            "layout": f"{count(layout.slots, 'slot')} x "
            f"{count(layout.workers_per_trial, 'worker')} x "
            f"{count(layout.cpus_per_worker, 'CPU')}{gpus}",
            "objective": f"{prepared.objective}, {prepared.direction}",
            "search by": search_rules(prepared),
            "budget": budget(prepared),
            "trials": f"{plan.trials}{confirm}; each unless pruned: steps {plan.steps}, "
            f"evaluations {plan.marks}",
            "speed": _speed_text(plan),
            "time": f"{_between(wall, duration)} (about {STARTUP_SECONDS:g} s of it assumed for "
            f"starting), {_between(hours, _number)} worker hours{pruning}",
            **(
                {"price": f"{_between(plan.dollars, _money)}, paid per worker and hour"}
                if plan.dollars is not None
                else {}
            ),
            "disk": f"up to {_size(plan.disk_bytes)}",
        }
    )
    if plan.notes:
        screen.say()
        screen.say("worth knowing:")
    for note in plan.notes:
        for line in textwrap.wrap(
            note, 98, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        ):
            screen.say(line)
    if source is not None:
        screen.say()
        screen.say("start it:")
        screen.say(f"  sft-ray search {source}" + (f" --address {address}" if address else ""))


def _speed_text(plan: Plan) -> str:
    frozen = [
        f"{_number(1 / seconds)} ({count(depth, 'layer') if depth else 'nothing'} frozen)"
        for depth, seconds in sorted(plan.train_seconds_per_example.items())
    ]
    return (
        f"examples per second and worker, measured: training {', '.join(frozen)}; evaluation "
        f"{_number(1 / plan.eval_seconds_per_example)}"
    )


def _between(some: Range, text: Any) -> str:
    low, high = text(some.low), text(some.high)
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _money(dollars: float) -> str:
    return f"${dollars:,.2f}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
