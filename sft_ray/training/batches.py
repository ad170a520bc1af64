"""Global batches, per-worker shares and padding.

Membership and order of the global batches depend on (seed, epoch, batch size, data) only; the
number of workers decides nothing but who computes what.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import IGNORED, Examples
from sft_ray.training.passes import Pass
from sft_ray.training.seeds import derived_seed
from sft_ray.training.unpadded import Layout, to_device

# On CPUs twice as many take a fortieth off the time, and add up to a tenth to a trial's memory.  A
# GPU has kernels to start, and no memory to spare for little.
EVAL_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16_384}


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch, padded to its own longest example.

    Attributes:
        inputs: what the model takes; tensors [share, length].
        labels: of every item, [share, ...], or of every token, [share, length].
        weights: 1 for an example that counts, 0 for the stand-in of an empty share, [share].
        one_pass: how the share goes through the model.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    weights: torch.Tensor
    one_pass: Pass


@dataclass(frozen=True)
class Trunk:
    """What the first layers made of every example of a split; lies in mapped files.

    Attributes:
        depth: how many layers.
        maps: arrays [tokens, width], one per file; integers are the bits of bf16.
        map_of: number of the file that holds an item, [n].
        start_of: its first row there, [n].
        most_tokens: of an item, from its first on; None keeps all.
    """

    depth: int
    maps: list[npt.NDArray[np.number]]
    map_of: IntArray
    start_of: IntArray
    most_tokens: int | None = None

    def rows(self, items: IntArray, lengths: IntArray) -> torch.Tensor:
        """Output for the tokens of some items, one after the other, [tokens, width]."""
        places = zip(self.map_of[items], self.start_of[items], lengths, strict=True)
        found = torch.from_numpy(
            np.concatenate([self.maps[map_][start : start + n] for map_, start, n in places])
        )
        return found.view(torch.bfloat16) if found.dtype == torch.int16 else found


def kept_lengths(lengths: IntArray, most_tokens: int | None) -> IntArray:
    """Tokens per item if no more than so many are kept, [n]."""
    return lengths if most_tokens is None else np.minimum(lengths, most_tokens)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return -(-num_examples // batch_size)


def global_batches(lengths: IntArray, *, batch_size: int, seed: int, epoch: int) -> list[IntArray]:
    """Indices of the examples of every optimiser step of one epoch, each example exactly once.

    Membership is random.  Batches of like length would save padding, and cost accuracy where
    labels go with length (benchmarks/RESULTS.md); instead every batch is sorted by length here and
    padded in parts, see `micro_batches`.
    """
    order = np.random.default_rng(derived_seed(seed, "order", epoch)).permutation(len(lengths))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batch[np.argsort(lengths[batch], kind="stable")] for batch in batches]


def share(indices: IntArray, lengths: IntArray, rank: int, size: int) -> IntArray:
    """One rank's part of a length-sorted global batch; all carry like work, and like counts.

    From the longest on, each example goes to the rank that has the fewest tokens so far, of those
    with room: the longest-processing-time rule (Graham 1969), which it is without equal counts.

    Args:
        lengths: tokens of every example of the batch, ascending.
    """
    if size == 1:
        return indices
    most, mine = -(-len(indices) // size), []
    ranks = [(0, to, 0) for to in range(size)]  # a heap: tokens, rank, examples
    for place in reversed(range(len(indices))):
        tokens, to, count = heappop(ranks)
        if count + 1 < most:
            heappush(ranks, (tokens + int(lengths[place]), to, count + 1))
        if to == rank:
            mine.append(place)
    return indices[mine[::-1]]


def micro_batches(mine: IntArray, size: int) -> list[IntArray]:
    """A length-sorted share in parts of at most `size` examples; at least one, which may be empty.

    Each is padded to its own longest, so that small parts save padding.
    """
    return [mine[start : start + size] for start in range(0, max(len(mine), 1), size)]


def token_positions(examples: Examples, indices: IntArray) -> IntArray:
    """Where the tokens of some items lie in `examples.tokens`, item by item."""
    return np.concatenate([np.arange(*examples.offsets[i : i + 2]) for i in indices])


def evaluation_shares(
    lengths: IntArray, rank: int, size: int, most_tokens: int
) -> Iterator[IntArray]:
    """This worker's evaluation batches; over all workers every example occurs exactly once.

    None has more than `most_tokens`, padding included, but for one with a longer example alone.
    """
    mine = np.argsort(lengths, kind="stable")[rank::size]
    start = 0
    while start < len(mine):
        # Sorted ascending, so the last of a batch is its longest: count padded tokens by it.
        end = start + 1
        while end < len(mine) and (end + 1 - start) * lengths[mine[end]] <= most_tokens:
            end += 1
        yield mine[start:end]
        start = end


def collate(
    examples: Examples,
    indices: IntArray,
    *,
    pad_token: int,
    device: torch.device,
    with_labels: bool = True,
    trunk: Trunk | None = None,
    fill_to: int | None = None,
) -> Batch:
    """Pad and move one share.

    Where examples are missing stands the first token of the first one, with weight 0: a worker
    without any must still take part in the step's collectives.

    Args:
        trunk: where the pass begins, if not at the embeddings.
        fill_to: most examples of any batch, for passes that want shapes that come again; there are
            as many, and their length and tokens are filled up too.  None leaves them as they are.
    """
    size = max(len(indices), fill_to or 1)
    is_own = np.arange(size) < len(indices)
    indices = np.concatenate([indices, np.zeros(size - len(indices), dtype=np.int64)])
    starts = examples.offsets[indices]
    kept = kept_lengths(examples.lengths[indices], trunk.most_tokens if trunk else None)
    lengths = np.where(is_own, kept, 1)
    # No text is longer than positions reach, and so is none that is filled up.
    fill_below = None if fill_to is None else examples.longest
    layout = Layout.of(lengths, device, fill_below=fill_below)
    within_BL = np.arange(layout.shape[1])[None, :]
    mask_BL = within_BL < lengths[:, None]
    source_BL = np.where(mask_BL, starts[:, None] + within_BL, 0)
    inputs = {
        "input_ids": np.where(mask_BL, examples.tokens[source_BL], pad_token),
        "attention_mask": mask_BL,
    }
    if examples.segments is not None:
        inputs["token_type_ids"] = np.where(mask_BL, examples.segments[source_BL], 0)
    if not with_labels:
        labels = np.zeros(len(indices))
    elif examples.labels_per_token:
        labels = np.where(mask_BL, examples.labels[source_BL], IGNORED)
    else:
        labels = examples.labels[indices]
        labels[~is_own] = 0  # an answer that the first token may have

    one_pass = Pass(layout)
    if trunk is not None:
        items = indices if examples.items is None else examples.items[indices]
        rows_TH = trunk.rows(items, lengths)
        missing = len(layout.places) - len(rows_TH)
        trunk_TH = to_device(F.pad(rows_TH, (0, 0, 0, missing)) if missing else rows_TH, device)
        one_pass = replace(one_pass, depth=trunk.depth, trunk_TH=trunk_TH)
    return Batch(
        inputs={k: to_device(v.astype(np.int64), device) for k, v in inputs.items()},
        labels=to_device(labels, device),
        weights=to_device(is_own.astype(np.float32), device),
        one_pass=one_pass,
    )
