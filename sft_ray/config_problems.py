"""What pydantic finds wrong with an experiment, in one clear line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from sft_ray.errors import did_you_mean

UNION_TAG = re.compile(r"^(constrained-)?(int|float|str|(literal|list|dict)\[.*)$")
NAME = r"^\w[\w.-]*$"  # of a run or an ablation, and so of its folder
# Pattern -> what it asks for, in words.
PATTERNS = {NAME: "takes letters, digits, _ . and -, beginning with a letter, digit or _"}
# Where a line begins: the key it is about, as in `data.train (my.csv): …`.
KEY = re.compile(r"([\w.]+)(?=:| \()")
# Keys -> others of which nothing true can be told without them.
DECIDING = {
    "data": ("data", "search.objective", "train.class_weights"),
    "search.space": ("search.space", "search.enqueue"),
    "revision": ("model", "revision"),
}
# Of `data`, but what its rows hold does not depend on them.
LENGTHS = ("data.limit", "data.max_length", "data.doc_stride")
MOST_KEYS = 5  # of a section, as a hint
QUOTED = re.compile(r"'([^']*)'")
# Keys as other tools call them -> ours.
ALIASES = {
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "num_workers": "workers_per_trial",
    "weight_decay": "regularization: {kind: weight_decay, strength: …}",
}


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
        return f"unknown key; {_what_was_meant(problem, root)}"
    if problem["type"] == "missing":
        return "this key is required"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    got, hint = problem["input"], ""
    if problem["type"] == "model_type":
        section = _section_at(root, [*map(str, _without_union_tags(problem["loc"]))])
        keys = [*section.model_fields]
        more = ", …" if len(keys) > MOST_KEYS else ""
        return f"takes keys of its own, got {got!r}; they are {', '.join(keys[:MOST_KEYS])}{more}"
    if problem["type"] == "literal_error" and isinstance(got, str):
        hint = f"; {did_you_mean(got, re.findall(QUOTED, problem['ctx']['expected']))}"
    elif problem["type"] == "string_type" and isinstance(got, bool | int | float):
        hint = "; write it in quotes"
    return f"{_rule(problem)}, got {got!r}{hint}"


def _rule(problem: Any) -> str:
    """Pydantic's own words for the rule, without a capital; a pattern's are ours."""
    if problem["type"] == "string_pattern_mismatch":
        return PATTERNS[problem["ctx"]["pattern"]]
    message: str = problem["msg"]
    return message[:1].lower() + message[1:]


def _without_union_tags(loc: tuple[int | str, ...]) -> list[int | str]:
    """Pydantic appends the tried member of a union (`int`, `literal['auto']`) to the path."""
    return [part for part in loc if not UNION_TAG.match(str(part))]


def _what_was_meant(problem: Any, root: type[BaseModel]) -> str:
    """A hint for an unknown key: the same key in another section before a similar one in its own.

    A section with a mapping of free keys, as `data.columns`, may lack a text that belongs there.
    """
    *above, key = map(str, problem["loc"])
    section = _section_at(root, above)
    name, colon, rest = ALIASES.get(key, key).partition(":")
    meant = [path for path in _paths(root) if path.split(".")[-1] == name]
    if name in section.model_fields:  # so it is an alias
        return f"did you mean {name + colon + rest!r}?"
    if meant:
        place = min(meant, key=lambda path: path.count("."))
        outside = "" if "." in place else f", outside of {'.'.join(above)}"
        found = [f"{place + colon + rest!r}{outside}"]
    else:
        is_column = isinstance(problem["input"], str | list)
        free = [n for n, f in section.model_fields.items() if get_origin(f.annotation) is dict]
        found = [repr(".".join([*above, field, key])) for field in free if is_column]
    if not found:
        return did_you_mean(key, section.model_fields)
    found += map(repr, get_close_matches(key, section.model_fields, n=1, cutoff=0.75))
    return f"did you mean {' or '.join(found)}?"


def _paths(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted paths of all keys."""
    for name, field in model.model_fields.items():
        yield above + name
        if section := _section_of(field.annotation):
            yield from _paths(section, f"{above}{name}.")


def _section_at(root: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    model: Any = root
    for part in loc:
        model = _section_of(model.model_fields[part].annotation)
    return model  # type: ignore[no-any-return]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, if it holds one."""
    options = getattr(annotation, "__args__", (annotation,))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def delete_key(tree: Any, loc: tuple[int | str, ...]) -> str:
    """Take the key that a problem is about out of a tree, if it is there; its dotted path."""
    path = _without_union_tags(loc)
    for part in path[:-1]:
        tree = tree.get(part) if isinstance(tree, dict) else None
    if isinstance(tree, dict) and path:
        tree.pop(path[-1], None)
    return _dotted(loc)


def may_come_of(line: str, deleted: Iterable[str]) -> bool:
    """Whether a problem may be there only because defaults stand in for deleted keys."""
    found = KEY.match(line)
    if found is None:  # of a file
        return False
    places: set[str] = set()
    for key in deleted:
        places.add(key)
        if not any(_along(key, length) for length in LENGTHS):
            places.update(*(others for above, others in DECIDING.items() if _along(key, above)))
    return any(_along(found[1], place) for place in places)


def _along(one: str, other: str) -> bool:
    """Whether two keys are the same, or one is below the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
