"""Models of the hub, from a cache as its client lays it out, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.folder_rule import as_begun, check_folder_rule
from sft_ray.run_store import RunStore, read_experiment
from sft_ray.search.preflight import prepare_experiment
from sft_ray.single_trial import run_training
from sft_ray.training.model_facts import inspect_model

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def cache(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of `owner/encoder`, of which the second one's weights are others."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub/models--owner--encoder"
    for commit in (FIRST, SECOND):
        shutil.copytree(tiny_model, cached / "snapshots" / commit)
    weights = cached / "snapshots" / SECOND / "model.safetensors"
    tensors = {name: -tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    (cached / "refs").mkdir()
    move_to(cached, FIRST)
    return cached


def move_to(cached: Path, commit: str) -> None:
    (cached / "refs/main").write_text(commit)


@pytest.fixture
def of_the_hub(experiment: Experiment) -> Experiment:
    return experiment.model_copy(
        update={
            "model": "owner/encoder",
            "train": experiment.train.model_copy(update={"epochs": 1}),
        }
    )


def losses(folder: Path) -> list[float]:
    """Training losses at the marks of the one trial."""
    lines = (folder / "trials/0/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def test_a_model_of_the_hub_is_known_by_its_commit(cache: Path) -> None:
    for commit in (FIRST, SECOND):
        move_to(cache, commit)
        assert inspect_model("owner/encoder").commit == commit
    facts = inspect_model("owner/encoder", FIRST)
    assert (facts.commit, facts.fingerprint) == (FIRST, None)


def test_a_run_stays_at_the_commit_that_it_began_with(cache: Path, of_the_hub: Experiment) -> None:
    folder = Path(run_training(of_the_hub, quiet=True).location)
    first = losses(folder)
    move_to(cache, SECOND)
    shutil.rmtree(folder / "trials")  # what comes behind it is made anew
    (folder / "results.json").unlink()
    run_training(of_the_hub, quiet=True)
    assert losses(folder) == first
    assert json.loads((folder / "environment.json").read_text())["model_commit"] == FIRST
    run_training(of_the_hub, fresh=True, quiet=True)
    assert read_experiment(RunStore(of_the_hub.storage, of_the_hub.name)).revision == SECOND
    assert losses(folder) != first


def test_a_revision_that_moved_is_another_experiment(cache: Path, of_the_hub: Experiment) -> None:
    run_training(of_the_hub, quiet=True)
    store = RunStore(of_the_hub.storage, of_the_hub.name)
    prepared = prepare_experiment(as_begun(of_the_hub, store))
    assert prepared.experiment.revision == prepared.model.commit == FIRST
    move_to(cache, SECOND)
    named = prepare_experiment(of_the_hub.model_copy(update={"revision": "main"})).experiment
    with pytest.raises(ConfigError, match=f"revision is '{FIRST}' there and '{SECOND}' here"):
        check_folder_rule(store, named.model_copy(update={"search": of_the_hub.search}))
