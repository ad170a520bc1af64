"""What CONTRIBUTING.md promises: a new task is one row of a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_ray.analysis.report.page import render
from sft_ray.analysis.report.run import Run
from sft_ray.serving.evaluate import run_evaluation
from sft_ray.serving.predict import load_predictor
from sft_ray.single_trial import run_training
from sft_ray.training.tasks import TASKS
from tests.test_docs import EXAMPLES, prepared


def absolute_error(logits: torch.Tensor, labels: torch.Tensor, *_: Any) -> torch.Tensor:
    """|output - value|, [n]."""
    return (logits.squeeze(1) - labels.to(logits.dtype)).abs()


def test_a_new_task_is_trained_scored_reported_and_predicts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    regression = TASKS["regression"]
    toy = replace(
        regression,
        name="robust-regression",
        loss=absolute_error,
        metrics={"mae": "minimize"},
        score=lambda *found: {"mae": regression.score(*found)["mae"]},
    )
    monkeypatch.setitem(TASKS, toy.name, toy)
    lines, tree = next(one for one in EXAMPLES if one[1]["task"] == "regression")
    tree = {**tree, "task": toy.name, "train": {"epochs": 1, "learning_rate": 5e-3}}
    tree["search"] = {"rungs": []}
    result = run_training(prepared(tmp_path, tiny_model, lines, tree), quiet=True)
    found = result.best["validation"]
    assert result.tree["metric"] == "mae"
    assert set(found) == {"mae"}
    again = run_evaluation(result.location, "validation").metrics
    assert again == pytest.approx(found, abs=1e-6)
    assert "mae" in render(Run.load(result.location))
    [answer] = load_predictor(f"{result.location}/best").predict(
        [{"text": "one cat", "text_pair": "two cats"}]
    )
    assert set(answer) == {"value"}
