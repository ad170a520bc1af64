"""Real inputs for every task, from the texts that each installation carries."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from sft_ray.training.builtin import docstrings
from sft_ray.training.tasks import Task


def sample_rows(task: Task, num_rows: int) -> list[dict[str, Any]]:
    """First sentences of docstrings in the shape that a task reads; pairs where it can read them.

    At most about 450 rows.
    """
    texts = docstrings()["test"].column("text").to_pylist()[: num_rows + 1]
    return [_row(task, text, following) for text, following in pairwise(texts)]


def _row(task: Task, text: str, following: str) -> dict[str, Any]:
    words = text.split()
    row: dict[str, Any] = {
        "text": text,
        "text_pair": following,
        "tokens": words,
        "question": following,
        "context": text,
        "subject": [0, len(words[0])],
        "object": [len(text) - len(words[-1]), len(text)],
    }
    if "subject_start" in task.fields.inputs:
        return {name: row[name] for name in ("text", "subject", "object")}
    read = [*task.fields.inputs, *(["text_pair"] if "text_pair" in task.fields.optional else [])]
    return {name: row[name] for name in read}
