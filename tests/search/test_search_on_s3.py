"""A whole search on a real S3 API: killed, and taken up from another folder with nothing local."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sft_ray.analysis.results import SearchResult
from sft_ray.config import Experiment
from sft_ray.run_store import open_run
from tests.s3 import BUCKET, CREDENTIALS, names_below, options, s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

# A Ray of its own, whose workers have the credentials in their environment.
DRIVER = """
    import json, os, sys, time
    from sft_ray.config import Experiment
    from sft_ray.search import conductor
    from sft_ray.search.tuner import run_search

    experiment, dies = Experiment.from_tree(json.load(open(sys.argv[1]))), sys.argv[2] == "dies"
    honest = conductor.Conductor.on_message
    def on_message(self, tune_id, message):
        finished = sum(t.state.is_finished() for t in self.trials.trials)
        go_on = honest(self, tune_id, message)
        if dies and finished == 2 and message["index"] == 1 and go_on:
            state = f"{self.planned[tune_id].folder}/last/checksums.json"
            # For uploads that nobody else waits for: of the state, and of the study.
            while not self.store.exists(state) or self._ended:
                self.settle()
                time.sleep(0.1)
            os.kill(os.getpid(), 9)
        return go_on
    conductor.Conductor.on_message = on_message
    run_search(experiment, address="local")
"""


def drive(folder: Path, tree: dict[str, Any], how: str) -> subprocess.CompletedProcess[str]:
    """Run the search in a process of its own, in a folder and a cache of its own."""
    folder.mkdir()
    (folder / "tree.json").write_text(json.dumps(tree))
    (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
    return subprocess.run(
        [sys.executable, "driver.py", "tree.json", how],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "SFT_RAY_CACHE": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_search_on_s3_is_killed_and_goes_on_elsewhere(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as port:
        storage = f"s3://{BUCKET}/runs{options(port)}"
        tree = tiny_experiment.model_copy(update={"storage": storage}).to_tree()
        # The default recipe and what it is compared with run to their end.
        space = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "train.epochs": 2}
        tree["search"] |= {"pruner": "none", "space": space}
        tree["checkpoint"] |= {"every_minutes": 1e-6, "keep": 1}
        died = drive(tmp_path / "one", tree, "dies")
        assert died.returncode == -9, died.stderr
        store = open_run(f"s3://{BUCKET}/runs/tiny{options(port)}")
        assert not store.exists("results.json")
        assert store.exists("lease.json")
        before = {p: store.read_bytes(p) for p in store.files_below("") if p.endswith("trial.json")}
        assert len(before) == 2
        [state] = [path for path in store.files_below("trials") if path.endswith("/state.json")]

        done = drive(tmp_path / "two", tree, "lives")
        assert done.returncode == 0, done.stderr
        assert "is gone; taking over" in done.stdout
        result = SearchResult.load(store.location)
        assert [row["number"] for row in result.trials] == [0, 1, 2, 3]
        assert {path: store.read_bytes(path) for path in before} == before
        metrics = (store.read_text(state.replace("last/state.json", "metrics.jsonl")) or "").split(
            "\n"
        )
        assert json.loads(metrics[0])["replayed"]  # taken up from its last state
        assert len(result.study.trials) == 4
        kept = {path.split("/")[1] for path in store.files_below("trials") if "/best/" in path}
        assert kept == {str(result.best["trial"])}
        assert store.is_intact("best")
        assert not [path for path in store.files_below("") if "/last/" in path]
        assert not store.exists("lease.json")
        assert names_below(port, "runs/.ray") == []

        again = drive(tmp_path / "three", tree, "lives")
        assert "is finished; its outcome" in again.stdout
        straight = drive(tmp_path / "four", {**tree, "name": "straight"}, "lives")
        assert straight.returncode == 0, straight.stderr
        whole = SearchResult.load(f"s3://{BUCKET}/runs/straight{options(port)}")
        for mine, theirs in zip(result.trials, whole.trials, strict=True):
            assert (mine["params"], mine["curve"]) == (theirs["params"], theirs["curve"])
        for name in ("one", "two", "three", "four"):
            assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in (done.stdout + done.stderr), name
