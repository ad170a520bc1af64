"""A search over several raylets: one only fails, one is taken away."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from sft_ray.config import Experiment
from tests.faults import break_bad_machines

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.own_cluster,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_search_outlives_its_machines(
    tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    from sft_ray.search.cluster import RAY_ENVIRONMENT
    from sft_ray.search.tuner import run_search

    os.environ.update(RAY_ENVIRONMENT)
    tree = tiny_experiment.to_tree()
    tree["search"] |= {"trials": 10, "default_recipe": False, "pruner": "none"}
    tree["search"]["space"] = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    tree["train"] |= {"epochs": 60, "batch_size": 8}
    tree["resources"] = {"workers_per_trial": 1}
    experiment = Experiment.from_tree({**tree, "name": "x", "storage": str(tmp_path / "runs")})
    run = tmp_path / "runs" / "x"

    ray.shutdown()  # of the tests before
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    good = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1, env_vars={"BAD": "1"})

    def take_away() -> None:
        while not list(run.glob("trials/*/trial.json")):
            time.sleep(0.5)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        gcs = ray._raylet.GcsClient(address=cluster.address)
        gcs.drain_node(good.node_id, reason, "spot notice", int(1000 * (time.time() + 60)))

    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={
            "worker_process_setup_hook": break_bad_machines,
            "env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])},
        },
    )
    try:
        threading.Thread(target=take_away, daemon=True).start()
        result = run_search(experiment)
    finally:
        ray.shutdown()
        cluster.shutdown()
    said = capsys.readouterr().out
    assert "failed 3 trials in a row: not used again" in said, said
    assert "is taken away in 5" in said or "is taken away in 6" in said, said
    assert "moves    behind" in said
    assert "room for 2 slots now, before for 3" in said
    trials = json.loads((run / "results.json").read_text())["trials"]
    assert [t["number"] for t in trials] == list(range(10))
    assert {t["state"] for t in trials} == {"COMPLETE"}, said
    assert result.best["complete"]
