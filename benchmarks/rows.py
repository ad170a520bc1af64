"""Results that survive a kill: a JSON line per finished measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(out: Path | None, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> Any:
    """The row of `out` that has all of `key`; measured now, and written there, if there is none."""
    text = out.read_text(encoding="utf-8") if out is not None and out.exists() else ""
    for line in text.splitlines():
        row = json.loads(line)
        if key.items() <= row.items():
            return row
    row = key | measure()
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return row
