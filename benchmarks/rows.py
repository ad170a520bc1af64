"""Results that survive a kill: a JSON line per finished measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(out: Path | None, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> Any:
    """The row of `out` that has all of `key`; measured now, and written there, if there is none.

    Args:
        key: everything that the measurement depends on, as JSON has it.
    """
    for row in [] if out is None else finished(out):
        if key.items() <= row.items():
            return row
    row = key | measure()
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return row


def finished(out: Path) -> list[dict[str, Any]]:
    """All rows; a line that a kill has torn off goes."""
    if not out.exists():
        return []
    text = out.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        out.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
