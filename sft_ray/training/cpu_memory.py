"""What a process on a CPU would keep in vain, or give back too soon."""

from __future__ import annotations

import ctypes
import os

# Of products of matrices, by shape: a step needs about fifty, and shares most of them with others
# of like size (see `unpadded.filled`).  oneDNN, and between it and torch its wrapper, remember a
# thousand each of their own accord, which may hold hundreds of megabytes.
PRODUCTS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "64"}
# mallopt(3): the parameters' numbers, and bytes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES, MAPPED_BYTES = 2**30, 2**25  # no more than 2^25 is allowed for the latter


def suit_training() -> None:
    """Settings of this process; before its first product, unless the user chose otherwise.

    Few shapes of products are remembered.  The C library (glibc) keeps what a step has freed for
    the next one, instead of having the system map, clear and unmap the same pages at every step.
    """
    for name, number in PRODUCTS_KEPT.items():
        os.environ.setdefault(name, number)
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
