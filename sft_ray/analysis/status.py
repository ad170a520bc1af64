"""How a run stands, from its folder alone: whether it runs, has ended or was killed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from sft_ray.analysis.outcome import curve_of, score_of
from sft_ray.analysis.results import SearchResult, load_study, reading
from sft_ray.run_store import (
    JOURNAL,
    METRICS,
    RESULTS,
    RunStore,
    open_run,
    read_experiment,
    trial_folder,
)
from sft_ray.screen import count, duration, short_params

BUSY = "; a confirmation or an ablation of it is running"


@dataclass(frozen=True)
class Status:
    """A run at one moment.

    Attributes:
        state: finished, running, or stopped before its end; None where storage cannot tell
            whether a driver is at work.
        facts: name -> words, for the screen.
    """

    location: str
    state: str | None
    facts: dict[str, str]


def run_status(location: str) -> Status:
    """Look into a run folder; takes no lock and changes nothing.

    Raises:
        SftError: there is no run, or a file of it is damaged.
    """
    store = open_run(location)
    busy = store.is_locked()
    if store.exists(RESULTS):
        result = SearchResult.load(location)
        with reading(store.path_of(RESULTS)):
            best = result.best
            value = best["validation"][result.tree["metric"]]
            complete = best.get("complete", True)
            unfinished = "" if complete else " (unfinished: no trial reached its end)"
            states = Counter(row["state"] for row in result.trials)
            facts = {
                "run": store.location,
                "state": f"finished{BUSY * bool(busy)}",
                "trials": _counted(states),
                "best": f"{result.tree['metric']} {value:.4f}{unfinished}: "
                f"{short_params(best['params'])}",
                "time": duration(result.tree["wall_seconds"]),
            }
        return Status(store.location, "finished", facts)
    words = {True: "running", False: "stopped before its end; the same command goes on", None: ""}
    facts = {"run": store.location, "state": words[busy] or "not finished"}
    if store.exists(JOURNAL):  # all it takes: a file per trial would be slow to read
        facts |= _of_study(load_study(store), store, busy)
    elif store.exists(f"{trial_folder(0)}/{METRICS}"):
        facts |= _of_training(store)
    return Status(store.location, words[busy] or None, facts)


def _of_study(study: Study, store: RunStore, busy: bool | None) -> dict[str, str]:
    """Of a search that has not ended."""
    experiment = read_experiment(store)
    trials = [t for t in study.trials if t.state != TrialState.WAITING]
    states = Counter(t.state.name for t in trials)
    facts = {"trials": _counted(states, experiment.search.trials)}
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    sign = 1 if study.directions[0].name == "MAXIMIZE" else -1
    if complete:
        best = max(complete, key=lambda t: sign * score_of(t))
        settings = short_params(best.user_attrs["params"])
        facts["best so far"] = f"trial {best.number}: {score_of(best):.4f}, {settings}"
    for name, words in _begun(trials, store, busy):
        facts[name] = words
    if "wall_seconds" in study.user_attrs:
        facts["time"] = (
            f"{duration(study.user_attrs['wall_seconds'])} when a trial or a session last ended"
        )
    return facts


def _begun(
    trials: list[FrozenTrial], store: RunStore, busy: bool | None
) -> Iterator[tuple[str, str]]:
    """Trials that have begun and not ended: how far they are, and how long ago that was."""
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        curve, mark = curve_of(trial), "not evaluated yet"
        if curve:
            percent, value = max(curve.items())
            path = f"{trial_folder(trial.number)}/{METRICS}"
            mark = f"{percent} %, {value:.4f}{_ago(store, path)}"
        settings: dict[str, Any] = trial.user_attrs.get("params", {})
        how = "interrupted, " if busy is False else ""
        yield f"trial {trial.number}", f"{how}{mark}; {short_params(settings)}"


def _of_training(store: RunStore) -> dict[str, str]:
    """Of a single training that has not ended and was evaluated."""
    path = f"{trial_folder(0)}/{METRICS}"
    with reading(store.path_of(path)):
        last = json.loads((store.read_text(path) or "").splitlines()[-1])
        scores = ", ".join(f"{name} {value:.4f}" for name, value in last["metrics"].items())
        return {"validation": f"{last['percent']} %, {scores}{_ago(store, path)}"}


def _ago(store: RunStore, path: str) -> str:
    """How long ago a file was written, where storage tells."""
    written = store.modified(path)
    if written is None:
        return ""
    return f", {duration(max((datetime.now(UTC) - written).total_seconds(), 0))} ago"


def _counted(states: Counter[str], planned: int | None = None) -> str:
    of = "" if planned is None else f" of {planned}"
    named = ", ".join(f"{amount} {state}" for state, amount in sorted(states.items()))
    return f"{count(states.total(), 'trial')}{of}: {named}" if named else f"none{of} yet"
