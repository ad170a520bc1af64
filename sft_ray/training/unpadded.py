"""Attention over the tokens of a batch that lie side by side, without padding between them.

All else in an encoder layer looks at one token at a time and needs no padding at all.  Attention
pads neighbours of like length together; what it computes in vain is small beside the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sft_ray.training.encoding import IntArray

SEQUENCES_PER_GROUP = 8
# Of a group's positions, where a family's own code attends; measured, see RESULTS.md.
MOST_PADDING = 0.25
# So that shapes come again: numbers between two powers of two.  On CPUs oneDNN compiles its bf16
# products for every new number of tokens; by torch.compile whole layers are, and for the longest.
CPU_TOKEN_STEPS = 16  # fill up by less than 1 / 16
TOKEN_STEPS = 8
LENGTH_STEPS, LEAST_LENGTH = 2, 16  # only attention sees them, and is small beside the layer


@dataclass(frozen=True)
class Group:
    """Sequences that go through attention together.

    Attributes:
        first: of their tokens in the packed batch.
        last: one past their last token.
        sequence: the first of them in the batch.
        shape: (sequences, length of the longest).
        places: of the tokens among all positions of the padded group, [tokens]; None if it has no
            padding.
        mask: True at tokens, [sequences, 1, 1, length]; None if it has no padding.
    """

    first: int
    last: int
    sequence: int
    shape: tuple[int, int]
    places: torch.Tensor | None
    mask: torch.Tensor | None

    def visible(self, reach: int, device: torch.device) -> torch.Tensor | None:
        """True where a token may look, [sequences or 1, 1, length or 1, length]; None: anywhere.

        Args:
            reach: how far to either side it looks.
        """
        length = self.shape[1]
        if length <= reach + 1:
            return self.mask
        at = torch.arange(length, device=device)
        near = ((at[:, None] - at).abs() <= reach)[None, None]
        # Padding looks at itself: attention to nothing at all may give no number.
        return near if self.mask is None else near & self.mask | (at[:, None] == at)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, heads, all tokens, width] -> [sequences, heads, length, width] of this group."""
        tokens_THD = packed[0, :, self.first : self.last].transpose(0, 1)
        return self.spread(tokens_THD).transpose(1, 2)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens of this group, …] -> [sequences, length, …], 0 at padding."""
        size, length = self.shape
        if self.places is not None:
            positions = tokens.new_zeros(size * length, *tokens.shape[1:])
            tokens = positions.index_copy(0, self.places, tokens)
        return tokens.reshape(size, length, *tokens.shape[1:])

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """[sequences, length, …] -> [tokens of this group, …]."""
        flat = padded.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def of_first_tokens(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, heads, all sequences, width] -> [sequences, heads, 1, width] of this group."""
        end = self.sequence + self.shape[0]
        return packed[0, :, self.sequence : end].transpose(0, 1).unsqueeze(2)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[sequences, heads, length, width] -> [tokens of this group, heads, width]."""
        return self.gather(padded.transpose(1, 2))


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a padded batch lie.

    Attributes:
        shape: (sequences, length of the longest).
        places: of the tokens among all positions of the padded batch, [tokens].
        starts: of the sequences in the packed batch, [sequences].
        groups: of neighbours; cheapest if the batch is sorted by length.
        lengths: of the sequences, [sequences].
        filler: tokens behind the batch's own, which nothing that is kept looks at.
        is_fixed: whether its shapes come again, and all else of it lies in its tensors.
    """

    shape: tuple[int, int]
    places: torch.Tensor
    starts: torch.Tensor
    groups: tuple[Group, ...]
    lengths: IntArray
    filler: int = 0
    is_fixed: bool = False

    @classmethod
    def of(
        cls, lengths: IntArray, device: torch.device, *, fill_below: int | None = None
    ) -> Layout:
        """The layout of sequences with these lengths, [n].

        Args:
            fill_below: fill up the tokens, and the length of the longest up to this one, so that
                shapes come again.
        """
        if fill_below is not None:
            return cls._fixed(lengths, device, fill_below)
        # A GPU rather pads more than it starts many small kernels.
        size = SEQUENCES_PER_GROUP if device.type == "cpu" else len(lengths)
        groups = _groups(lengths, range(0, len(lengths), size), device)
        places = to_device(np.flatnonzero(_tokens(lengths)), device)
        starts = to_device(np.cumsum(lengths) - lengths, device)
        filler = filled(len(places), CPU_TOKEN_STEPS) - len(places) if device.type == "cpu" else 0
        return cls((len(lengths), int(lengths.max())), places, starts, groups, lengths, filler)

    @cached_property
    def tight_groups(self) -> tuple[Group, ...]:
        """Groups of at most `MOST_PADDING` each, on a CPU; a GPU pads the whole batch."""
        device = self.places.device
        if device.type != "cpu":
            return self.groups
        starts, longest, tokens = [0], 0, 0
        for sequence, length in enumerate(self.lengths):
            longest, tokens = max(longest, length), tokens + length
            if tokens < (1 - MOST_PADDING) * longest * (sequence + 1 - starts[-1]):
                starts.append(sequence)
                longest = tokens = length
        return _groups(self.lengths, starts, device)

    @classmethod
    def _fixed(cls, lengths: IntArray, device: torch.device, most: int) -> Layout:
        longest, tokens = int(lengths.max()), int(lengths.sum())
        shape = (len(lengths), min(filled(longest, LENGTH_STEPS, LEAST_LENGTH), most))
        rows = min(filled(tokens, TOKEN_STEPS), shape[0] * shape[1])
        mask_BL = np.arange(shape[1])[None, :] < lengths[:, None]
        # What fills up lies where attention pads anyway.
        free = np.flatnonzero(~mask_BL)[: rows - tokens]
        places = to_device(np.concatenate([np.flatnonzero(mask_BL), free]), device)
        starts = to_device(np.cumsum(lengths) - lengths, device)
        mask = to_device(mask_BL[:, None, None, :], device)
        groups = (Group(0, rows, 0, shape, places, mask),)
        return cls(shape, places, starts, groups, lengths, is_fixed=True)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """Where sequences begin in the packed batch, and the last ends, int32 [sequences + 1]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return to_device(ends.astype(np.int32), self.places.device)

    @cached_property
    def first_bounds(self) -> torch.Tensor:
        """The same if sequences had their first tokens only."""
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.places.device)

    def masks(self, reach: int | None) -> list[torch.Tensor | None]:
        """Of each group, where a token may look that looks so far to either side."""
        if reach is None:
            return [group.mask for group in self.groups]
        if self.is_fixed:  # passes that are compiled or recorded remember nothing
            return self._looks(reach)
        if reach not in self._near:
            self._near[reach] = self._looks(reach)
        return self._near[reach]

    def _looks(self, reach: int) -> list[torch.Tensor | None]:
        return [group.visible(reach, self.places.device) for group in self.groups]

    @cached_property
    def _near(self) -> dict[int, list[torch.Tensor | None]]:
        """What was found for all layers."""
        return {}

    @property
    def positions(self) -> int:
        """Tokens that a layer's products with weights are computed on, those that fill up too."""
        return len(self.places) + self.filler

    def pack(self, padded_BLH: torch.Tensor) -> torch.Tensor:
        """[sequences, length, width] -> [tokens, width], filled up."""
        return self.fill(padded_BLH.flatten(0, 1).index_select(0, self.places))

    def unpack(self, packed_TH: torch.Tensor) -> torch.Tensor:
        """[tokens, width] -> [sequences, length, width], 0 at padding."""
        size, length = self.shape
        positions = packed_TH.new_zeros(size * length, packed_TH.shape[-1])
        own_TH = self.own(packed_TH)
        return positions.index_copy(0, self.places, own_TH).view(size, length, -1)

    def fill(self, own_TH: torch.Tensor) -> torch.Tensor:
        """Put the tokens that fill up, all 0, behind the batch's own."""
        return F.pad(own_TH, (0, 0, 0, self.filler)) if self.filler else own_TH

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """What groups give, [tokens of a group, …], for all tokens of the batch."""
        if missing := self.positions - self.groups[-1].last:
            parts = [*parts, parts[0].new_zeros(missing, *parts[0].shape[1:])]
        return torch.cat(parts)

    def own(self, packed_TH: torch.Tensor) -> torch.Tensor:
        """The batch's own tokens."""
        return packed_TH[: len(self.places)]


def filled(number: int, steps: int, least: int = 1) -> int:
    """The next of few numbers: so many between two powers of two, no closer than `least`."""
    step = max(least, 2 ** (number.bit_length() - 1) // steps)
    return number + -number % step


def attend(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    *,
    reach: int | None = None,
    first_tokens: bool = False,
) -> torch.Tensor:
    """Attention of every sequence to itself; [1, heads, tokens, width] -> [1, tokens, heads, …].

    Args:
        reach: how far to either side a token looks; None has no bound.
        first_tokens: whether queries are given, and answers wanted, of the first token of every
            sequence only.
    """
    parts = []
    for group, mask in zip(layout.groups, layout.masks(reach), strict=True):
        found = F.scaled_dot_product_attention(
            group.of_first_tokens(query) if first_tokens else group.pad(query),
            group.pad(key),
            group.pad(value),
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
        )
        parts.append(found.squeeze(2) if first_tokens else group.unpad(found))
    return (torch.cat(parts) if first_tokens else layout.join(parts)).unsqueeze(0)


def _groups(lengths: IntArray, starts: Sequence[int], device: torch.device) -> tuple[Group, ...]:
    """Neighbours from one start to the next."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    groups = []
    for start, end in pairwise([*starts, len(lengths)]):
        part = lengths[start:end]
        first, last = int(ends[start]), int(ends[end])
        shape = (len(part), int(part.max()))
        if last - first == shape[0] * shape[1]:
            groups.append(Group(first, last, start, shape, None, None))
        else:
            mask_BL = _tokens(part)
            places = to_device(np.flatnonzero(mask_BL), device)
            mask = to_device(mask_BL[:, None, None, :], device)
            groups.append(Group(first, last, start, shape, places, mask))
    return tuple(groups)


def _tokens(lengths: IntArray) -> Any:
    """True where a padded batch has tokens, [n, longest]."""
    return np.arange(lengths.max())[None, :] < lengths[:, None]


def to_device(array: Any, device: torch.device) -> torch.Tensor:
    """An array or tensor there, without waiting for a GPU."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
