"""Encoded examples with their labels, as every part of training and scoring reads them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_ray.training.encoding import Encoded, IntArray
from sft_ray.training.seeds import derived_seed

IGNORED = -100  # label of a token that is not scored; torch's default


@dataclass(frozen=True)
class LabelSet:
    """What a model can answer.

    Attributes:
        names: of the classes, by id; empty for tasks without classes.
        negative: the answer that says there is none: a relation's negative label, or "" for
            questions that may lack an answer.
    """

    names: tuple[str, ...] = ()
    negative: str | None = None

    @cached_property
    def id_of(self) -> dict[str, int]:
        """Name -> class id."""
        return {name: i for i, name in enumerate(self.names)}


@dataclass(frozen=True, kw_only=True)
class Examples(Encoded):
    """One encoded split.

    Attributes:
        labels: one per item ([n], or [n, classes] of probabilities or 0/1, or [n, 2] positions),
            or one per token ([total], `IGNORED` where none is).
        raw: the rows that items were made from, for scoring; None for training.
        items: numbers of these items in the whole split, [n]; None if they are all of it.
    """

    labels: npt.NDArray[Any]
    raw: pa.Table | None = None
    items: IntArray | None = None

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens per item, [n]."""
        return np.diff(self.offsets)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest item."""
        return int(self.lengths.max())

    @property
    def labels_per_token(self) -> bool:
        return self.words is not None

    @cached_property
    def counts(self) -> IntArray:
        """What an item counts in the mean loss: 1, or its labelled tokens, [n]."""
        if not self.labels_per_token:
            return np.ones(len(self), dtype=np.int64)
        labelled = np.concatenate([[0], np.cumsum(self.labels != IGNORED)])
        return np.diff(labelled[self.offsets])

    def chosen(self, keep: npt.NDArray[np.bool_]) -> Examples:
        """The items with a True, [n]."""
        tokens = np.repeat(keep, self.lengths)
        return replace(
            self,
            tokens=self.tokens[tokens],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[keep])]),
            segments=None if self.segments is None else self.segments[tokens],
            rows=self.rows[keep],
            words=None if self.words is None else self.words[tokens],
            spans=None if self.spans is None else self.spans[tokens],
            labels=self.labels[tokens if self.labels_per_token else keep],
            items=np.flatnonzero(keep) if self.items is None else self.items[keep],
        )

    def column(self, name: str) -> list[Any]:
        """A field of the raw rows."""
        assert self.raw is not None  # scoring has them
        values: list[Any] = self.raw.column(name).to_pylist()
        return values

    def has(self, name: str) -> bool:
        return self.raw is not None and name in self.raw.column_names


@dataclass(frozen=True)
class Dataset:
    """Encoded splits, what a model can answer, and what is worth saying about them.

    Attributes:
        num_truncated: split -> rows that lost text.
        max_length: tokens that they were cut at; the tokenizer may allow less than was asked for.
        num_duplicates: "validation in train", … -> rows whose inputs occur in the other split.
        num_left_out: rows without a label that were left out.
        test_split: whether there is one; only a labelled one can be scored.
    """

    train: Examples
    validation: Examples
    label_set: LabelSet
    fingerprint: str
    num_truncated: dict[str, int]
    max_length: int
    num_duplicates: dict[str, int] = field(default_factory=dict)
    num_left_out: int = 0
    test_split: Literal["none", "unlabelled", "labelled"] = "none"

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.label_set.names

    def with_training_share(self, share: float, seed: int) -> Dataset:
        """The same with a share of the training rows, at least one; smaller ones are in larger."""
        if share >= 1:
            return self
        rows = np.unique(self.train.rows)
        order = np.random.default_rng(derived_seed(seed, "training share")).permutation(rows)
        first = order[: max(1, round(share * len(rows)))]
        return replace(self, train=self.train.chosen(np.isin(self.train.rows, first)))

    @property
    def used_tokens(self) -> IntArray:
        """Ascending ids of the vocabulary that occurs in any split."""
        return np.union1d(np.unique(self.train.tokens), np.unique(self.validation.tokens))
