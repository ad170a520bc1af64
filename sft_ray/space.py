"""Search spaces as pure data: domains with both ends inclusive, conditional choices, priors.

A space maps a dotted path of the experiment (`train.learning_rate`) to a domain.  Nothing here
knows a sampler: `draw` walks a space and asks a callable for each value, so Optuna, a prior and
a test all use the same walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_ray.errors import ConfigError, did_you_mean
from sft_ray.recipes import RECIPES, Recipe, learning_rate_range, prior_of

NUMERIC_KINDS = ("uniform", "log_uniform", "int", "log_int")
KINDS = (*NUMERIC_KINDS, "choice", "one_of")
FROZEN_LAYERS = "train.frozen_layers"
PRIOR_KEYS = {"center", "spread", "frozen_factor"}
# Where a regularisation kind is searched without a written range.  The scale follows the size of
# the penalty's gradient: a sign for l1, a weight (about 0.04) for l2, a drift (about 0.001) for
# l2_sp; decoupled weight decay spans the published 0.01 and 0.1.
DEFAULT_STRENGTH = {
    "weight_decay": {"log_uniform": [1.0e-3, 0.3]},
    "l1": {"log_uniform": [1.0e-7, 1.0e-4]},
    "l2": {"log_uniform": [1.0e-6, 1.0e-2]},
    "l2_sp": {"log_uniform": [1.0e-5, 1.0e-1]},
}


@dataclass(frozen=True)
class Prior:
    """Where good values are believed to lie: the middle, and one standard deviation around it.

    `spread` is a factor on a logarithmic domain (3 means 1/3 to 3 times the center) and a
    difference on a linear one.  With all of a model's layers frozen the center is `frozen_factor`
    times as high, with nothing frozen as it stands, geometrically in between.
    """

    center: float
    spread: float
    frozen_factor: float = 1.0


@dataclass(frozen=True)
class Numeric:
    """A range of numbers; `low` and `high` can both be drawn."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    prior: Prior | None = None

    @property
    def is_finite(self) -> bool:
        """Whether only finitely many numbers can be drawn."""
        return self.integer or self.low == self.high

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.integer else int | float):
            return False
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """One of the written values; 1 and 1.0 are the same, and neither is true."""

    options: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        return any(
            value == option and isinstance(value, bool) == isinstance(option, bool)
            for option in self.options
        )


@dataclass(frozen=True)
class OneOf:
    """One of several branches told apart by `kind`, each with its own constants and domains."""

    branches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


Domain = Numeric | Choice | OneOf
Space = Mapping[str, Any]  # dotted path -> Domain, or a constant
Suggest = Callable[[str, Numeric | Choice], Any]


def parse_space(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the YAML form of a space; a value that is no domain is a constant.

    Raises:
        ConfigError: every problem found, one line each.
    """
    problems: list[str] = []
    space: dict[str, Any] = {}
    for path, value in raw.items():
        try:
            space[path] = _parse_value(f"search.space.{path}", value)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(*problems)
    return space


def _parse_value(path: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        return _parse_one_of(path, [value])
    kinds = [key for key in value if key != "prior"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        got = ", ".join(map(repr, kinds)) or "nothing"
        hint = did_you_mean(str(kinds[0]) if kinds else "", KINDS)
        raise ConfigError(f"{path}: a domain is one of {', '.join(KINDS)}, got {got}; {hint}")
    kind, body = kinds[0], value[kinds[0]]
    if kind in NUMERIC_KINDS:
        return _parse_numeric(path, kind, body, value.get("prior"))
    if "prior" in value:
        raise ConfigError(f"{path}: a prior needs a range of numbers, got {kind}; remove `prior`")
    if not isinstance(body, list) or not body:
        raise ConfigError(f"{path}: {kind} needs a list of at least one value, got {body!r}")
    if kind == "choice":
        if any(isinstance(option, dict | list) for option in body):
            raise ConfigError(f"{path}: choice takes plain values; use one_of for {body!r}")
        return Choice(tuple(body))
    return _parse_one_of(path, body)


def _parse_numeric(path: str, kind: str, body: Any, prior: Any) -> Numeric:
    if not isinstance(body, list) or len(body) != 2 or not all(map(_is_number, body)):
        raise ConfigError(f"{path}: {kind} needs two numbers [low, high], got {body!r}")
    low, high = body
    if not low <= high:
        raise ConfigError(f"{path}: `low <= high` must hold, got {low=}, {high=}; swap the ends")
    log, integer = kind.startswith("log"), kind.endswith("int")
    if log and low <= 0:
        raise ConfigError(f"{path}: {kind} needs a low end above 0, got {low}")
    if integer and not (isinstance(low, int) and isinstance(high, int)):
        raise ConfigError(f"{path}: {kind} needs whole numbers, got {body!r}")
    if isinstance(prior, str):
        prior = _named_prior(path, prior, low, high, log)
    parsed = _parse_prior(path, prior, log)
    if parsed is not None and not low <= parsed.center <= high:
        raise ConfigError(
            f"{path}.prior: the center must lie within the range, got {parsed.center:g} "
            f"outside {low:g} .. {high:g}"
        )
    return Numeric(low, high, log, integer, parsed)


def _named_prior(path: str, name: str, low: float, high: float, log: bool) -> dict[str, float]:
    """A published recipe's prior; its center moves to the nearest value of the range."""
    where = f"{path}.prior"
    if name not in RECIPES:
        raise ConfigError(f"{where}: no recipe {name!r}; {did_you_mean(name, RECIPES)}")
    found = prior_of(RECIPES[name], path.removeprefix("search.space."))
    if found is None:
        raise ConfigError(
            f"{where}: recipes know train.learning_rate and train.epochs only, got {name!r}; write "
            "{center: …, spread: …}"
        )
    rate = path.endswith("learning_rate")
    if log != rate:
        scale = "logarithmic (log_uniform)" if rate else "linear (int)"
        raise ConfigError(f"{where}: the recipe {name!r} needs a {scale} range here; change it")
    return {**found, "center": min(max(found["center"], low), high)}


def _parse_prior(path: str, prior: Any, log: bool) -> Prior | None:
    if prior is None:
        return None
    if not isinstance(prior, dict) or not {"center", "spread"} <= set(prior) <= PRIOR_KEYS:
        raise ConfigError(
            f"{path}.prior: needs center and spread, or the name of a recipe, got {prior!r}"
        )
    if not all(map(_is_number, prior.values())):
        raise ConfigError(f"{path}.prior: center and spread must be numbers, got {prior!r}")
    if log and not (prior["center"] > 0 and prior["spread"] > 1):
        rule = "a logarithmic prior needs center > 0 and spread > 1 (a factor)"
        raise ConfigError(f"{path}.prior: {rule}, got {prior!r}")
    if not prior["spread"] > 0:
        raise ConfigError(f"{path}.prior: spread must be above 0, got {prior['spread']}")
    factor = prior.get("frozen_factor", 1.0)
    if not factor > 0 or (factor != 1 and not log):
        raise ConfigError(
            f"{path}.prior: frozen_factor must be above 0 and go with a logarithmic range, got "
            f"{prior!r}"
        )
    return Prior(float(prior["center"]), float(prior["spread"]), float(factor))


def _parse_one_of(path: str, body: list[Any]) -> OneOf:
    branches: dict[str, Mapping[str, Any]] = {}
    for branch in body:
        if not isinstance(branch, dict) or not isinstance(branch.get("kind"), str):
            raise ConfigError(f"{path}: every branch of one_of needs a `kind`, got {branch!r}")
        kind = branch["kind"]
        if kind in branches:
            raise ConfigError(f"{path}: the kind {kind!r} stands twice; keep one branch of it")
        fields = {key: value for key, value in branch.items() if key != "kind"}
        if path.endswith("train.regularization") and kind in DEFAULT_STRENGTH:
            fields = {"strength": DEFAULT_STRENGTH[kind], **fields}
        branches[kind] = {k: _parse_value(f"{path}.{kind}.{k}", v) for k, v in fields.items()}
    return OneOf(branches)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def draw(space: Space, suggest: Suggest) -> dict[str, Any]:
    """Values for every path of a space, each asked of `suggest(parameter_name, domain)`.

    Parameter names are the study's: the path itself, and for a conditional choice
    `<path>.kind` and `<path>.<kind>.<field>`.
    """
    values: dict[str, Any] = {}
    for path, domain in space.items():
        if isinstance(domain, OneOf):
            kind = suggest(f"{path}.kind", Choice(tuple(domain.branches)))
            fields = {
                name: suggest(f"{path}.{kind}.{name}", sub)
                if isinstance(sub, Numeric | Choice)
                else sub
                for name, sub in domain.branches[kind].items()
            }
            values[path] = {"kind": kind, **fields}
        elif isinstance(domain, Numeric | Choice):
            values[path] = suggest(path, domain)
        else:
            values[path] = domain
    return values


def parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat parameter names and values, as the study and results.json hold them."""
    flat: dict[str, Any] = {}
    for path, value in values.items():
        if isinstance(value, Mapping) and isinstance(value.get("kind"), str):
            flat[f"{path}.kind"] = value["kind"]
            for name, sub in value.items():
                if name != "kind" and sub is not None:
                    flat[f"{path}.{value['kind']}.{name}"] = sub
        else:
            flat[path] = value
    return flat


def domains(space: Space) -> dict[str, Numeric | Choice]:
    """Every parameter name that can occur in a space, with its domain."""
    return {name: part for name, part in _parts(space) if isinstance(part, Numeric | Choice)}


def constants(space: Space) -> dict[str, Any]:
    """Every parameter name that a space does not draw, with its only value."""
    return {name: part for name, part in _parts(space) if not isinstance(part, Domain)}


def _parts(space: Space) -> Iterator[tuple[str, Any]]:
    """Every parameter name that can occur in a space, with its domain or only value."""
    for path, domain in space.items():
        if isinstance(domain, OneOf):
            yield f"{path}.kind", Choice(tuple(domain.branches))
            for kind, fields in domain.branches.items():
                for name, sub in fields.items():
                    yield f"{path}.{kind}.{name}", sub
        else:
            yield path, domain


def conditions(space: Space) -> dict[str, tuple[str, str]]:
    """Every parameter name of a branch, with the name of the choice and the kind it belongs to."""
    return {
        f"{path}.{kind}.{name}": (f"{path}.kind", kind)
        for path, domain in space.items()
        if isinstance(domain, OneOf)
        for kind, fields in domain.branches.items()
        for name in fields
    }


def always_drawn(space: Space) -> set[str]:
    """The parameter names that every configuration of a space has."""
    names = ((path, domain) for path, domain in space.items() if isinstance(domain, Domain))
    return {f"{path}.kind" if isinstance(domain, OneOf) else path for path, domain in names}


def boundary_values(space: Space) -> list[tuple[str, Any]]:
    """Each path with its extreme values, for checking a space against the fields it sets."""
    found: list[tuple[str, Any]] = []
    for path, domain in space.items():
        if isinstance(domain, OneOf):
            for kind, fields in domain.branches.items():
                lows = {name: _ends(sub)[0] for name, sub in fields.items()}
                highs = {name: _ends(sub)[-1] for name, sub in fields.items()}
                found += [(path, {"kind": kind, **lows}), (path, {"kind": kind, **highs})]
        else:
            found += [(path, end) for end in _ends(domain)]
    return found


def _ends(domain: Any) -> list[Any]:
    if isinstance(domain, Numeric):
        # What is drawn between 1 and 3 is seldom a whole number, so neither may the ends be.
        return [e if domain.integer else float(e) for e in (domain.low, domain.high)]
    return list(domain.options) if isinstance(domain, Choice) else [domain]


def describe(domain: Any) -> str:
    """One short phrase for the screen."""
    if isinstance(domain, Numeric):
        scale = "log " if domain.log else ""
        return f"{domain.low:g} .. {domain.high:g} {scale}{'int' if domain.integer else ''}".strip()
    if isinstance(domain, Choice):
        return " | ".join(map(str, domain.options))
    if isinstance(domain, OneOf):
        return " | ".join(
            kind + "".join(f"({describe(sub)})" for sub in fields.values())
            for kind, fields in domain.branches.items()
        )
    return str(domain)


def default_space(num_layers: int, recipe: Recipe) -> dict[str, Any]:
    """The YAML form of a space over all five dimensions.

    Args:
        num_layers: depth of the encoder; frozen depth runs from nothing to all of it.
        recipe: what was published for the model's family and size; the learning rate's range is
            widened from it.
    """
    return {
        "train.learning_rate": {
            "log_uniform": learning_rate_range(recipe),
            "prior": prior_of(recipe, "train.learning_rate"),
        },
        "train.batch_size": {"choice": [16, 32, 64]},
        "train.epochs": {"int": [1, 4]},
        "train.regularization": {
            "one_of": [
                {"kind": "none"},
                {"kind": "weight_decay", "strength": dict(DEFAULT_STRENGTH["weight_decay"])},
                {"kind": "l2_sp", "strength": dict(DEFAULT_STRENGTH["l2_sp"])},
            ]
        },
        "train.frozen_layers": {"int": [0, num_layers]},
    }


def searched_by_default() -> set[str]:
    """Fields of `train` that the default space draws, whatever the model."""
    return {path.removeprefix("train.") for path in default_space(1, RECIPES["bert"])}
