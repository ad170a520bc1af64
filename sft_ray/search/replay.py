"""`sft-ray replay`: train a trial again as it was, and see whether its numbers come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sft_ray.analysis.results import SearchResult, reading
from sft_ray.config import Experiment, Train
from sft_ray.errors import ConfigError, TrialError
from sft_ray.run_store import RunStore, open_run, read_experiment
from sft_ray.screen import Screen, count
from sft_ray.search.cluster import capacity_here
from sft_ray.search.fixed_runs import FixedRun, run_fixed
from sft_ray.search.preflight import prepare_experiment
from sft_ray.training.preparation import check_origin


@dataclass(frozen=True)
class Replay:
    """A trial's marks: (percent of the schedule, recorded score, score now)."""

    number: int
    marks: list[tuple[int, float, float]]

    @property
    def is_identical(self) -> bool:
        return all(recorded == found for _, recorded, found in self.marks)

    @property
    def largest_difference(self) -> float:
        return max(abs(recorded - found) for _, recorded, found in self.marks)


def run_replay(
    location: str, number: int, *, address: str | None = None, quiet: bool = False
) -> Replay:
    """Train one trial of a run again, up to the last mark it reached; changes nothing in the run.

    The same machine, versions, workers and threads give the same numbers on CPUs; other ones need
    not, nor does a GPU, which adds up gradients in no fixed order.  Where no Ray runs, a machine
    with fewer CPUs than the trial had trains it with those it has, and says so.

    Raises:
        SftError: no such run or trial, or it left no marks.
        TrialError: the trial did not reach its marks again.
    """
    store, result = open_run(location), SearchResult.load(location)
    rows = {row["number"]: row for row in result.trials}
    if number not in rows:
        known = f"0 to {max(rows)}" if rows else "none yet"
        raise ConfigError(f"{location} has no ended trial {number}; its trials: {known}")
    row = rows[number]
    if not row.get("curve"):
        reason = row.get("reason")
        raise ConfigError(f"{location}: trial {number} was never evaluated ({reason})")
    with reading(store.location):
        train, seed, last = Train.model_validate(row["train"]), int(row["seed"]), row["curve"][-1]
        until_percent = int(last[0])
        read = row.get("trunks_read")
        trunks_read = None if read is None else str(read)
        cpus = float(result.tree["environment"].get("cpus_per_worker", 1))
    screen = Screen(quiet)
    experiment = _with_one_slot(read_experiment(store), row, cpus)
    experiment = _within(experiment, capacity_here(address), screen)
    prepared = prepare_experiment(experiment)
    check_origin(prepared, result.tree["environment"], location)
    run = FixedRun(
        f"trial {number}",
        train,
        row["params"],
        seed,
        until_percent=until_percent,
        trunks_read=trunks_read,
    )
    screen.say(f"replaying trial {number} of {store.location}")
    # Beside the runs, where every machine that trains can write; what a kill has left is no answer.
    beside = RunStore(store.storage, f".replay/{store.name}-{number}")
    beside.delete()
    try:
        again = run_fixed(prepared, [run], beside, "trials", screen, address=address)
    finally:
        beside.delete()
    curve = dict(again[0]["curve"])
    if lacking := [percent for percent, _ in row["curve"] if percent not in curve]:
        raise TrialError(
            f"{location}: trial {number} did not reach {lacking[0]} % again: {again[0]['reason']}"
        )
    replay = Replay(number, [(p, value, curve[p]) for p, value in row["curve"]])
    screen.say()
    for percent, recorded, now in replay.marks:
        screen.say(
            f"  {percent:3d}%  recorded {recorded:.6f}  now {now:.6f}  {now - recorded:+.1e}"
        )
    if replay.is_identical:
        screen.say("the same numbers")
    else:
        screen.say(f"not the same numbers, up to {replay.largest_difference:.1e} apart")
    return replay


def _with_one_slot(experiment: Experiment, row: dict[str, Any], cpus: float) -> Experiment:
    """The experiment as one trial of it ran, whose workers had so many CPUs."""
    resources = experiment.resources
    if resources.cpus_per_worker != "auto":  # else one slot would have those of all
        cpus = resources.cpus_per_worker
    resources = resources.model_copy(update={"slots": 1, "cpus_per_worker": cpus})
    if row["role"] == "single":  # `sft-ray train` is one process with all threads
        alone = {"workers_per_trial": 1, "cpus_per_worker": float(torch.get_num_threads())}
        resources = resources.model_copy(update=alone)
    return experiment.model_copy(update={"resources": resources, "tracking": []})


def _within(experiment: Experiment, has: Mapping[str, float] | None, screen: Screen) -> Experiment:
    """The experiment with no more CPUs for its workers than a Ray of our own will have."""
    resources = experiment.resources
    most = 0.0 if has is None else has["CPU"] // resources.workers_per_trial
    if not 1 <= most < resources.fewest_cpus:
        return experiment
    screen.say(
        f"{count(most, 'CPU')} for each worker here, {resources.fewest_cpus:g} where it ran: "
        "the numbers may differ"
    )
    resources = resources.model_copy(update={"cpus_per_worker": most})
    return experiment.model_copy(update={"resources": resources})
