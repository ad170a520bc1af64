"""1 = 2 = 3 workers, over memory or sockets: how many compute decides nothing about the result."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from sft_ray.config import Data
from sft_ray.training.data import open_dataset, prepare
from tests.models import TASK, tiny_model_folder, toy_rows, write_csv
from tests.training.parallel_worker import TRIALS, WAYS, run_group, run_worker

pytestmark = pytest.mark.timeout(300)

TRAIN_ROWS = 145  # 9 batches of 16 and one of 1, for which all ranks but the first have nothing
TOLERANCE = {"fp32": 1e-5, "float64": 1e-9}
SEEN = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def seen_by(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str], SEEN]:
    """(size, rank, way of summing) -> what that worker saw."""
    folder = tmp_path_factory.mktemp("parallel")
    model = tiny_model_folder(folder / "model", dropout=0.0)
    train = write_csv(folder / "train.csv", toy_rows(TRAIN_ROWS, seed=1))
    validation = write_csv(folder / "validation.csv", toy_rows(50, seed=2))
    data = Data(train=str(train), validation=str(validation), max_length=32)
    encoded = prepare(data, TASK, str(model), None, seed=17)
    assert len(open_dataset(encoded).train) == TRAIN_ROWS
    seen = {}
    for size in (1, 2, 3):
        out = folder / str(size)
        out.mkdir()
        if size == 1:
            run_worker(0, 1, model, encoded, out)
        else:
            run_group("tests.training.parallel_worker", size, [model, encoded], out)
        for rank in range(size):
            for way in WAYS if size > 1 else WAYS[:1]:
                seen[size, rank, way] = torch.load(out / f"{rank}-{way}.pt")
    return seen


@pytest.fixture(params=TOLERANCE)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TRIALS)
def trial(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[2, 3])
def pair(
    request, seen_by, precision: str, trial: str, way: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same trial as one worker and as the first of several saw it."""
    one, many = seen_by[1, 0, "memory"], seen_by[request.param, 0, way]
    return one[precision, trial], many[precision, trial]


def assert_close(first: Any, second: Any, precision: str) -> None:
    np.testing.assert_allclose(second, first, atol=TOLERANCE[precision], rtol=0)


def test_the_comparison_covers_20_steps_that_change_the_weights(seen_by, precision) -> None:
    seen = seen_by[1, 0, "memory"][precision, "whole"]
    assert [step for _, _, step, _, _ in seen["marks"]] == [2, 7, 10, 20]
    assert seen["train_loss"][-1] != seen["train_loss"][0]
    assert seen["logits"].dtype == {"fp32": torch.float32, "float64": torch.float64}[precision]


def test_all_worlds_report_the_same_marks_and_counts(pair) -> None:
    one, many = pair
    assert many["marks"] == one["marks"]
    assert one["marks"][-1] == (3, 100, 20, 20, 2 * TRAIN_ROWS)


def test_losses_are_equal(pair, precision: str) -> None:
    one, many = pair
    assert_close(one["train_loss"], many["train_loss"], precision)
    assert_close(one["penalty"], many["penalty"], precision)


def test_validation_metrics_are_equal(pair, precision: str) -> None:
    one, many = pair
    for name in ("accuracy", "macro_f1", "mcc", "loss"):
        assert_close(
            [m[name] for m in one["metrics"]], [m[name] for m in many["metrics"]], precision
        )
    assert_close(one["best"], many["best"], precision)


def test_final_weights_are_equal(pair, precision: str) -> None:
    one, many = pair
    assert many["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        # Softmax ignores a key's bias, so its gradient is rounding noise that Adam scales up.
        noise = precision == "fp32" and name.endswith(".key.bias")
        tolerance = 1e-4 if noise else TOLERANCE[precision]
        np.testing.assert_allclose(many["weights"][name], weight, atol=tolerance, rtol=0)


def test_evaluation_logits_are_equal(pair, precision: str) -> None:
    one, many = pair
    assert_close(one["logits"], many["logits"], precision)


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_hold_the_same_weights_and_logits(seen_by, precision, trial, size, way) -> None:
    first = seen_by[size, 0, way][precision, trial]
    for rank in range(1, size):
        other = seen_by[size, rank, way][precision, trial]
        assert all(torch.equal(other["weights"][n], w) for n, w in first["weights"].items())
        assert torch.equal(other["logits"], first["logits"])
        assert other["marks"] == first["marks"]
        assert other["train_loss"] == first["train_loss"]


@pytest.mark.parametrize("size", [2, 3])
def test_only_the_first_rank_has_metrics_and_best_weights(seen_by, precision, size, way) -> None:
    for rank in range(1, size):
        seen = seen_by[size, rank, way][precision, "whole"]
        assert seen["metrics"] == [{}] * 4
        assert seen["best"] is None


@pytest.mark.parametrize(("size", "way"), [(1, "memory"), *itertools.product((2, 3), WAYS)])
def test_a_trial_repeats_bitwise_after_other_trials_on_the_same_model(seen_by, size, way) -> None:
    for precision in TOLERANCE:
        first, again = (seen_by[size, 0, way][precision, name] for name in ("whole", "whole again"))
        assert again["train_loss"] == first["train_loss"]
        assert again["metrics"] == first["metrics"]
        assert all(torch.equal(again["weights"][n], w) for n, w in first["weights"].items())
