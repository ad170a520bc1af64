"""What a process on a CPU would keep though nobody uses it."""

from __future__ import annotations

import ctypes
import os

# Of products of matrices, by shape.  Without padding every step has shapes of its own, so oneDNN's
# thousand would never be used again and hold hundreds of megabytes; a step needs about fifty.
PRODUCTS_KEPT = "64"


def keep_few_products() -> None:
    """Let oneDNN remember few shapes; before its first product, unless the user chose otherwise."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRODUCTS_KEPT)


def give_back_free_memory() -> None:
    """Let the C library hand free memory to the system, where it can (glibc's malloc_trim)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
