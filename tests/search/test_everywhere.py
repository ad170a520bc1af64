"""Storage is tried from every machine of a cluster before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_ray.config import Experiment
from sft_ray.errors import ResourceError
from sft_ray.search import everywhere
from sft_ray.search.cluster import capacity
from sft_ray.search.everywhere import NOT_SHARED, check_storage_everywhere, leave_a_marker
from sft_ray.search.layout import Layout, plan_layout, with_room

leaves_sockets_to_the_collector = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
NAMES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}


def test_a_marker_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "driver").write_text("here")
    assert leave_a_marker(str(tmp_path), "m") is None
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["driver"]


def test_a_machine_that_sees_another_folder_says_so_and_writes_nothing(tmp_path: Path) -> None:
    assert leave_a_marker(str(tmp_path / "other"), "m") == NOT_SHARED
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("problems", "line"),
    [
        (
            {"b": NOT_SHARED, "c": NOT_SHARED},
            "storage: /runs is not shared: 10.0.0.2, 10.0.0.3 of 3 machines see nothing that is "
            "written there; name a folder that all of them mount, or s3://…, gs://…",
        ),
        (
            {"c": "no credentials"},
            "storage: /runs cannot be used on 10.0.0.3: no credentials",
        ),
        (
            {"b": "no credentials", "c": NOT_SHARED},
            "storage: /runs cannot be used on 10.0.0.2 (and 1 more machines): no credentials",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    problems: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everywhere, "nodes", lambda: NAMES)
    monkeypatch.setattr(everywhere, "storage_problems", lambda storage, names: problems)
    with pytest.raises(ResourceError) as caught:
        check_storage_everywhere("/runs")
    assert caught.value.problems == (line,)


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Any]:
    """Three raylets on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    from sft_ray.search.cluster import RAY_ENVIRONMENT

    os.environ.update(RAY_ENVIRONMENT)
    ray.shutdown()  # of the tests before
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.cluster
@pytest.mark.own_cluster
@leaves_sockets_to_the_collector
def test_every_machine_is_asked(three_nodes: Any, tmp_path: Path) -> None:
    import ray

    names = everywhere.nodes()
    assert len(names) == 3
    # A lambda goes there as it is; a function of this file would be looked for by its name.
    answers = everywhere.ask_every_node(names, lambda: ray.get_runtime_context().get_node_id())
    assert answers == {node: node for node in names}
    check_storage_everywhere(str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cluster
@pytest.mark.own_cluster
@leaves_sockets_to_the_collector
def test_what_raises_there_is_an_answer(three_nodes: Any) -> None:
    names = everywhere.nodes()
    found = everywhere.ask_every_node(names, lambda: 1 // 0)
    assert {type(answer) for answer in found.values()} == {ZeroDivisionError}


@pytest.mark.cluster
@pytest.mark.own_cluster
@leaves_sockets_to_the_collector
def test_a_worker_that_no_machine_can_hold_is_refused(
    three_nodes: Any, tiny_experiment: Experiment
) -> None:
    def layout(cpus: int | str, workers: int) -> Layout:
        resources = {"cpus_per_worker": cpus, "workers_per_trial": workers, "slots": 1}
        experiment = Experiment.from_tree({**tiny_experiment.to_tree(), "resources": resources})
        return with_room(plan_layout(experiment, capacity()), experiment.resources)

    layout(cpus=1, workers=2)
    with pytest.raises(ResourceError, match="1 workers need 2 CPUs each, on one machine"):
        layout(cpus=2, workers=1)
    assert layout(cpus="auto", workers=1).cpus_per_worker == 1
