"""Real inputs for every task, from the texts that each installation carries."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

from sft_ray.training.builtin import docstrings
from sft_ray.training.tasks import Task


def sample_rows(
    task: Task, num_rows: int, optional: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """First sentences of docstrings in the shape that a task reads.

    Args:
        num_rows: at most about 450.
        optional: optional fields that the model reads; None: unknown, so pairs if it can be pairs.
    """
    if optional is None:
        optional = {"text_pair"} & {*task.optional_inputs}
    texts = docstrings()["test"].column("text").to_pylist()[: num_rows + 1]
    return [_row(task, text, following, optional) for text, following in pairwise(texts)]


def _row(task: Task, text: str, following: str, optional: Collection[str]) -> dict[str, Any]:
    words = text.split()
    row: dict[str, Any] = {
        "text": text,
        "text_pair": following,
        "tokens": words,
        "predicate": 0,
        "question": following,
        "context": text,
        "subject": [0, len(words[0])],
        "object": [len(text) - len(words[-1]), len(text)],
    }
    if "subject_start" in task.fields.inputs:
        return {name: row[name] for name in ("text", "subject", "object")}
    return {name: row[name] for name in (*task.fields.inputs, *optional)}
