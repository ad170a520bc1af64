"""What pydantic finds wrong with an experiment, in one clear line each."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from sft_ray.errors import did_you_mean

UNION_TAG = re.compile(r"^(constrained-)?(int|float|str|(literal|list|dict)\[.*)$")
QUOTED = re.compile(r"'([^']*)'")


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line per problem: dotted path, rule, what was got, how to mend it.

    Args:
        root: what was validated.
    """
    lines: dict[str, str] = {}
    found = [(_dotted(problem["loc"]), problem) for problem in error.errors()]
    for path, problem in found:
        if any(other.startswith(f"{path}.") for other, _ in found):
            continue  # another member of a union, and the one that was meant is told about
        if path == "search.space" and problem["type"] == "value_error":
            lines |= {line: line for line in str(problem["ctx"]["error"]).splitlines()}
        elif path in lines:  # another member of the same union
            first, got = lines[path].split(", got ", 1)
            lines[path] = f"{first} or {_rule(problem).removeprefix('input should be ')}, got {got}"
        else:
            lines[path] = f"{path}: {_explanation(problem, root)}".removeprefix(": ")
    return list(lines.values())


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in _without_union_tags(loc))


def _explanation(problem: Any, root: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        known = _section_at(root, problem["loc"][:-1])
        return f"unknown key; {did_you_mean(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return "this key is required"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    got, hint = problem["input"], ""
    if problem["type"] == "literal_error" and isinstance(got, str):
        hint = f"; {did_you_mean(got, re.findall(QUOTED, problem['ctx']['expected']))}"
    return f"{_rule(problem)}, got {got!r}{hint}"


def _rule(problem: Any) -> str:
    """Pydantic's own words for the rule, without a capital."""
    message: str = problem["msg"]
    return message[:1].lower() + message[1:]


def _without_union_tags(loc: tuple[int | str, ...]) -> list[int | str]:
    """Pydantic appends the tried member of a union (`int`, `literal['auto']`) to the path."""
    return [part for part in loc if not UNION_TAG.match(str(part))]


def _section_at(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    model: Any = root
    for part in loc:
        annotation = model.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def delete_key(tree: Any, loc: tuple[int | str, ...]) -> None:
    """Take the key that a problem is about out of a tree, if it is there."""
    path = _without_union_tags(loc)
    for part in path[:-1]:
        if not isinstance(tree, dict) or part not in tree:
            return
        tree = tree[part]
    if isinstance(tree, dict) and path:
        tree.pop(path[-1], None)
