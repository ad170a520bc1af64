"""An ablation as one tree: what is varied around which base, over how many seeds."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from sft_ray.config import Name, Section, Train, apply_values
from sft_ray.config_problems import explain
from sft_ray.errors import ConfigError, did_you_mean
from sft_ray.location import Location
from sft_ray.space import FROZEN_LAYERS
from sft_ray.yaml_text import read_tree

SHARE = "data.train_share"  # of the training rows
LEARNING_RATE, BATCH_SIZE = "train.learning_rate", "train.batch_size"
MOST_ARMS = 200
# How the learning rate follows the batch size: not, by its square root, or in proportion.
EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class Ablation(Section):
    """The contract of an ablation's YAML.

    `base` is a run folder, for its winner, or an experiment's YAML, for its `train` section.
    `vary` is a grid: dotted path -> values, or `every` for each frozen depth of the model; `arms`
    are configurations written out.  Both name only what departs from the base.
    """

    name: Name  # of its folder
    base: Location  # run folder, for its winner, or an experiment's YAML, for its `train`
    # A grid: path -> values; every: each number of frozen layers.
    vary: dict[str, list[Any] | Literal["every"]] = {}
    arms: list[dict[str, Any]] = []  # configurations written out: path -> value
    # How the learning rate follows train.batch_size in `vary`; each makes an arm.
    learning_rate_scaling: Annotated[
        list[Literal["none", "sqrt", "linear"]], Field(min_length=1)
    ] = ["none"]
    seeds: Annotated[int, Field(ge=2, le=1000)] = 5  # the same for all arms
    costs: list[Literal["train_seconds", "trained_parameters", "memory_bytes"]] = []  # in figures

    @classmethod
    def load(cls, path: str, overrides: list[str]) -> Self:
        """Read a YAML file and apply `key=value` overrides.

        Raises:
            ConfigError: every problem found, one line each, led by the file's name.
        """
        try:
            return cls.model_validate(read_tree(path, overrides))
        except ValidationError as error:
            raise ConfigError(*(f"{path}: {problem}" for problem in explain(error, cls))) from None

    @field_validator("arms")
    @classmethod
    def _not_empty(cls, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not all(arms):
            raise ValueError("an arm changes something, got {}; the base is there in any case")
        return arms

    @field_validator("name")
    @classmethod
    def _not_taken(cls, name: str) -> str:
        if name == "runs":
            raise ValueError("`runs` is the folder of all ablations' runs; take another name")
        return name

    @model_validator(mode="after")
    def _scales_something(self) -> Self:
        if self.learning_rate_scaling != ["none"] and BATCH_SIZE not in self.vary:
            raise ValueError(
                f"learning_rate_scaling goes with {BATCH_SIZE} in `vary`, got "
                f"{self.learning_rate_scaling}; remove it or vary the batch size"
            )
        return self

    @model_validator(mode="after")
    def _known_paths(self) -> Self:
        known = [f"train.{name}" for name in Train.model_fields] + [SHARE]
        for path in [*self.vary, *(path for arm in self.arms for path in arm)]:
            if path not in known:
                raise ValueError(
                    f"only fields of train and {SHARE} can be varied, got {path!r}; "
                    f"{did_you_mean(path, known)}"
                )
        for path, values in self.vary.items():
            if values == "every" and path != FROZEN_LAYERS:
                raise ValueError(f"`every` goes with {FROZEN_LAYERS}, got it for {path}; list them")
            if not values:
                raise ValueError(f"{path} needs values to vary over, got an empty list")
        if not self.vary and not self.arms:
            raise ValueError("nothing is varied; give `vary` or `arms`")
        return self

    def changes(self, base: Train, num_layers: int) -> list[dict[str, Any]]:
        """What each arm but the base changes, by dotted path; no two are the same.

        Raises:
            ConfigError: a value that its field does not take, or too many arms.
        """
        grid = {
            path: list(range(num_layers + 1)) if values == "every" else values
            for path, values in self.vary.items()
        }
        points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        scaled = [
            _with_learning_rate(point, base, scaling)
            for point in (points if grid else [])
            for scaling in self.learning_rate_scaling
        ]
        found: list[dict[str, Any]] = []
        problems: list[str] = []
        for written in [*scaled, *self.arms]:
            try:
                change = _departure(written, base)
            except ValidationError as error:
                problems += [f"{self.name}: train.{problem}" for problem in explain(error, Train)]
                continue
            except ValueError as error:
                problems.append(f"{self.name}: {error}")
                continue
            if change and change not in found:
                found.append(change)
        if len(found) > MOST_ARMS:
            problems.append(f"{self.name}: at most {MOST_ARMS} arms, got {len(found)}")
        if not found and not problems:
            problems.append(f"{self.name}: no arm departs from the base; vary something else")
        if problems:
            raise ConfigError(*dict.fromkeys(problems))
        return found


def configuration(base: Train, change: dict[str, Any]) -> tuple[Train, float]:
    """An arm's `train` section and its share of the training rows."""
    values = {path: value for path, value in change.items() if path != SHARE}
    return apply_values(base, values), float(change.get(SHARE, 1.0))


def _with_learning_rate(point: dict[str, Any], base: Train, scaling: str) -> dict[str, Any]:
    """The point with its learning rate following its batch size."""
    size, exponent = point.get(BATCH_SIZE), EXPONENTS[scaling]
    if exponent == 0 or not isinstance(size, int) or size < 1 or size == base.batch_size:
        return point
    rate = point.get(LEARNING_RATE, base.learning_rate)
    return {**point, LEARNING_RATE: float(f"{rate * (size / base.batch_size) ** exponent:.6g}")}


def _departure(written: dict[str, Any], base: Train) -> dict[str, Any]:
    """The part of a written arm in which it differs from the base.

    Raises:
        ValidationError: a field does not take its value.
        ValueError: the share is none.
    """
    share = written.get(SHARE, 1.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{SHARE} is above 0 and at most 1, got {share!r}")
    train, _ = configuration(base, {path: v for path, v in written.items() if path != SHARE})
    return {
        path: value
        for path, value in written.items()
        if (
            share < 1
            if path == SHARE
            else getattr(train, path.removeprefix("train."))
            != getattr(base, path.removeprefix("train."))
        )
    }
