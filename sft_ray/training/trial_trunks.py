"""Which outputs of its frozen layers a trial reads from the cache, and which it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sft_ray.config import Train
from sft_ray.training.batches import Trunk
from sft_ray.training.beat import Beat
from sft_ray.training.setup import Setup
from sft_ray.training.trunk_cache import BUILDING, Split


@dataclass(frozen=True)
class TrialTrunks:
    """Outputs of the frozen layers, as far as they are read.

    Attributes:
        train: of the training split; None where every pass computes them.
        validation: of the validation split.
        read: which of them are there, as `Progress.trunks_read` has it.
        to_ask_for: what gives the same choice when the trial is taken up; None leaves it to costs.
    """

    train: Trunk | None = None
    validation: Trunk | None = None
    read: str | None = None
    to_ask_for: str | None = None


def open_trunks(
    train: Train,
    setup: Setup,
    dtype: torch.dtype,
    told: str | None,
    beat: Beat,
    enter: Callable[[str], None],
) -> TrialTrunks:
    """The same splits on all ranks; makes what is wanted and not there yet.

    Args:
        told: which splits to read, see `Progress`; None lets costs decide.
        enter: told what time goes to, see `Progress.trunk_seconds`.
    """
    cache, world = setup.trunk_cache, setup.world
    depth = train.frozen_depth(setup.pretrained.num_layers)
    if depth == 0:
        return TrialTrunks()
    if cache is None:
        return TrialTrunks(read="none", to_ask_for="none")
    enter("trunk")
    share = len(setup.dataset.train) / len(cache.dataset.train)
    passes: dict[Split, float] = {
        "train": train.epochs * share,
        "validation": train.epochs,  # at least
    }
    pays = {  # of which workers may think differently, where they have measured it
        split: world.minimum(int(cache.pays(split, depth, dtype, times)))
        for split, times in passes.items()
    }
    wanted = [s for s in passes if (pays[s] if told is None else s in told.split("+"))]
    opened = cache.open(wanted, depth, dtype, beat)
    # On another machine it may take longer, and may not work.
    world.wait_for_all(lambda: beat(BUILDING))
    on_all = {split: opened[split] for split in passes if world.minimum(int(split in opened))}
    enter("other")
    read = "+".join(on_all) or "none"
    # What a pause kept from being made, for one, is asked for again.
    to_ask_for = read if list(on_all) == wanted else told
    return TrialTrunks(on_all.get("train"), on_all.get("validation"), read, to_ask_for)
