"""What docs/tasks.md shows is what works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_ray.config import Experiment, Train
from sft_ray.training.preparation import prepare_training
from sft_ray.training.tasks import TASKS
from sft_ray.yaml_text import parse_yaml

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every data snippet with the experiment that follows it."""
    lines = ""
    for language, body in BLOCKS:
        if language == "jsonl":
            lines = body
        elif language == "yaml":
            yield lines, parse_yaml(body, "docs/tasks.md")


EXAMPLES = list(examples())


def prepared(folder: Path, model: Path, lines: str, tree: dict[str, Any]) -> Experiment:
    """The documented experiment over its documented rows, with a tiny model."""
    data = folder / tree["data"]["train"]
    data.write_text(lines * 15, encoding="utf-8")
    tree["data"] |= {"train": str(data), "max_length": 64}
    storage = str(folder / "runs")
    return Experiment.from_tree({**tree, "model": str(model), "storage": storage})


@pytest.mark.parametrize("example", EXAMPLES, ids=[tree["name"] for _, tree in EXAMPLES])
def test_every_documented_experiment_can_be_prepared(example, tmp_path, tiny_model) -> None:
    lines, tree = example
    experiment = prepared(tmp_path, tiny_model, lines, tree)
    assert len(prepare_training(experiment).dataset.train) > 10


def test_every_task_is_documented_with_its_metrics() -> None:
    assert {tree["task"] for _, tree in EXAMPLES} == set(TASKS)
    for name, task in TASKS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}`"))
        assert row.split("|")[4].strip() == ", ".join(task.metrics)


def test_every_setting_of_train_is_documented() -> None:
    table = PAGE[PAGE.index("## Settings of `train`") :]
    missing = [name for name in Train.model_fields if f"`{name}`" not in table]
    assert missing == ["learning_rate", "epochs"]


def test_the_python_of_the_page_runs(tmp_path: Path, tiny_model: Path, monkeypatch, capsys) -> None:
    lines, tree = EXAMPLES[0]
    experiment = prepared(tmp_path, tiny_model, lines, tree)
    (tmp_path / "reviews.yaml").write_text(experiment.model_dump_json(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    scripts = [body for language, body in BLOCKS if language == "python"]
    assert len(scripts) == 2
    for script in scripts:
        exec(script, {})
    assert "'probability'" in capsys.readouterr().out
