"""`sft-ray status` tells how a run stands from its folder alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.status import run_status
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.recipes import default_recipe
from sft_ray.run_store import RunStore, write_experiment
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.single_trial import run_training


def begun(experiment: Experiment) -> tuple[RunStore, SearchStudy]:
    store = RunStore(experiment.storage, experiment.name)
    write_experiment(store, experiment)
    study = SearchStudy(
        experiment,
        open_storage(store.journal),
        recipe=default_recipe(22_000_000),
        num_layers=6,
        direction="maximize",
    )
    return store, study


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_running_search(experiment: Experiment) -> None:
    store, study = begun(experiment)
    with store.locked():
        first, second = study.next_trial(), study.next_trial()
        assert first is not None
        assert second is not None
        study.mark(0, 10, 0.5, 1.0)
        study.mark(0, 100, 0.75, 2.0)
        study.finish(0, TrialState.COMPLETE, Outcome(score=0.75, metrics={"accuracy": 0.75}))
        study.mark(1, 10, 0.25, 1.0)
        store.write_text("trials/1/metrics.jsonl", "{}\n")
        before = tree_of(Path(store.location))
        status = run_status(store.location)
        assert tree_of(Path(store.location)) == before
    assert status.state == "running"
    assert status.facts["trials"] == "2 trials of 4: 1 COMPLETE, 1 RUNNING"
    assert status.facts["best so far"].startswith("trial 0: 0.7500, lr 0.0001")
    assert status.facts["trial 1"].startswith("10 %, 0.2500, 0 s ago; lr ")


def test_a_search_that_was_killed(experiment: Experiment) -> None:
    store, study = begun(experiment)
    study.next_trial()
    status = run_status(store.location)
    assert status.facts["state"].startswith("stopped before its end")
    assert status.facts["trial 0"].startswith("interrupted, not evaluated yet; lr 0.0001")
    assert "best so far" not in status.facts


def test_a_training_that_was_killed(experiment: Experiment) -> None:
    train = experiment.train.model_copy(update={"epochs": 1})
    folder = Path(run_training(experiment.model_copy(update={"train": train}), quiet=True).location)
    last = json.loads((folder / "trials/0/metrics.jsonl").read_text().splitlines()[-1])
    for path in ("results.json", "trials/0/trial.json"):
        (folder / path).unlink()
    facts = run_status(str(folder)).facts
    assert facts["state"].startswith("stopped before its end")
    score = last["metrics"]["accuracy"]
    assert re.fullmatch(rf"100 %, .*accuracy {score:.4f}.*, \d+ s ago", facts["validation"])


def test_a_finished_run_and_no_run(experiment: Experiment, tmp_path: Path) -> None:
    train = experiment.train.model_copy(update={"epochs": 1})
    result = run_training(experiment.model_copy(update={"train": train}), quiet=True)
    status = run_status(result.location)
    assert status.state == "finished"
    assert status.facts["trials"] == "1 trial: 1 COMPLETE"
    assert status.facts["best"].startswith("accuracy 0.")
    assert status.facts["state"] == "finished"
    with RunStore(experiment.storage, experiment.name).locked():
        assert run_status(result.location).facts["state"].endswith("ablation of it is running")
    tree = {**result.tree, "best": {**result.best, "complete": False}}
    RunStore(experiment.storage, experiment.name).write_json("results.json", tree)
    assert "(unfinished: no trial reached its end): lr" in run_status(result.location).facts["best"]
    with pytest.raises(ConfigError, match="no run folder"):
        run_status(str(tmp_path))
