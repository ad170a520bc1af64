"""YAML 1.2 in and out, and `dotted.path=value` overrides: from text to a plain tree."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sft_ray.errors import ConfigError

SPACE_PREFIX = "search.space."


def read_tree(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """The plain tree of a YAML 1.2 file (`2e-5` is a number) with overrides applied.

    Raises:
        ConfigError: the file is missing, is not YAML, or an override is malformed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of an experiment's YAML") from None
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
    """Safe-load YAML 1.2; duplicate keys are refused."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


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
