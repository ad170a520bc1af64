"""What every command must do with bad input: exit code 2, one plain line, nothing changed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest

from sft_ray.cli import main

MOST_CHARACTERS = 700  # of a line
STARTED = "reading model and data …\n"  # what a plan and a search say before they look


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with what a change of it would change."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found


def check_refused(
    arguments: Sequence[str],
    fragments: Sequence[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    code: int = 2,
    stdin: str = "",
) -> str:
    """Run a command in this process that must refuse; the line it says.

    Args:
        folder: in which nothing may change.
    """
    before = listing(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
    printed = capsys.readouterr()
    assert caught.value.code == code, printed
    check_line(printed.err, fragments)
    assert printed.out in ("", STARTED)
    assert listing(folder) == before
    return printed.err


def check_line(said: str, fragments: Sequence[str]) -> None:
    """One line that a user can act on."""
    lines = said.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < MOST_CHARACTERS, len(lines[0])
    assert "Traceback" not in said
    for fragment in fragments:
        assert fragment in said, said
