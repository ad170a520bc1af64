"""How rows of tags tell where entities begin."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

PREFIXED = re.compile(r"[BIESLUMW]-|O$")
AS_IOBES = {"U-": "S-", "L-": "E-", "M-": "I-", "W-": "S-"}  # what seqeval knows


def with_prefixes(rows: Sequence[Sequence[str]], names: Collection[str]) -> list[list[str]]:
    """Rows of tags that say where entities begin, whatever the tags in use.

    BIO, IOBES, BILOU and BMES are read as they are.  Where some name has no prefix, a run of a tag
    beside `O` is an entity (IO tagging), and without an `O` every word is one (part-of-speech
    tags).
    """
    if all(PREFIXED.match(name) for name in names):
        return [[AS_IOBES.get(tag[:2], tag[:2]) + tag[2:] for tag in row] for row in rows]
    prefix = "I-" if "O" in names else "B-"
    return [[tag if tag == "O" else prefix + tag for tag in row] for row in rows]
