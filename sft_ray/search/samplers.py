"""Who proposes configurations: Optuna's samplers, and an enumeration of finite spaces."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from sft_ray import space as spaces
from sft_ray.config import Search
from sft_ray.errors import ConfigError
from sft_ray.space import Choice, Numeric, OneOf, Space
from sft_ray.training.seeds import derived_seed


def build_sampler(search: Search, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """A sampler built anew for one trial: a reopened study goes on as if never closed.

    Only `qmc` keeps one seed, because its trials are points of one sequence; the study counts them.
    """
    own = derived_seed(seed, "sampler", number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "`gamma` has been deprecated", FutureWarning)
        if search.sampler == "qmc":
            return SobolSampler(spaces.domains(search.domains), derived_seed(seed, "sampler"))
        if search.sampler == "gp":
            return optuna.samplers.GPSampler(
                seed=own, deterministic_objective=False, warn_independent_sampling=False
            )
        if search.sampler == "tpe":
            # Running trials count as bad ones, which keeps parallel suggestions apart.
            return optuna.samplers.TPESampler(
                seed=own, multivariate=True, group=True, constant_liar=True, gamma=num_good
            )
        if search.sampler == "nsga2":
            generations = max(2, math.isqrt(search.trials))
            return optuna.samplers.NSGAIISampler(
                seed=own, population_size=max(2, search.trials // generations)
            )
    return optuna.samplers.RandomSampler(seed=own)  # of grid too, whose every value is proposed


class SobolSampler(optuna.samplers.QMCSampler):
    """A scrambled Sobol sequence over every parameter that can occur in a space.

    Optuna's takes those of the first trial that finished, and draws others from one and the same
    state: the default recipe may lack some, and a penalty's strength is there in some trials only.
    """

    def __init__(self, domains: Mapping[str, Numeric | Choice], seed: int) -> None:
        super().__init__(seed=seed, scramble=True, warn_independent_sampling=False)
        found = {name: distribution_of(domain) for name, domain in domains.items()}
        self._distributions = {name: d for name, d in found.items() if not d.single()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._distributions


def distribution_of(domain: Numeric | Choice) -> BaseDistribution:
    """A domain in Optuna's words."""
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def num_good(num_trials: int) -> int:
    """How many of the best trials TPE takes as good.

    A quarter: fine-tuning scores are noisy, and Optuna's tenth of them, two or three trials for
    most of a search, is mostly luck (benchmarks/RESULTS.md).  The original takes a quantile too, of
    0.15 (Bergstra et al. 2011).
    """
    return math.ceil(num_trials / 4)


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Every configuration of a finite space as flat parameters, the last dimension fastest.

    Raises:
        ConfigError: a dimension has infinitely many values.
    """
    axes = [_axis(f"search.space.{path}", path, domain) for path, domain in space.items()]
    return [
        {name: value for part in point for name, value in part.items()}
        for point in itertools.product(*axes)
    ]


def _axis(where: str, path: str, domain: Any) -> list[dict[str, Any]]:
    if isinstance(domain, OneOf):
        return [
            {f"{path}.kind": kind, **{k: v for part in point for k, v in part.items()}}
            for kind, fields in domain.branches.items()
            for point in itertools.product(
                *(
                    _axis(f"{where}.{kind}.{name}", f"{path}.{kind}.{name}", sub)
                    for name, sub in fields.items()
                    if isinstance(sub, Numeric | Choice)
                )
            )
        ]
    if isinstance(domain, Choice):
        return [{path: option} for option in domain.options]
    if not isinstance(domain, Numeric):
        return [{}]  # a constant
    if not domain.is_finite:
        raise ConfigError(
            f"{where}: a grid needs finitely many values, got {spaces.describe(domain)}; write "
            "`choice: […]`"
        )
    if domain.integer:
        return [{path: value} for value in range(int(domain.low), int(domain.high) + 1)]
    return [{path: float(domain.low)}]
