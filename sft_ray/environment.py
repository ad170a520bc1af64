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
        "processor": processor(),
        **facts,
    }


def continued(now: dict[str, Any], before: Any) -> dict[str, Any]:
    """The environment of a run that goes on: what was otherwise stands under `earlier`, in order.

    Args:
        before: what environment.json said, if it could be read.
    """
    if not isinstance(before, dict):
        return now
    other = {key: value for key, value in before.items() if value != now.get(key)}
    earlier = other.pop("earlier", None)
    earlier = [*(earlier if isinstance(earlier, list) else []), *([other] if other else [])]
    return {**now, "earlier": earlier} if earlier else now


def processor() -> str | None:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def _commit() -> str | None:
    """The commit of the source checkout this package runs from, if it does.

    A package installed somewhere inside another project's checkout is not of its commit.
    """
    git, here = shutil.which("git"), Path(__file__)
    if git is None or not _said([git, "-C", str(here.parent), "ls-files", here.name]):
        return None
    return _said([git, "-C", str(here.parent), "rev-parse", "HEAD"]) or None


def _said(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.strip()
