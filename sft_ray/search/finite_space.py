"""Spaces with few configurations, none of which is worth training twice."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial
from pydantic import ValidationError

from sft_ray import space as spaces
from sft_ray.config import Search, Train, apply_values
from sft_ray.config_problems import explain
from sft_ray.errors import ConfigError
from sft_ray.search.samplers import grid_points
from sft_ray.space import Choice, Numeric, OneOf, Space

MOST_POINTS = 10_000  # of a larger space, which no search comes to the end of, none are listed


class FiniteSpace:
    """A space with countably few configurations, none of which is to be tried twice.

    Raises:
        ConfigError: some combination of values is not a valid configuration.
    """

    def __init__(self, space: Space, train: Train) -> None:
        self.space, self.train = space, train
        points = grid_points(space)
        try:
            keys = [self.key_of(point) for point in points]
        except ValidationError as error:
            problem = f"search.space: not all combinations work: {explain(error, Train)[0]}"
            raise ConfigError(problem) from None
        self.points = dict(zip(map(str, keys), points, strict=True))  # a point is never partial

    @classmethod
    def of(cls, search: Search, train: Train) -> FiniteSpace | None:
        """None for a space of more configurations than are kept count of; a grid's always are."""
        is_kept = search.sampler == "grid" or num_points(search.domains) <= MOST_POINTS
        return cls(search.domains, train) if is_kept else None

    def key_of(self, params: Mapping[str, Any]) -> str | None:
        """Equal for parameters that train the same configuration."""
        return key_of_point(self.space, self.train, params)

    def untried(self, tried: Container[str]) -> dict[str, dict[str, Any]]:
        """The points that are not among these keys of trained ones, by key."""
        return {key: point for key, point in self.points.items() if key not in tried}


def keys_of_trained(trials: Sequence[FrozenTrial]) -> frozenset[str]:
    """Of the configurations that trials have trained, or are training."""
    return frozenset(key_of(t.user_attrs["train"]) for t in trials if "train" in t.user_attrs)


def key_of_point(space: Space, train: Train, params: Mapping[str, Any]) -> str | None:
    """Of the configuration that flat parameters train; None if they leave some of it open."""
    try:
        values = spaces.draw(space, lambda name, _: params[name])
    except KeyError:
        return None
    return key_of(apply_values(train, values).model_dump())


def num_points(space: Space) -> float:
    """Configurations of a space; infinite with a range of real numbers."""
    return math.prod(_num_values(domain) for domain in space.values())


def _num_values(domain: Any) -> float:
    if isinstance(domain, OneOf):
        return sum(
            math.prod(_num_values(sub) for sub in fields.values())
            for fields in domain.branches.values()
        )
    if isinstance(domain, Choice):
        return len(domain.options)
    if isinstance(domain, Numeric):
        return domain.high - domain.low + 1 if domain.is_finite else math.inf
    return 1


def key_of(train: Mapping[str, Any]) -> str:
    """A configuration as a text that can be compared, without what it does not read."""
    idle = {
        "momentum": train["optimizer"] != "sgd",
        "cooldown": train["schedule"] != "constant_with_cooldown",
    }
    read = {name: value for name, value in train.items() if not idle.get(name)}
    return json.dumps(read, sort_keys=True)
