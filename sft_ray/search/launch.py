"""The workers of a slot: several are a group of Ray Train, one alone is an actor.

What Ray Train does for a group (process group, ranks, death of one restarts all) a single worker
does not need, and each group brings two processes of its own that import for some five seconds of
CPU together.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import ray

from sft_ray.search.cluster import set_ray_environment
from sft_ray.search.watch import LOADING, Pulse

NODE_LABEL = "ray.io/node-id"
RESTART_SECONDS = 0.5  # between the death of a worker and the next one


def run_workers(
    settings: dict[str, Any],
    resources: dict[str, float],
    workers: int,
    avoided: list[str],
    ray_storage: str,
) -> None:
    """Run a slot's workers until they go home; those that die are started again.

    Args:
        settings: see `sft_ray.search.worker.run_worker`.
        resources: of each worker.
        avoided: ids of nodes that are not to be used.
        ray_storage: folder for Ray Train's own files.
    """
    # Not on the avoided nodes, in Ray's notation.
    selector = {NODE_LABEL: f"!in({','.join(avoided)})"} if avoided else None
    if workers == 1:
        _run_one(settings, resources, selector)
    else:
        _run_group(settings, resources, workers, selector, ray_storage)


class Worker:
    """The only worker of a slot."""

    def serve(self, settings: dict[str, Any], gpus: float) -> None:
        """Run trial after trial, on the GPU that this process sees, a share of it, or on CPUs."""
        _serve(settings, rank=0, size=1, device="cuda" if gpus else "cpu", gpus=gpus)


def _run_one(
    settings: dict[str, Any], resources: dict[str, float], selector: dict[str, str] | None
) -> None:
    worker_class = ray.remote(Worker).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU"),
        scheduling_strategy="DEFAULT",  # not in the slot's own placement group
        label_selector=selector,
    )
    while True:
        worker = worker_class.remote()
        try:
            ray.get(worker.serve.remote(settings, resources.get("GPU", 0.0)))
            return
        except ray.exceptions.RayError as error:  # the next one has a clean process
            if isinstance(error, ray.exceptions.OutOfMemoryError):  # of its machine
                ray.get(settings["mailbox"].killed_for_memory.remote())
            time.sleep(RESTART_SECONDS)
        finally:
            ray.kill(worker)


def _run_group(
    settings: dict[str, Any],
    resources: dict[str, float],
    workers: int,
    selector: dict[str, str] | None,
    ray_storage: str,
) -> None:
    set_ray_environment()
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from sft_ray.search.train_group import GroupTrainer

    on_gpu = bool(resources.get("GPU"))
    GroupTrainer(
        _serve_in_group,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            label_selector=selector,
        ),
        run_config=RunConfig(
            name=f"slot-{settings['slot']}",
            storage_path=ray_storage,
            failure_config=FailureConfig(max_failures=-1),
        ),
    ).fit()


def _serve_in_group(settings: dict[str, Any]) -> None:
    """The train function of Ray Train."""
    from ray.train import get_context

    context, device = get_context(), "cpu"
    if ray.get_gpu_ids():
        from ray.train.torch import get_device

        device = str(get_device())
    _serve(settings, context.get_world_rank(), context.get_world_size(), device)


def _serve(settings: dict[str, Any], rank: int, size: int, device: str, gpus: float = 1.0) -> None:
    """Say that this worker is there before the heavy imports, which may fail."""
    pulse = Pulse(settings["watch"], settings["slot"], f"rank {rank}", LOADING)
    gc.disable()  # until all is loaded; imports only add, and take a fifth longer with it
    try:
        ray.get(settings["mailbox"].register.remote(rank))
        from sft_ray.search.worker import run_worker

        run_worker(settings, rank, size, device, pulse, gpus)
    finally:
        pulse.end()
