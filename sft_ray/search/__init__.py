"""The search on Ray and Optuna.

`sft_ray.search` is both this package and the function that runs a search: calling the package
is calling `sft_ray.search.tuner.run_search`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_ray.analysis.results import SearchResult
    from sft_ray.config import Experiment


class _CallablePackage(ModuleType):
    def __call__(self, experiment: "Experiment", **options: Any) -> "SearchResult":
        from sft_ray.search.tuner import run_search

        return run_search(experiment, **options)


sys.modules[__name__].__class__ = _CallablePackage
