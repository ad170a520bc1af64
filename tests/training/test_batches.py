"""Global batches, shares and padding: who computes what never changes what is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sft_ray.training.batches import (
    collate,
    evaluation_shares,
    global_batches,
    micro_batches,
    share,
    steps_per_epoch,
)
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import Examples

CPU = torch.device("cpu")
LENGTHS = np.random.default_rng(0).integers(3, 60, size=1003)


def ragged(lengths: IntArray, *, pairs: bool = False) -> Examples:
    """Examples with distinct tokens, so that a wrong one cannot be mistaken for a right one."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1000, 1000 + offsets[-1])
    return Examples(
        tokens=tokens,
        offsets=offsets,
        segments=(tokens % 2) if pairs else None,
        rows=np.arange(len(lengths)),
        labels=np.arange(len(lengths)) % 3,
    )


def batches_of(**changes: int) -> list[IntArray]:
    return global_batches(LENGTHS, **{"batch_size": 16, "seed": 5, "epoch": 0, **changes})


def same(first: list[IntArray], second: list[IntArray]) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


@pytest.mark.parametrize("batch_size", [1, 16, 17, 1003, 5000])
def test_every_example_is_in_exactly_one_batch_of_an_epoch(batch_size: int) -> None:
    found = batches_of(batch_size=batch_size)
    assert sorted(np.concatenate(found).tolist()) == list(range(1003))


@pytest.mark.parametrize("batch_size", [1, 16, 17, 1003, 5000])
def test_batches_are_full_except_one(batch_size: int) -> None:
    sizes = sorted(map(len, batches_of(batch_size=batch_size)), reverse=True)
    assert len(sizes) == steps_per_epoch(1003, batch_size)
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sum(sizes) == 1003


def test_batches_are_a_function_of_seed_epoch_and_batch_size() -> None:
    assert same(batches_of(), batches_of())
    assert not same(batches_of(), batches_of(seed=6))
    assert not same(batches_of(), batches_of(epoch=1))
    assert not same(batches_of(), batches_of(batch_size=32)[: len(batches_of())])


def test_epochs_mix_examples_into_different_batches() -> None:
    first, second = ({frozenset(b.tolist()) for b in batches_of(epoch=e)} for e in (0, 1))
    assert not first & second


def test_long_and_short_batches_are_mixed_over_the_epoch() -> None:
    means = [LENGTHS[batch].mean() for batch in batches_of()]
    assert means != sorted(means)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def shares_of(batch: IntArray, size: int, lengths: IntArray = LENGTHS) -> list[IntArray]:
    return [share(batch, lengths[batch], rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_shares_partition_every_batch(size: int) -> None:
    for batch in batches_of():
        shares = shares_of(batch, size)
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) <= -(-len(batch) // size)


@pytest.mark.parametrize(
    ("size", "most", "in_turns"),
    [(2, 1.01, 1.03), (4, 1.08, 1.13), (8, 1.45, 1.5)],  # times the mean of the ranks
)
def test_shares_carry_like_work(size: int, most: float, in_turns: float) -> None:
    """Of texts as long as they come: many short ones, and a few long ones."""
    lengths = np.random.default_rng(0).lognormal(3, 1, size=2000).astype(np.int64) + 2
    worst, worst_in_turns = [], []
    for batch in global_batches(lengths, batch_size=32, seed=5, epoch=0):
        mean = lengths[batch].sum() / size
        worst.append(max(lengths[mine].sum() for mine in shares_of(batch, size, lengths)) / mean)
        dealt = [batch[rank::size] for rank in range(size)]
        worst_in_turns.append(max(lengths[mine].sum() for mine in dealt) / mean)
    assert np.mean(worst) < most
    assert np.mean(worst_in_turns) > in_turns


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 1003])
def test_every_evaluation_example_is_computed_exactly_once(size: int, count: int) -> None:
    shares = [list(evaluation_shares(LENGTHS[:count], rank, size, 2048)) for rank in range(size)]
    computed = [int(i) for mine in shares for batch in mine for i in batch]
    assert sorted(computed) == list(range(count))


def test_evaluation_batches_hold_a_bounded_number_of_padded_tokens() -> None:
    most = 2048
    lengths = np.append(LENGTHS, [most + 1, 3 * most])
    batches = list(evaluation_shares(lengths, 0, 1, most))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= most for batch in batches)
    assert len(batches) <= 2 + 2 * LENGTHS.sum() / most


def test_collate_pads_to_the_longest_of_its_share_and_masks_the_rest() -> None:
    examples = ragged(np.array([4, 2, 9, 3]))
    batch = collate(examples, np.array([3, 0]), pad_token=7, device=CPU)
    first, second = examples.tokens[15:18].tolist(), examples.tokens[0:4].tolist()
    assert batch.inputs["input_ids"].tolist() == [[*first, 7], second]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.labels.tolist() == [0, 0]
    assert batch.weights.tolist() == [1, 1]
    assert {t.dtype for t in (*batch.inputs.values(), batch.labels)} == {torch.int64}


def test_collate_gives_pairs_their_segments_and_padding_segment_0() -> None:
    examples = ragged(np.array([3, 5]), pairs=True)
    batch = collate(examples, np.array([0, 1]), pad_token=7, device=CPU)
    expected = [[*examples.segments[:3].tolist(), 0, 0], examples.segments[3:].tolist()]
    assert batch.inputs["token_type_ids"].tolist() == expected


def test_an_empty_share_is_one_token_that_counts_nothing() -> None:
    batch = collate(ragged(np.array([4, 2])), np.array([], int), pad_token=7, device=CPU)
    assert batch.inputs["input_ids"].shape == (1, 1)
    assert batch.labels.shape == (1,)
    assert batch.weights.tolist() == [0]


def padding_share(batches: list[IntArray]) -> float:
    examples = ragged(LENGTHS)
    masks = [
        collate(examples, batch, pad_token=0, device=CPU).inputs["attention_mask"]
        for batch in batches
    ]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def test_sorted_parts_of_random_batches_save_padding() -> None:
    whole = global_batches(LENGTHS, batch_size=32, seed=17, epoch=0)
    parts = [part for batch in whole for part in micro_batches(batch, 8)]
    assert padding_share(parts) < padding_share(whole) / 2


def test_parts_hold_every_example_of_a_share_once_and_an_empty_share_is_one_part() -> None:
    share_ = np.arange(19)
    parts = micro_batches(share_, 8)
    assert [len(part) for part in parts] == [8, 8, 3]
    assert np.concatenate(parts).tolist() == share_.tolist()
    assert [len(part) for part in micro_batches(share_[:0], 8)] == [0]


def test_membership_is_random_and_does_not_follow_length() -> None:
    means = [LENGTHS[b].mean() for b in global_batches(LENGTHS, batch_size=50, seed=1, epoch=0)]
    assert np.std(means) < 2 * LENGTHS.std() / np.sqrt(50)
