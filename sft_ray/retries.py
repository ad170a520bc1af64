"""Transient failures of object stores: tried again with growing pauses, then told plainly."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from sft_ray.errors import ResourceError

# Seconds.  pyarrow itself tries for about 6 s, without backing off, before each of them.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
# How pyarrow words what may pass by itself.
TRANSIENT = re.compile(
    r"HTTP status (5\d\d|408|429)|NETWORK_CONNECTION|SLOW_DOWN|THROTTL|SERVICE_UNAVAILABLE"
    r"|INTERNAL_FAILURE|REQUEST_TIMEOUT|UNAVAILABLE|DEADLINE_EXCEEDED|curlCode"
    r"|[Tt]imed? ?out|[Cc]onnection reset",
)
Found = TypeVar("Found")


def retried(where: str, operation: Callable[[], Found]) -> Found:
    """The outcome of an operation on object storage that may be made twice.

    Raises:
        FileNotFoundError: as the operation does.
        ResourceError: storage refuses it, or is out of reach for about a minute.
    """
    for pause in (*PAUSES, None):
        try:
            return operation()
        except FileNotFoundError:
            raise
        except OSError as error:
            if pause is None or not TRANSIENT.search(str(error)):
                reason = " ".join(str(error).split())
                raise ResourceError(f"storage: {where}: {reason}") from None
            # Two slots that were turned away together do not come back together.
            time.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311
    raise AssertionError("the last attempt returns or raises")
