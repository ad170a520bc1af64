"""Seeds for separate purposes, derived from the one seed of an experiment."""

import hashlib


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed below 2**31 that depends on `seed` and on what it is for, and on nothing else."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF
