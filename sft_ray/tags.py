"""How rows of tags tell where entities begin."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

PREFIXED = re.compile(r"[BIESLUMW]-|O$")
UNTYPED = ("BIOES", "BILOU", "BMESO", "BMEWO")  # the letters of each way to tag
AS_IOBES = {"U": "S", "L": "E", "M": "I", "W": "S"}  # what seqeval knows


def with_prefixes(rows: Sequence[Sequence[str]], names: Collection[str]) -> list[list[str]]:
    """Rows of tags that say where entities begin, whatever the tags in use.

    BIO, IOBES, BILOU and BMES are read as they are, with or without a type.  Where some name is
    none of theirs, a run of a tag beside `O` is an entity (IO tagging), and without an `O` every
    word is one (part-of-speech tags).
    """
    if all(PREFIXED.match(name) for name in names) or _are_untyped(names):
        return [[AS_IOBES.get(tag[:1], tag[:1]) + tag[1:] for tag in row] for row in rows]
    prefix = "I-" if "O" in names else "B-"
    return [[tag if tag == "O" else prefix + tag for tag in row] for row in rows]


def _are_untyped(names: Collection[str]) -> bool:
    """Whether tags are nothing but the letters of one way to tag.

    Without a begin and what can follow it, single letters may as well be types.
    """
    found = set(names)
    known = any(found <= set(letters) for letters in UNTYPED)
    return known and "B" in found and not found.isdisjoint("IME")
