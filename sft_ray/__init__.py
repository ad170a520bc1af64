"""sft_ray: the best fine-tuned encoder for a budget, and a number to trust."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Experiment", "__version__", "search"]

if TYPE_CHECKING:
    from sft_ray.config import Experiment
    from sft_ray.search.tuner import run_search as search


def __getattr__(name: str) -> object:
    """Import on first use, so that `import sft_ray` stays instant."""
    if name == "Experiment":
        from sft_ray.config import Experiment

        return Experiment
    if name == "search":
        import importlib

        return importlib.import_module("sft_ray.search")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
