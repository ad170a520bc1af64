"""What a process on a CPU would keep in vain, or give back too soon."""

from __future__ import annotations

import ctypes
import os

# Of products of matrices, by shape: a step needs about fifty, and shares most of them with others
# of like size (see `unpadded.filled`).  oneDNN's own thousand may hold hundreds of megabytes.
PRODUCTS_KEPT = "256"
# mallopt(3): the parameters' numbers, and bytes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES, MAPPED_BYTES = 2**30, 2**25  # no more than 2^25 is allowed for the latter


def suit_training() -> None:
    """Settings of this process; before its first product, unless the user chose otherwise.

    oneDNN remembers few shapes.  The C library (glibc) keeps what a step has freed for the next
    one, instead of having the system map, clear and unmap the same pages at every step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRODUCTS_KEPT)
    if not any(name.startswith("MALLOC_") for name in os.environ):
        _call("mallopt", TRIM_THRESHOLD, KEPT_BYTES)
        _call("mallopt", MMAP_THRESHOLD, MAPPED_BYTES)


def give_back_free_memory() -> None:
    """Let the C library hand free memory to the system, where it can."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    """A function of the C library, where it has it."""
    found = getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None
    if found is not None:
        found(*arguments)
