"""How many trials share one GPU where `resources.trials_per_gpu` is `auto`: measured, then decided.

One trial of a small model leaves a GPU idle for most of the time that its process computes on the
CPU.  A probe trains the heaviest configuration for some steps where a GPU is; as many trials share
it as keep it busy, fit into its memory, and have CPUs to run on.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_ray import space as spaces
from sft_ray.config import Experiment, Resources, Train, apply_values
from sft_ray.errors import SftError, first_line
from sft_ray.recipes import default_recipe
from sft_ray.screen import Screen, count
from sft_ray.search.cluster import capacity
from sft_ray.search.layout import MEMORY_SHARE, Layout, most_slots, plan_layout, with_room
from sft_ray.training.micro_batch import NothingFitsError
from sft_ray.training.preparation import Prepared

MOST_TRIALS = 8  # that share a GPU
WARMUP_STEPS, WINDOW_STEPS = 5, 20
HEAVY_PATHS = ("train.batch_size", "train.frozen_layers")
LATER = "trials per GPU are measured when the search starts"


@dataclass(frozen=True)
class Findings:
    """What the probe has seen of one trial that had a GPU to itself.

    Attributes:
        busy_share: of the wall time of a step, in which its kernels ran.
        trial_bytes: most memory that it reserved.
        context_bytes: what else lay on the GPU: the process's CUDA context, for the most part.
        gpu_bytes: all memory of the GPU.
    """

    busy_share: float
    trial_bytes: int
    context_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Sharing:
    """The decision, and one sentence that says why."""

    trials_per_gpu: int
    reason: str


def decide(
    findings: Findings, has: Mapping[str, float], cpus_per_worker: float, most_slots: int
) -> Sharing:
    """As many trials per GPU as the tightest limit allows, and at least one.

    Args:
        has: CPUs and GPUs of the cluster.
        most_slots: trials that could run at once; no more share a GPU than have to, because Ray
            fills one before it takes the next.
    """
    if findings.busy_share <= 0:
        return _alone("the profiler has seen no kernel run")
    needs = findings.trial_bytes + findings.context_bytes
    # The small terms forgive quotients that floating point moves off a whole number.
    limits = {
        "enough to keep it busy": math.ceil(1 / findings.busy_share - 1e-9),
        "as many as fit into its memory": int(MEMORY_SHARE * findings.gpu_bytes / needs),
        "as many as its share of the CPUs allows": int(
            has["CPU"] / has["GPU"] / cpus_per_worker + 1e-9
        ),
        "as many as there are to run at once": math.ceil(most_slots / has["GPU"]),
        "the most there may be": MOST_TRIALS,
    }
    why = min(limits, key=lambda name: limits[name])
    number = max(1, limits[why])
    return Sharing(
        number,
        f"{count(number, 'trial')} per GPU, {why}: one alone keeps it busy "
        f"{100 * findings.busy_share:.0f}% of the time and takes {needs / 1e9:.1f} of "
        f"{findings.gpu_bytes / 1e9:.1f} GB",
    )


def _alone(reason: str) -> Sharing:
    return Sharing(1, f"1 trial per GPU: {reason}")


def is_asked(resources: Resources) -> bool:
    """Whether the number is to be found; where `gpus_per_worker` is written, it counts nothing."""
    return resources.trials_per_gpu == "auto" and resources.gpus_per_worker == "auto"


def without_probe(experiment: Experiment, has: Mapping[str, float]) -> Sharing | None:
    """The decision where there is nothing to measure; None where there is."""
    resources, gpus = experiment.resources, has.get("GPU", 0)
    if gpus < 1:
        return _alone("there is no GPU to share")
    if resources.workers_per_trial > 1:
        return _alone("the workers of one trial never share a GPU")
    if most_slots(experiment) <= gpus:
        return _alone("no more trials run at once than there are GPUs")
    return None


def shared_layout(prepared: Prepared, trains: Sequence[Train], screen: Screen) -> Layout:
    """Slots on the connected cluster, after measuring there how many trials share a GPU.

    Says what was decided and why, if `trials_per_gpu` is `auto`.

    Args:
        trains: configurations that will run; the heaviest of them is measured.

    Raises:
        ResourceError: the trials need more than there is.
        SftError: the machine with the GPU cannot load model or data.
    """
    experiment, has = prepared.experiment, capacity()
    resources = experiment.resources
    layout = with_room(plan_layout(experiment, has), resources)  # refuses before any measurement
    if not is_asked(resources):
        return layout
    sharing = without_probe(experiment, has)
    if sharing is None:
        screen.event("measuring how busy one trial keeps a GPU")
        minutes = experiment.watchdog.placement_minutes + experiment.watchdog.loading_minutes
        sharing = ask_the_cluster(prepared, trains, has, 60 * minutes)
    screen.event(sharing.reason)
    return with_room(plan_layout(experiment, has, sharing.trials_per_gpu), resources)


def ask_the_cluster(
    prepared: Prepared, trains: Sequence[Train], has: Mapping[str, float], seconds: float
) -> Sharing:
    """Measure in a task that holds one GPU of the connected cluster, then decide.

    Args:
        seconds: until the answer must be there; a cluster may have to start a machine first.

    Raises:
        SftError: the machine with the GPU cannot load model or data.
    """
    import ray

    from sft_ray.search.gpu_probe import probe

    experiment = prepared.experiment
    # `max_calls` ends its process, and with it what that holds of the GPU, behind the answer.
    task = ray.remote(
        num_cpus=experiment.resources.fewest_cpus, num_gpus=1, max_calls=1, max_retries=0
    )(probe)
    answer = task.remote(*_question(prepared, trains))
    try:
        findings = ray.get(answer, timeout=seconds)
    except (ray.exceptions.GetTimeoutError, KeyboardInterrupt) as error:
        # Only what has not answered: to cancel what just has ends this process (ray#54798).
        ray.cancel(answer, force=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        return _alone(f"no GPU has answered within {seconds:.0f} s")
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, SftError):
            raise cause from None
        return _failed(cause or error)
    return _decided(findings, experiment, has)


def ask_this_machine(
    prepared: Prepared, trains: Sequence[Train], has: Mapping[str, float]
) -> Sharing:
    """Measure in this process, then decide.

    Raises:
        SftError: model or data cannot be loaded.
    """
    import torch

    from sft_ray.search.gpu_probe import probe

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            findings = probe(*_question(prepared, trains))
    except (NothingFitsError, RuntimeError) as error:  # memory that has run out is among these
        return _failed(error)
    finally:
        torch.set_num_threads(threads)
        torch.cuda.empty_cache()
    return _decided(findings, prepared.experiment, has)


def _decided(findings: Findings, experiment: Experiment, has: Mapping[str, float]) -> Sharing:
    return decide(findings, has, experiment.resources.fewest_cpus, most_slots(experiment))


def _failed(error: BaseException) -> Sharing:
    said = first_line(error)[:200]
    return _alone(f"the measurement failed with {type(error).__name__}: {said}")


def trains_of_search(prepared: Prepared) -> list[Train]:
    """The space's corners in batch size and frozen depth, and the default recipe if it runs."""
    experiment = prepared.experiment
    search, train = experiment.search, experiment.train
    drawn = spaces.boundary_values(search.domains)
    ends = [
        [value for name, value in drawn if name == path]
        or [getattr(train, path.removeprefix("train."))]
        for path in HEAVY_PATHS
    ]
    found = [
        apply_values(train, dict(zip(HEAVY_PATHS, corner, strict=True)))
        for corner in itertools.product(*ends)
    ]
    if search.default_recipe:
        found.append(apply_values(train, default_recipe(prepared.model.layer_parameters)))
    return found


def heaviest(trains: Iterable[Train], num_layers: int) -> Train:
    """The largest batch size of all beside the least frozen depth of all; the rest is the first's.

    It has epochs for all steps of the probe, however few steps an epoch has.
    """
    found = list(trains)
    depths = [train.frozen_depth(num_layers) for train in found]
    return found[0].model_copy(
        update={
            "batch_size": max(train.batch_size for train in found),
            "frozen_layers": min(depths),
            "reinit_layers": 0,
            "epochs": WARMUP_STEPS + 2 * WINDOW_STEPS,
        }
    )


def _question(prepared: Prepared, trains: Sequence[Train]) -> tuple[Any, ...]:
    """Arguments of `probe`, as plain values that travel."""
    train = heaviest(trains, prepared.model.num_layers)
    tree = prepared.experiment.anchored().to_tree()
    return tree, str(prepared.dataset_folder), train.model_dump(mode="json"), prepared.objective
