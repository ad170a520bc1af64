"""How whoever watches a trial learns what it is at, and asks it to pause."""

from __future__ import annotations

from collections.abc import Callable

# Called before every step and every batch of an evaluation with what comes next; True asks for a
# pause before that.
Beat = Callable[[str], bool]
TRAINING, EVALUATION = "training", "evaluation"


def no_beat(activity: str) -> bool:
    """Tells nobody, and never asks for a pause."""
    return False
