"""Two workers: tasks with labels per token train as on one, and trials are taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_ray.config import Data
from sft_ray.training.data import prepare
from sft_ray.training.fitting import STEPS_PER_AGREEMENT
from sft_ray.training.tasks import TASKS
from tests.models import task_rows, write_jsonl
from tests.training.parallel_worker import run_group
from tests.training.task_worker import RESUMED, SAME, run_worker

pytestmark = pytest.mark.timeout(300)
SEEN = dict[tuple[str, Any], dict[str, Any]]
TRAIN_ROWS = 41  # the last batch of 8 has one row, and the second worker none of it


@pytest.fixture(scope="module")
def seen_by(tmp_path_factory: pytest.TempPathFactory, wide_bert: Path) -> dict[Any, SEEN]:
    """(size, rank) -> what that worker saw."""
    folder = tmp_path_factory.mktemp("parallel-tasks")
    for name in (*SAME, "text-classification"):
        rows = folder / f"{name}.jsonl"
        write_jsonl(rows, task_rows(name, TRAIN_ROWS))
        data = Data(train=str(rows), validation=str(rows), max_length=16)
        encoded = prepare(data, TASKS[name], str(wide_bert), None, seed=17)
        (folder / name).write_text(str(encoded))
    for size in (1, 2):
        (folder / str(size)).mkdir()
    run_worker(0, 1, wide_bert, folder, folder / "1")
    run_group("tests.training.task_worker", 2, [wide_bert, folder], folder / "2")
    return {
        (size, rank): torch.load(folder / str(size) / f"{rank}.pt")
        for size in (1, 2)
        for rank in range(size)
    }


@pytest.mark.parametrize("micro_batch", [100, 2])
@pytest.mark.parametrize("name", SAME)
def test_two_workers_train_as_one_to_1e_9(seen_by, name: str, micro_batch: int) -> None:
    one, two = seen_by[1, 0][name, micro_batch], seen_by[2, 0][name, micro_batch]
    assert len(one["facts"]) == len(two["facts"]) == 4
    for first, second in zip(one["facts"], two["facts"], strict=True):
        assert (first["step"], first["examples_seen"]) == (second["step"], second["examples_seen"])
        assert first["train_loss"] == pytest.approx(second["train_loss"], abs=1e-9)
        assert first["metrics"] == pytest.approx(second["metrics"], abs=1e-9)
    for weight, value in one["weights"].items():
        np.testing.assert_allclose(two["weights"][weight], value, atol=1e-9, rtol=0)
    assert one["weights"].keys() == two["weights"].keys()
    assert one["facts"][-1]["step"] >= 12
    losses = [fact["train_loss"] for fact in one["facts"]]
    assert len(set(losses)) == 4


@pytest.mark.parametrize("name", SAME)
def test_micro_batches_of_two_workers_change_nothing(seen_by, name: str) -> None:
    whole, parts = seen_by[2, 0][name, 100], seen_by[2, 0][name, 2]
    assert [f["micro_batch"] for f in parts["facts"]] == [2] * 4
    assert [f["micro_batch"] for f in whole["facts"]] == [4] * 4
    for weight, value in whole["weights"].items():
        np.testing.assert_allclose(parts["weights"][weight], value, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", SAME)
def test_both_workers_end_with_the_same_weights(seen_by, name: str) -> None:
    first, second = (seen_by[2, rank][name, 2]["weights"] for rank in (0, 1))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_two_workers_train_a_head_on_cached_tokens_as_one_bit_by_bit(seen_by) -> None:
    one, *two = (seen_by[at]["head", "whole"] for at in ((1, 0), (2, 0), (2, 1)))
    for other in two:
        assert all(torch.equal(other["weights"][n], w) for n, w in one["weights"].items())
        assert [f["train_loss"] for f in other["facts"]] == [f["train_loss"] for f in one["facts"]]
        assert {f["trunks_read"] for f in other["facts"]} == {"train+validation"}
        assert {f["micro_batch"] for f in other["facts"]} == {8}
    for first, second in zip(one["facts"], two[0]["facts"], strict=True):
        assert first["metrics"] == pytest.approx(second["metrics"], abs=1e-5)
    assert len({f["train_loss"] for f in one["facts"]}) == 4


def bare(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in fact.items() if k != "metrics"} for fact in facts]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", RESUMED)
def test_two_workers_take_up_a_trial_bit_by_bit(seen_by, name: str, rank: int) -> None:
    whole, resumed = (seen_by[2, rank][name, how] for how in ("whole", "resumed"))
    assert len(resumed["facts"]) == len(whole["facts"]) - 1
    assert bare(resumed["facts"]) == bare(whole["facts"][1:])
    assert all(torch.equal(resumed["weights"][n], w) for n, w in whole["weights"].items())
    if rank == 0:
        assert resumed["facts"] == whole["facts"][1:]
        assert resumed["best"][:3] == whole["best"][:3]
        assert all(torch.equal(resumed["best"][3][n], w) for n, w in whole["best"][3].items())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["saved", "broken off"])
@pytest.mark.parametrize("name", RESUMED)
def test_two_workers_write_states_and_break_evaluations_off_bit_by_bit(
    seen_by, name: str, how: str, rank: int
) -> None:
    whole, other = (seen_by[2, rank][name, which] for which in ("whole", how))
    # What the second worker padded is its own: the state holds the first one's.
    own = {"padding_share"} if rank else set()
    assert [{k: v for k, v in fact.items() if k not in own} for fact in other["facts"]] == [
        {k: v for k, v in fact.items() if k not in own} for fact in whole["facts"]
    ]
    assert all(torch.equal(other["weights"][n], w) for n, w in whole["weights"].items())
    assert (other["best"] or [])[:3] == (whole["best"] or [])[:3]


@pytest.mark.parametrize("name", RESUMED)
def test_several_workers_agree_on_a_state_now_and_then(seen_by, name: str) -> None:
    steps = [seen_by[2, rank][name, "steps"]["of states"] for rank in (0, 1)]
    last = seen_by[2, 0][name, "whole"]["facts"][-1]["step"]
    assert steps == [[*range(0, last, STEPS_PER_AGREEMENT)], []]


@pytest.mark.parametrize("how", ["whole", "resumed"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_the_first_worker_has_metrics_and_states(seen_by, name: str, how: str) -> None:
    check_roles(seen_by, name, how)


@pytest.mark.parametrize("how", ["whole", "resumed"])
def test_marks_of_one_step_keep_these_roles(seen_by, how: str) -> None:
    check_roles(seen_by, "one step", how)


def check_roles(seen_by, name: str, how: str) -> None:
    first, second = (seen_by[2, rank][name, how] for rank in (0, 1))
    assert all(first["has_state"])
    assert all(fact["metrics"] for fact in first["facts"])
    assert not any(second["has_state"])
    assert not any(fact["metrics"] for fact in second["facts"])
    assert second["best"] is None
