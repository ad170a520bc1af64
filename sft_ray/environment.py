"""What a run happened on: versions and hardware; no names of machines, no variables."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_ray import __version__

REPORTED_PACKAGES = ("ray", "torch", "transformers", "optuna", "datasets", "pyarrow", "numpy")


def describe_environment(facts: dict[str, Any]) -> dict[str, Any]:
    """Versions, commit and hardware, and the caller's own facts behind them."""
    return {
        "sft_ray": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in REPORTED_PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **facts,
    }


def _commit() -> str | None:
    """The commit of the source checkout this package runs from, if it does."""
    git = shutil.which("git")
    if git is None:
        return None
    found = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
