"""What a server takes in and gives out, apart from how it is served."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sft_ray.errors import DataError
from sft_ray.serving.predict import Predictor


@dataclass(frozen=True)
class Limits:
    """What one request may be.

    Attributes:
        body_bytes: of the whole request.
        rows: inputs in one request.
        characters: of one input, all its fields together.
    """

    body_bytes: int = 1_000_000
    rows: int = 256
    characters: int = 20_000


def read_request(
    body: bytes, predictor: Predictor, limits: Limits
) -> tuple[list[dict[str, Any]], bool]:
    """Checked rows of a body that is one JSON object or a list of them, and whether it was a list.

    Raises:
        DataError: in one line, what is wrong.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is no JSON: {error}") from None
    rows = found if isinstance(found, list) else [found]
    if not rows or not all(isinstance(row, dict) for row in rows):
        example = predictor.task.example_row(predictor.optional or ())
        raise DataError(f"the body must be one input like {example}, or a list of them")
    if len(rows) > limits.rows:
        raise DataError(f"at most {limits.rows} inputs per request, got {len(rows)}")
    for number, row in enumerate(rows, start=1):
        if (length := _characters(row)) > limits.characters:
            raise DataError(f"input {number}: at most {limits.characters} characters, got {length}")
        try:
            predictor.checked([row])
        except DataError as error:
            line = error.problems[0].removeprefix("input 1: ").removeprefix("input: ")
            raise DataError(f"input {number}: {line}") from None
    return rows, isinstance(found, list)


def answer_together(predictor: Predictor, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers in order; only rows with the same fields of the same types make one table."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        shape = tuple(sorted((name, type(value).__name__) for name, value in row.items()))
        groups.setdefault(shape, []).append(place)
    found: list[dict[str, Any]] = [{}] * len(rows)
    for places in groups.values():
        answers = predictor.predict(rows[place] for place in places)
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    return found


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1
