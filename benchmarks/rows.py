"""Results that survive a kill: a JSON line per finished measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
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
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        torn = "" if text.endswith("\n") or not text else "\n"  # its last line is no row, or whole
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{torn}{json.dumps(row)}\n")
    return row


def finished(out: Path) -> list[dict[str, Any]]:
    """All rows; a line that a kill has torn off is none."""
    rows = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
