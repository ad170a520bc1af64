"""Results that survive a kill: a JSON line per finished measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
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
        append(out, row)
    return row


def append(out: Path, row: dict[str, Any]) -> None:
    """Add a row, on a line of its own also behind one that a kill has torn off."""
    text = out.read_text(encoding="utf-8") if out.exists() else ""
    with out.open("a", encoding="utf-8") as file:
        file.write("\n" * (text != "" and not text.endswith("\n")) + json.dumps(row) + "\n")


def finished(out: Path) -> list[dict[str, Any]]:
    """All rows; a line that a kill has torn off is none."""
    rows = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def in_a_process(module: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """The row that a bench prints last, run by itself with data and trunks cached for it alone."""
    with tempfile.TemporaryDirectory() as cache:
        found = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "SFT_RAY_CACHE": cache, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return row
