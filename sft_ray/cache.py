"""Folders that are built once per machine and shared by all processes on it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_root() -> Path:
    """`$SFT_RAY_CACHE`, else `~/.cache/sft_ray`."""
    return Path(os.environ.get("SFT_RAY_CACHE") or Path.home() / ".cache" / "sft_ray")


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build` if it does not exist yet.

    Concurrent callers wait for one builder; a builder that dies leaves nothing behind that a
    later caller would take for finished, because the folder is renamed into place at the end.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
            unfinished.mkdir()
            try:
                build(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder
