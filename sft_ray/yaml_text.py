"""YAML 1.2 in and out, and `dotted.path=value` overrides: from text to a plain tree."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    ScalarEvent,
)

from sft_ray.errors import ConfigError

SPACE_PREFIX = "search.space."
# Of one YAML text: lists and mappings within each other, and values with every alias written out.
MOST_DEPTH = 40
MOST_VALUES = 100_000


def read_tree(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """The plain tree of a YAML 1.2 file (`2e-5` is a number) with overrides applied.

    Raises:
        ConfigError: the file is missing, is not YAML, or an override is malformed.
    """
    if not str(path):
        raise ConfigError("the name of the file is empty; give the path of an experiment's YAML")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of an experiment's YAML") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: is a folder; give the path of an experiment's YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: an experiment is a mapping of keys, got {type(tree).__name__}; "
            "start from experiments/quickstart.yaml"
        )
    problems = [problem for text in overrides if (problem := _override(tree, text))]
    if problems:
        raise ConfigError(*problems)
    return tree


def parse_yaml(text: str, source: str) -> Any:
    """Safe-load YAML 1.2; duplicate keys are refused, and what grows without measure.

    Raises:
        ConfigError: it is no YAML, nested too deep, or too large once its aliases are followed.
    """
    try:
        _check_size(YAML(typ="safe", pure=True).parse(text), source)
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # Of a value that is not what its tag says, such as `!!bool 7`.
        raise ConfigError(f"{source}: not valid YAML: a tag does not fit {error}") from None


def _check_size(events: Iterable[Event], source: str) -> None:
    """Refuse, before anything is built, what a few lines of aliases can swell to."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and values counted before it
    values = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise ConfigError(f"{source}:{line}: the alias *{event.anchor} stands in itself")
            values += sizes.get(event.anchor, 1)
        elif isinstance(event, CollectionStartEvent):
            open_.append((event.anchor, values))
            values += 1
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, ScalarEvent):
            values += 1
            event.value.encode("utf-8")  # a lone surrogate could be written nowhere
        if len(open_) > MOST_DEPTH:
            raise ConfigError(f"{source}:{line}: YAML may nest {MOST_DEPTH} deep, not deeper")
        if values > MOST_VALUES:
            raise ConfigError(
                f"{source}:{line}: YAML may hold {MOST_VALUES} values, every alias written out; "
                "this is more"
            )


def dump_yaml(tree: dict[str, Any]) -> str:
    """YAML text of a plain tree, keys in their order."""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(tree, text)
    return text.getvalue()


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Set one `dotted.path=value`; below `search.space.` the rest of the path is one key."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        return f"{text}: an override is written dotted.path=value, for example search.trials=6"
    if path.startswith(SPACE_PREFIX):
        keys = ["search", "space", path.removeprefix(SPACE_PREFIX)]
    else:
        keys = path.split(".")
    node = tree
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            return f"{text}: {key} holds {node!r}, which has no keys below it"
    try:
        node[keys[-1]] = parse_yaml(value, text)
    except ConfigError as error:
        return str(error)
    return None
