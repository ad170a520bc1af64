"""What a `sitecustomize` ends with that changes the training loop in every process of a search."""

from __future__ import annotations

from pathlib import Path

# Calls `plant(module)`, which stands before it, when the training loop is imported.
PLANTER = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "sft_ray.training.fitting":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        honest_exec = spec.loader.exec_module
        def exec_module(module):
            honest_exec(module)
            plant(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def plant_in(folder: Path, code: str) -> None:
    """Have every process with this folder in its PYTHONPATH run code that defines `plant`."""
    (folder / "sitecustomize.py").write_text(code + PLANTER, encoding="utf-8")
