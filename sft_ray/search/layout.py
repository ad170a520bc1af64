"""How a cluster is shared out into slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sft_ray.config import Experiment, Resources
from sft_ray.errors import ResourceError

MEMORY_SHARE = 0.9  # of a GPU's memory that its trials may take together


@dataclass(frozen=True)
class Layout:
    """How the cluster is shared out: slots, and what each worker of a slot holds.

    Attributes:
        most_slots: that are of use, were there more room.
    """

    slots: int
    workers_per_trial: int
    cpus_per_worker: float
    gpus_per_worker: float
    most_slots: int

    @property
    def resources_per_worker(self) -> dict[str, float]:
        resources = {"CPU": self.cpus_per_worker}
        return resources | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})

    def written_into(self, experiment: Experiment) -> Experiment:
        """The experiment for its workers, who have to know how many threads are theirs."""
        cpus = {"cpus_per_worker": self.cpus_per_worker}
        resources = experiment.resources.model_copy(update=cpus)
        return experiment.model_copy(update={"resources": resources})


def plan_layout(
    experiment: Experiment, has: Mapping[str, float], trials_per_gpu: int = 1
) -> Layout:
    """Share a capacity out into slots.

    Args:
        trials_per_gpu: what `auto` stands for, see `sft_ray.search.sharing`.

    Raises:
        ResourceError: the trials need more than there is.
    """
    wanted = experiment.resources
    workers, cpus, most = wanted.workers_per_trial, wanted.fewest_cpus, most_slots(experiment)
    if wanted.gpus_per_worker == "auto":
        share = trials_per_gpu if wanted.trials_per_gpu == "auto" else wanted.trials_per_gpu
        there = int(has.get("GPU", 0))
        # Ray fills one GPU before it takes the next: no more share one than have to.
        gpus: float = 1 / min(share, -(-most // there)) if there else 0
    else:
        gpus = wanted.gpus_per_worker
    worker = Layout(0, workers, cpus, gpus, most).resources_per_worker
    # The small term forgives fractions of a GPU that do not add up to 1 in floating point.
    fits = min(int(has.get(kind, 0) / (amount * workers) + 1e-9) for kind, amount in worker.items())
    slots = max(fits, 1) if wanted.slots == "auto" else wanted.slots
    if slots > fits:
        needs = " and ".join(f"{n * workers * slots:g} {kind}s" for kind, n in worker.items())
        has_there = " and ".join(f"{has.get(kind, 0):g} {kind}s" for kind in worker)
        way_out = "lower workers_per_trial, cpus_per_worker or slots"
        if gpus * workers * slots > has.get("GPU", 0):
            way_out = "lower workers_per_trial or slots, or train on CPUs with gpus_per_worker=0"
        raise ResourceError(
            f"resources: {slots} x {workers} workers need {needs}, the cluster has {has_there}; "
            f"{way_out}"
        )
    slots = min(slots, most)
    if wanted.cpus_per_worker == "auto" and not gpus:
        cpus = float(has["CPU"] // (slots * workers))
    return Layout(slots, workers, cpus, gpus, most)


def most_slots(experiment: Experiment) -> int:
    """How many trials could run at once if there were room."""
    slots, trials = experiment.resources.slots, experiment.search.trials
    return trials if slots == "auto" else min(slots, trials)


def slots_now(layout: Layout, without: Iterable[str] = ()) -> int:
    """How many slots of a layout there is room for at present, or can be.

    Args:
        without: ids of nodes that are not to be used.
    """
    import ray
    from ray._private.state import state

    left_out, worker = set(without), layout.resources_per_worker

    def workers(has: Mapping[str, float]) -> int:
        return min(int(has.get(kind, 0) / amount + 1e-9) for kind, amount in worker.items())

    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in left_out]
    present = sum(workers(node["Resources"]) for node in nodes)
    startable = workers(state.get_max_resources_from_cluster_config() or {})
    return min(max(present, startable) // layout.workers_per_trial, layout.most_slots)


def with_room(layout: Layout, resources: Resources) -> Layout:
    """The layout on the connected cluster's machines; together they may have more than any of them.

    Where `cpus_per_worker` is `auto`, workers have as many CPUs as lets all of them find room, and
    one where machines are yet to be started.

    Raises:
        ResourceError: no machine of the connected cluster can hold a worker.
    """
    if resources.cpus_per_worker == "auto":
        from ray._private.state import state

        # An autoscaler says what all machines will have, and not what each of them will.
        if state.get_max_resources_from_cluster_config():
            layout = replace(layout, cpus_per_worker=1.0)
        while layout.cpus_per_worker > 1 and slots_now(layout) < layout.slots:
            layout = replace(layout, cpus_per_worker=layout.cpus_per_worker - 1)
    if slots_now(layout) == 0:
        needs = " and ".join(f"{n:g} {kind}s" for kind, n in layout.resources_per_worker.items())
        raise ResourceError(
            f"resources: a trial's {layout.workers_per_trial} workers need {needs} each, on one "
            "machine, and the cluster's machines have no room for them; lower cpus_per_worker or "
            "workers_per_trial"
        )
    return layout
