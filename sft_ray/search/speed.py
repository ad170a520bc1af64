"""How fast this machine trains and evaluates, measured for a short while."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from sft_ray.config import Train
from sft_ray.errors import ResourceError
from sft_ray.search.layout import Layout
from sft_ray.training import batches
from sft_ray.training.fitting import Trial
from sft_ray.training.forward import evaluate
from sft_ray.training.micro_batch import NothingFitsError, num_cpus
from sft_ray.training.passes import trunk_output
from sft_ray.training.preparation import Prepared
from sft_ray.training.setup import Setup, load_setup
from sft_ray.training.trunk_cache import CHUNK_TOKENS
from sft_ray.training.world import World, resolve_precision

EVAL_SHARE = 0.2  # of the time
EVAL_EXAMPLES = 64  # at a time
MOST_STEPS = 50  # per frozen depth: more do not tell more


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        device: CPU or GPU.
        train_seconds: frozen layers -> seconds per training example of one worker, its part of
            every optimiser step included.
        eval_seconds: per evaluated example of one worker.
        trunk_seconds: frozen layers -> of either for what these compute; spared where their output
            is known.  0 where keeping it does not pay, empty if nothing is ever kept.
        trunk_bytes: that the output of one depth takes on disk, the most of those that are kept.
        trunk_uses: how many trials read what one has made, the least of the depths that are kept.
        gain_of_two: how many times as fast a worker with twice the CPUs trains, the most that two
            workers could do for a trial; None where it decides nothing.
    """

    device: str
    train_seconds: dict[int, float]
    eval_seconds: float
    trunk_seconds: dict[int, float] = field(default_factory=dict)
    trunk_bytes: int = 0
    trunk_uses: float = 1.0
    gain_of_two: float | None = None

    def of_training(self, train: Train) -> float:
        """Seconds per example, everything computed, on a line between the depths measured."""
        return _between(self.train_seconds, train)

    def spared(self, train: Train, passes: float) -> float:
        """Seconds per example if all that pass `passes` times go through frozen layers once."""
        if not self.trunk_seconds or train.frozen_layers == 0 or passes <= 1:
            return 0.0
        return _between(self.trunk_seconds, train) * (1 - 1 / passes)


def _between(measured: dict[int, float], train: Train) -> float:
    depths = sorted(measured)
    depth = train.frozen_depth(depths[-1])
    return float(np.interp(depth, depths, [measured[d] for d in depths]))


def measure(prepared: Prepared, layout: Layout, trains: Sequence[Train], seconds: float) -> Speed:
    """Train and evaluate for a short while, as one worker of a trial would.

    Args:
        trains: configurations that will run; at most three of their frozen depths are measured.
        seconds: about so long; everything is measured at least once, however long it takes.

    Raises:
        SftError: the model cannot be loaded, or not one example fits into memory.
    """
    layers = prepared.model.num_layers
    found = sorted({train.frozen_depth(layers) for train in trains})
    depths = sorted({found[0], found[len(found) // 2], found[-1]})
    batch_size = sorted(train.batch_size for train in trains)[len(trains) // 2]
    on_gpu = layout.gpus_per_worker > 0 and torch.cuda.is_available()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(layout.cpus_per_worker)))  # as a worker has
    try:
        world = World(device=torch.device("cuda" if on_gpu else "cpu"))
        experiment, others = prepared.experiment, prepared.experiment.search.others_per_depth
        setup = load_setup(experiment, prepared.dataset_folder, world, others_per_depth=others)
        cache = setup.trunk_cache
        setup = replace(setup, trunk_cache=None)  # nothing is written here
        train_seconds, trunk_seconds, trunk_bytes, gain_of_two = {}, {}, 0, None
        trunk_uses = 1 + others
        dtype, _ = resolve_precision(prepared.experiment.train.precision, world.device)
        epochs = sorted(train.epochs for train in trains)[len(trains) // 2]
        for depth in depths:
            fixed = {"batch_size": batch_size, "frozen_layers": depth, "reinit_layers": 0}
            # Either takes longer than all that is measured here.
            fixed |= {"compile": False, "cuda_graphs": False}
            fixed |= {"epochs": 2 * (MOST_STEPS + 1)}  # for two measurements of one step an epoch
            train = prepared.experiment.train.model_copy(update=fixed)
            step = _training(train, setup, prepared, layout.workers_per_trial)
            share = seconds * (1 - EVAL_SHARE) / len(depths)
            train_seconds[depth] = _seconds_per_example(step, world, share)
            if depth == depths[0] and not on_gpu and prepared.experiment.search.trials > 1:
                # Where work is most.
                gain_of_two = _gain_of_two(layout, step, train_seconds[depth], world, share)
            if depth and cache is not None and cache.may_keep:
                trunk_seconds[depth] = 0.0
                if cache.pays("train", depth, dtype, epochs):
                    below = _trunk(setup, train, depth)
                    trunk_seconds[depth] = _seconds_per_example(below, world, share / 4)
                    trunk_bytes = max(trunk_bytes, cache.num_bytes(depth, dtype))
                    trunk_uses = min(trunk_uses, cache.likely_uses(depth, dtype))
        look = _evaluation(setup, prepared.experiment.train.precision)
        eval_seconds = _seconds_per_example(look, world, seconds * EVAL_SHARE)
    finally:
        torch.set_num_threads(threads)
    if trunk_seconds:
        trunk_seconds[0] = 0.0
    return Speed(
        "GPU" if on_gpu else "CPU",
        train_seconds,
        eval_seconds,
        trunk_seconds,
        trunk_bytes,
        trunk_uses,
        gain_of_two,
    )


def _trunk(setup: Setup, train: Train, depth: int) -> Callable[[], int]:
    """A function that computes the output of frozen layers for some examples; how many."""
    examples, device = setup.dataset.train, setup.world.device
    dtype, _ = resolve_precision(train.precision, device)
    shares = itertools.cycle(batches.evaluation_shares(examples.lengths, 0, 1, CHUNK_TOKENS))

    def look() -> int:
        items = next(shares)
        batch = batches.collate(
            examples,
            items,
            pad_token=setup.tokenizer.pad_token_id,
            device=device,
            with_labels=False,
        )
        one = replace(batch.one_pass, stop=depth)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            trunk_output(setup.pretrained.model, batch.inputs, one)
        return len(items)

    return look


def _training(train: Train, setup: Setup, prepared: Prepared, workers: int) -> Callable[[], int]:
    """A function that takes one worker's share of a step; how many examples that were."""
    try:
        trial = Trial(train, setup, prepared.objective, prepared.experiment.seed)
    except NothingFitsError:
        raise ResourceError(
            f"data.max_length: not one example of {setup.dataset.train.lengths.max()} tokens fits "
            "into the memory of this machine; shorten it or take a smaller model"
        ) from None
    steps = trial.batches_from(0)

    def step() -> int:
        batch = next(steps)
        mine = batches.share(batch, setup.dataset.train.lengths[batch], 0, workers)
        trial.take_step(mine)
        return len(mine)

    return step


def _evaluation(setup: Setup, precision: str) -> Callable[[], int]:
    """A function that evaluates some examples of all lengths; how many that were."""
    dtype, _ = resolve_precision(precision, setup.world.device)
    model, pad_token = setup.pretrained.model, setup.tokenizer.pad_token_id
    validation = setup.dataset.validation
    ranked = np.argsort(validation.lengths, kind="stable")
    places = np.linspace(0, len(ranked) - 1, min(EVAL_EXAMPLES, len(ranked))).astype(int)
    part = validation.chosen(np.isin(np.arange(len(ranked)), ranked[places]))

    def look() -> int:
        evaluate(model, setup.task, part, pad_token, setup.world, dtype)
        return len(part)

    return look


def _gain_of_two(
    layout: Layout, step: Callable[[], int], own_seconds: float, world: World, seconds: float
) -> float | None:
    """How many times as fast a step is with twice the threads; None where there is one core.

    Args:
        own_seconds: per example, with the threads that a worker has.
        seconds: about so long for each number of threads.
    """
    if num_cpus() < 2:
        return None
    own = torch.get_num_threads()
    is_alone = layout.slots * layout.workers_per_trial == 1
    few = own // 2 if is_alone and own > 1 else own  # it may have all cores
    took = {own: own_seconds}
    for threads in (few, 2 * few):
        if threads not in took:
            torch.set_num_threads(threads)
            took[threads] = _seconds_per_example(step, world, seconds)
    torch.set_num_threads(own)
    return took[few] / took[2 * few]


def _seconds_per_example(work: Callable[[], int], world: World, seconds: float) -> float:
    """Of work that is done again and again; the first, cold time does not count."""
    work()
    world.synchronize()
    started, done = time.monotonic(), 0
    for _ in range(MOST_STEPS):
        done += work()
        world.synchronize()
        took = time.monotonic() - started
        if took > seconds:
            break
    return took / done
