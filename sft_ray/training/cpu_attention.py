"""Attention with dropout on CPUs, where torch takes a long way round.

`F.scaled_dot_product_attention` has no kernel for it there and falls back on some forty small
operations forward and as many backward, in fp32 whatever it is given.  These are the same formulas
(Vaswani et al. 2017, section 3.2.1) in a third as many, in bf16 where sequences are long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sft_ray.training import cpu_dropout
from sft_ray.training.unpadded import Group, Layout

# Up to this length products are faster in fp32: in bf16 oneDNN compiles code for every new shape,
# which takes longer than a small product itself.  Measured, see RESULTS.md.
SHORT = 32


def attend_with_dropout(
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
    """What `unpadded.attend` gives; for tensors and dropout that `cpu_dropout.is_ours`."""
    heads, width = query.shape[1], query.shape[-1]
    groups = _head_rows(layout, heads, reach)
    rows = (x.transpose(1, 2).reshape(-1, width) for x in (query, key, value))
    scaling = width**-0.5 if scaling is None else scaling
    found = _Attention.apply(*rows, groups, scaling, dropout, first_tokens)
    return found.view(1, -1, heads, width)


@lru_cache(maxsize=2)  # for all layers that a batch goes through, which look far or near
def _head_rows(layout: Layout, heads: int, reach: int | None) -> list[_HeadRows]:
    masks = layout.masks(reach)
    return [_HeadRows(group, heads, mask) for group, mask in zip(layout.groups, masks, strict=True)]


class _HeadRows:
    """A group of sequences, by rows: one per token and head, heads of a token side by side.

    Attributes:
        into: the row that belongs at each place of the padded group [sequences, heads, length],
            any at padding.
        out_of: the place at which each of the group's rows lies.
        padding: True there, [sequences, 1, 1, length]; None if there is none.
        hidden: added to scores, takes their weight from keys that a token may not look at; None
            if it may look at all.
    """

    def __init__(self, group: Group, heads: int, visible: torch.Tensor | None) -> None:
        size, length = group.shape
        self.shape = (size * heads, length, -1)
        self.padding = None if group.mask is None else ~group.mask
        self.hidden = None
        if visible is not None:
            self.hidden = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        self.is_short = length <= SHORT
        self.heads = heads
        self.tokens = slice(group.first * heads, group.last * heads)
        self.first_tokens = slice(group.sequence * heads, (group.sequence + size) * heads)
        places = torch.arange(size * length) if group.places is None else group.places
        sequences, positions = places[:, None] // length, places[:, None] % length
        self.out_of = ((sequences * heads + torch.arange(heads)) * length + positions).flatten()
        self.into = torch.full((size * heads * length,), self.tokens.start)
        self.into[self.out_of] = torch.arange(self.tokens.start, self.tokens.stop)

    def take(self, rows: torch.Tensor, first_tokens: bool = False) -> torch.Tensor:
        """[rows of the batch, width] -> [sequences x heads, length or 1, width]."""
        if first_tokens:
            taken = rows[self.first_tokens].unsqueeze(1)
        else:
            taken = rows.index_select(0, self.into).view(self.shape)
        return taken.float() if self.is_short else taken

    def put(self, padded: torch.Tensor, rows: torch.Tensor, first_tokens: bool = False) -> None:
        """The reverse of `take`."""
        padded = padded.to(rows.dtype)
        if first_tokens:
            rows[self.first_tokens] = padded.squeeze(1)
        else:
            torch.index_select(padded.flatten(0, 1), 0, self.out_of, out=rows[self.tokens])

    def by_sequence(self, padded: torch.Tensor) -> torch.Tensor:
        """[sequences x heads, …] -> [sequences, heads, …]."""
        return padded.unflatten(0, (-1, self.heads))


def _empty_rows(like: torch.Tensor, count: int, groups: list[_HeadRows]) -> torch.Tensor:
    """Rows for groups to put theirs into; those that fill up the batch are 0."""
    rows = like.new_empty(count, like.shape[1])
    rows[groups[-1].tokens.stop :] = 0
    return rows


class _Attention(torch.autograd.Function):
    """Answers and gradients by rows."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        groups: list[_HeadRows],
        scaling: float,
        dropout: float,
        first_tokens: bool,
    ) -> torch.Tensor:
        answers, kept = _empty_rows(queries, len(queries), groups), []
        with torch.autocast("cpu", enabled=False):
            for group in groups:
                q, k, v = group.take(queries, first_tokens), group.take(keys), group.take(values)
                q = q * scaling
                scores = torch.bmm(q, k.transpose(1, 2))
                if group.hidden is not None:  # to add is faster than to fill
                    group.by_sequence(scores).add_(group.hidden.to(scores.dtype))
                weights = torch.softmax(scores, -1)
                dropped = cpu_dropout.dropped(weights.shape, dropout)
                found = torch.bmm(weights.masked_fill(dropped, 0), v)
                group.put(found, answers, first_tokens)
                kept += [q, k, v, weights, dropped]
        ctx.save_for_backward(*kept)
        ctx.arguments = groups, scaling, dropout, first_tokens, len(keys)
        return answers.mul_(cpu_dropout.scale(dropout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_answers: torch.Tensor) -> Any:
        groups, scaling, dropout, first_tokens, num_keys = ctx.arguments
        of_answers = of_answers * cpu_dropout.scale(dropout)
        of_queries = _empty_rows(of_answers, len(of_answers), groups)
        of_keys, of_values = (_empty_rows(of_answers, num_keys, groups) for _ in "kv")
        for i, group in enumerate(groups):
            q, k, v, weights, dropped = ctx.saved_tensors[5 * i : 5 * i + 5]
            of_found = group.take(of_answers, first_tokens)
            if group.padding is not None and not first_tokens:
                group.by_sequence(of_found).masked_fill_(group.padding.transpose(2, 3), 0)
            of_weights = torch.bmm(of_found, v.transpose(1, 2)).masked_fill_(dropped, 0)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            group.put(torch.bmm(of_scores, k).mul_(scaling), of_queries, first_tokens)
            group.put(torch.bmm(of_scores.transpose(1, 2), q), of_keys)
            weights_T = weights.masked_fill(dropped, 0).transpose(1, 2)
            group.put(torch.bmm(weights_T, of_found), of_values)
        return of_queries, of_keys, of_values, None, None, None, None
