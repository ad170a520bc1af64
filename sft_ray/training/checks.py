"""Checks of rows that look at several fields at once; each yields one clear line at most."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from sft_ray.training.columns import answer_pairs
from sft_ray.training.encoding import predicate_position


def nothing(table: pa.Table) -> Iterator[str]:
    yield from ()


def check_tags(table: pa.Table) -> Iterator[str]:
    """As many tags as words; a predicate that is one clear word."""
    fields = [name for name in ("tokens", "tags", "predicate") if name in table.column_names]
    for number, row in enumerate(table.select(fields).to_pylist(), start=1):
        words, tags = row["tokens"], row.get("tags")
        if tags is not None and len(words) != len(tags):
            yield f"row {number} has {len(words)} tokens and {len(tags)} tags; each needs one"
            return
        predicate = row.get("predicate")
        if "predicate" in row and predicate_position(words, predicate) is None:
            yield (
                f"row {number}: the predicate {predicate!r} is not one clear word of the row; "
                "give its number, from 0"
            )
            return


def check_spans(table: pa.Table) -> Iterator[str]:
    """Entities lie inside their text."""
    for number, row in enumerate(table.to_pylist(), start=1):
        for entity in ("subject", "object"):
            start, end = row[f"{entity}_start"], row[f"{entity}_end"]
            if not start < end <= len(row["text"]):
                yield (
                    f"row {number}: the {entity} [{start}, {end}) is no span of the text, which "
                    f"has {len(row['text'])} characters"
                )
                return


def check_answers(table: pa.Table) -> Iterator[str]:
    """Answers stand in their context where they say."""
    if "answers" not in table.column_names or table.column("answers").null_count:
        return
    for number, row in enumerate(table.select(["context", "answers"]).to_pylist(), start=1):
        for text, start in answer_pairs(row["answers"]):
            if start < 0 or row["context"][start : start + len(text)] != text:
                yield (
                    f"row {number}: the answer {text[:60]!r} does not stand at character {start} "
                    "of its context; mend answer_start"
                )
                return
