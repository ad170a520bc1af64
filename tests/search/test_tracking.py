"""TensorBoard, MLflow and W&B see the trials of the run folder; their troubles stay theirs."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from sft_ray.config import Experiment, Train
from sft_ray.errors import ConfigError, first_line
from sft_ray.run_store import RunStore
from sft_ray.search.tracking import Tool, Tracker
from sft_ray.search.trials import PlannedTrial
from sft_ray.search.tuner import run_search


def planned(number: int = 0) -> PlannedTrial:
    params = {"train.learning_rate": 1e-4, "train.epochs": 2}
    return PlannedTrial(number, f"trial {number}", "", f"trials/{number}", Train(), params, seed=5)


def message(percent: int, accuracy: float) -> dict[str, Any]:
    metrics = {"accuracy": accuracy, "loss": 1.0}
    return {"percent": percent, "metrics": metrics, "train_loss": 0.5, "score": accuracy}


def curve_in(folder: Path, tag: str) -> dict[int, float]:
    """What TensorBoard shows of the event files below a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


class Memory:
    """A tool that remembers, and fails where it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.heard: list[tuple[str, Any]] = []
        self._fails_at = fails_at

    def _hear(self, event: str, detail: Any) -> None:
        if len(self.heard) == self._fails_at:
            raise ConnectionError("503\nfrom http://me:secret@there")
        self.heard.append((event, detail))

    def log_trial_start(self, trial: Any) -> None:
        self._hear("start", str(trial))

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self._hear("result", result)

    def log_trial_end(self, trial: Any, failed: bool) -> None:
        self._hear("end", failed)

    def on_experiment_end(self, trials: list[Any]) -> None:
        self._hear("over", trials)


def tracker_with(callback: Any, folder: Path, said: list[str]) -> Tracker:
    tracker = Tracker((), RunStore(str(folder), "run"), said.append)
    tracker._tools["tensorboard"] = Tool("tensorboard", callback, said.append)
    return tracker


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_tensorboard_and_mlflow_show_what_the_run_folder_has(
    experiment: Experiment,
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    tools = {"tracking": ["tensorboard", "mlflow"]}
    result = run_search(Experiment.from_tree(experiment.to_tree() | tools), quiet=True)
    run = Path(result.location)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        client = MlflowClient(address)
        (project,) = client.search_experiments(filter_string=f"name = '{experiment.name}'")
        runs = {
            r.info.run_name: r
            for r in client.search_runs([project.experiment_id], max_results=1000)
        }
    assert runs.keys() == {f"trial {t['number']}" for t in result.trials}
    for trial in result.trials:
        lines = (run / f"trials/{trial['number']}/metrics.jsonl").read_text().splitlines()
        curve = {m["percent"]: m["metrics"]["accuracy"] for m in map(json.loads, lines)}
        seen = curve_in(run / f"tracking/trials/{trial['number']}", "ray/tune/accuracy")
        assert seen == pytest.approx(curve)
        tracked = runs[f"trial {trial['number']}"]
        assert tracked.info.status == "FINISHED"
        assert float(tracked.data.params["train.learning_rate"]) == pytest.approx(
            trial["params"]["train.learning_rate"]
        )
        history = client.get_metric_history(tracked.info.run_id, "accuracy")
        assert {m.step: m.value for m in history} == pytest.approx(curve)
    # Which tools are told is no part of what was run.
    again = run_search(Experiment.from_tree(experiment.to_tree()), quiet=True)
    assert again.trials == result.trials


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_wandb_keeps_an_offline_run_and_no_key_in_rays_logs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    key = "f" * 12 + "c0ffee" + "0" * 22
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    tracker = Tracker(["wandb"], RunStore(str(tmp_path), "run"), print)
    tracker.start(planned())
    tracker.mark(0, message(50, 0.5))
    tracker.end(0, has_failed=False)
    tracker.close()
    (kept,) = tmp_path.glob("run/tracking/trials/0/wandb/*run-*/*.wandb")
    assert b"accuracy" in kept.read_bytes()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [*session.glob("logs/**/*"), *tmp_path.rglob("*")]
    assert len(files) > 10
    assert not [p for p in files if p.is_file() and key.encode() in p.read_bytes()]


def test_a_trial_that_goes_on_elsewhere_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    tool = Memory()
    tracker = tracker_with(tool, tmp_path, said)
    for percent in (10, 33):
        tracker.start(planned())  # again once its slot was lost
        for reached in range(10, percent + 1, 23):
            tracker.mark(0, message(reached, reached / 100))
    tracker.end(0, has_failed=True)
    tracker.close()
    results = [detail["training_iteration"] for event, detail in tool.heard if event == "result"]
    assert [event for event, _ in tool.heard] == ["start", "result", "result", "end", "over"]
    assert results == [10, 33]
    assert not said


def test_a_tool_that_fails_is_left_alone_and_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    tool = Memory(fails_at=2)
    tracker = tracker_with(tool, tmp_path, said)
    for number in range(3):
        tracker.start(planned(number))
        tracker.mark(number, message(50, 0.5))
        tracker.end(number, has_failed=False)
    tracker.close()
    assert said == ["tensorboard is not told any more: 503"]
    assert len(tool.heard) == 2


def test_a_slow_tool_holds_nothing_up(tmp_path: Path) -> None:
    answer = threading.Event()

    class Slow(Memory):
        def log_trial_start(self, trial: Any) -> None:
            assert answer.wait(60)
            super().log_trial_start(trial)

    tool = Slow()
    tracker = tracker_with(tool, tmp_path, [])
    tracker.start(planned())
    tracker.mark(0, message(50, 0.5))
    assert not tool.heard  # and yet we are here
    answer.set()
    tracker.close()
    assert [event for event, _ in tool.heard] == ["start", "result", "end", "over"]


def test_event_files_go_to_an_object_store_when_a_trial_ends(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(["tensorboard"], RunStore(f"file://{tmp_path}", "run"), said.append)
    tracker.start(planned())
    tracker.mark(0, message(50, 0.5))
    tracker.close()
    assert not said
    assert curve_in(tmp_path / "run/tracking/trials/0", "ray/tune/accuracy") == {50: 0.5}


def test_a_server_that_is_away_is_one_line_without_the_password(
    experiment: Experiment, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Experiment.from_tree(experiment.to_tree() | {"tracking": "mlflow", "name": "away"})
    with pytest.raises(ConfigError, match=r"^tracking: mlflow cannot be used: .*127\.0\.0\.1"):
        run_search(away, quiet=True)
    assert not (Path(away.storage) / "away").exists()


def test_addresses_lose_their_passwords() -> None:
    assert first_line(OSError("no http://me:secret@there/x\nmore")) == "no http://…@there/x"
    said = first_line(OSError("no https://user:sec/ret@there/x; more"))
    assert said == "no https://…@there/x; more"
    assert first_line(OSError()) == "OSError"


def test_an_unknown_tool_is_refused(experiment: Experiment) -> None:
    with pytest.raises(ConfigError, match="tracking"):
        Experiment.from_tree(experiment.to_tree() | {"tracking": "excel"})
