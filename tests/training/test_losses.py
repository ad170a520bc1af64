"""Losses against written-out formulas, and that no division of a batch changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sft_ray.config import Train
from sft_ray.training.batches import collate
from sft_ray.training.examples import IGNORED, Dataset
from sft_ray.training.forward import forward_loss, loss_options
from sft_ray.training.losses import (
    LossOptions,
    binary_cross_entropy,
    cross_entropy,
    span_cross_entropy,
    squared_error,
    token_cross_entropy,
)
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import TASKS
from sft_ray.training.world import World
from tests.models import CPU, PAD, dataset_of, load_tiny, run_fit, task_dataset, task_rows

ANY_MASK = torch.ones(6, 1, dtype=torch.bool)
LOGITS = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 1, 2, 2, 1, 0])
WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


def written_out(logits: torch.Tensor, ids: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy of smoothed labels; class weights on every term, as torch has them."""
    target = F.one_hot(ids, 3) * (1 - smoothing) + smoothing / 3
    return -(target * logits.log_softmax(-1) * WEIGHTS.double()).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_smoothed_labels_and_weighted_classes(smoothing) -> None:
    found = cross_entropy(LOGITS, IDS, ANY_MASK, LossOptions(smoothing, WEIGHTS))
    torch.testing.assert_close(found, written_out(LOGITS, IDS, smoothing))
    plain = cross_entropy(LOGITS, IDS, ANY_MASK, LossOptions())
    torch.testing.assert_close(plain, -LOGITS.log_softmax(1)[torch.arange(6), IDS])


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(0.1), LossOptions(0.1, WEIGHTS)])
def test_certain_probabilities_cost_as_much_as_their_class(options: LossOptions) -> None:
    certain = F.one_hot(IDS, 3).double()
    torch.testing.assert_close(
        cross_entropy(LOGITS, certain, ANY_MASK, options),
        cross_entropy(LOGITS, IDS, ANY_MASK, options),
    )


def test_cross_entropy_of_probabilities_is_their_mean_over_classes() -> None:
    soft = torch.softmax(torch.flip(LOGITS, [0]), dim=1)
    each = [cross_entropy(LOGITS, torch.full((6,), c), ANY_MASK, LossOptions()) for c in range(3)]
    expected = (torch.stack(each, dim=1) * soft).sum(dim=1)
    torch.testing.assert_close(cross_entropy(LOGITS, soft, ANY_MASK, LossOptions()), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_token_loss_sums_over_labelled_tokens_only(smoothing: float) -> None:
    logits = LOGITS.reshape(2, 3, 3)
    labels = torch.tensor([[0, IGNORED, 2], [IGNORED, IGNORED, 1]])
    found = token_cross_entropy(logits, labels, ANY_MASK, LossOptions(smoothing, WEIGHTS))
    first = written_out(logits[0, [0, 2]], torch.tensor([0, 2]), smoothing).sum()
    second = written_out(logits[1, [2]], torch.tensor([1]), smoothing).sum()
    torch.testing.assert_close(found, torch.stack([first, second]))


def test_binary_cross_entropy_is_the_mean_over_classes() -> None:
    labels = torch.tensor([[1.0, 0.0, 1.0]]).repeat(6, 1)
    p = torch.sigmoid(LOGITS)
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(
        binary_cross_entropy(LOGITS, labels, ANY_MASK, LossOptions()), expected
    )


def test_squared_error_is_per_example() -> None:
    values = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = squared_error(LOGITS[:, :1], values, ANY_MASK, LossOptions())
    torch.testing.assert_close(found, (LOGITS[:, 0] - values) ** 2)


def test_span_loss_is_the_mean_of_start_and_end_over_real_tokens() -> None:
    logits = LOGITS.reshape(1, 9, 2)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[:, 6:] = False
    found = span_cross_entropy(logits, torch.tensor([[1, 4]]), mask, LossOptions())
    start, end = logits[0, :6].log_softmax(0).unbind(1)
    torch.testing.assert_close(found, -(start[1] + end[4])[None] / 2)


@pytest.mark.parametrize("padding", [0, 1, 30])
def test_span_loss_does_not_depend_on_padding(padding: int) -> None:
    logits, labels = LOGITS.reshape(1, 9, 2), torch.tensor([[1, 4]])
    mask = torch.ones(1, 9, dtype=torch.bool)
    expected = span_cross_entropy(logits, labels, mask, LossOptions())
    padded = F.pad(logits, (0, 0, 0, padding), value=50.0).requires_grad_()
    found = span_cross_entropy(padded, labels, F.pad(mask, (0, padding)), LossOptions())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert not padded.grad[:, 9:].any()
    assert torch.isfinite(padded.grad).all()


# -- options of a trial --------------------------------------------------------------------------


def options_of(dataset: Dataset, task: str, **train: Any) -> LossOptions:
    return loss_options(Train(**train), Setup(TASKS[task], dataset, None, None, World()))


def test_balanced_weights_average_1_over_the_training_labels(tmp_path, wide_bert) -> None:
    rows = [{"text": f"cat {i}", "label": "aab"[i % 3] if i else "c"} for i in range(30)]
    dataset = dataset_of(tmp_path, "text-classification", wide_bert, rows)
    weights = options_of(dataset, "text-classification", class_weights="balanced").class_weights
    counts = np.bincount(dataset.train.labels)
    assert counts.tolist() == [19, 10, 1]
    assert float((weights * torch.from_numpy(counts)).sum() / 30) == pytest.approx(1)
    np.testing.assert_allclose(weights.numpy() * counts, np.full(3, 10), rtol=1e-6)


def test_balanced_weights_of_tags_count_labelled_tokens(tmp_path, wide_bert) -> None:
    rows = [{"tokens": ["cats", "the", "the", "the"], "tags": ["B-x", "O", "O", "O"]}] * 4
    dataset = dataset_of(tmp_path, "token-classification", wide_bert, rows)
    weights = options_of(dataset, "token-classification", class_weights="balanced").class_weights
    assert dataset.label_names == ("B-x", "O")
    np.testing.assert_allclose(weights, [2, 2 / 3], rtol=1e-6)


def test_a_class_that_only_validation_has_does_not_disturb_balanced_weights(
    tmp_path, wide_bert
) -> None:
    train = [{"text": f"cat {i}", "label": "ab"[i % 2]} for i in range(20)]
    validation = [{"text": f"dog {i}", "label": "ab"[i % 2]} for i in range(100)]
    validation[0]["label"] = "c"
    dataset = dataset_of(tmp_path, "text-classification", wide_bert, train, validation)
    weights = options_of(dataset, "text-classification", class_weights="balanced").class_weights
    assert weights[:2].tolist() == [1, 1]
    assert torch.isfinite(weights).all()


def test_class_weights_are_given_by_name_in_any_order(toy: Dataset) -> None:
    given = {"tool": 3.0, "animal": 1.0, "plant": 0.0}
    weights = options_of(toy, "text-classification", class_weights=given).class_weights
    assert dict(zip(toy.label_names, weights.tolist(), strict=True)) == given


def test_label_smoothing_and_class_weights_reach_the_training_loss(tiny_bert, toy) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    settings = {
        "rungs": (),
        "epochs": 1,
        "learning_rate": 1e-12,
        "dropout": 0.0,
        "max_grad_norm": 1e-9,
    }
    weights = {"animal": 0.5, "plant": 1.0, "tool": 3.0}
    (report,) = run_fit(pretrained, toy, **settings, label_smoothing=0.1, class_weights=weights)
    pretrained.reset(0, dropout=0.0)
    batch = collate(toy.train, np.arange(len(toy.train)), pad_token=PAD, device=CPU)
    with torch.no_grad():
        logits = pretrained.model(**batch.inputs).logits.double()
    expected = written_out(logits, batch.labels, 0.1).mean()
    assert report.train_loss == pytest.approx(float(expected), rel=1e-5)


# -- micro-batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_in_micro_batches_gives_the_same_losses(
    name: str, tmp_path: Path, wide_bert: Path
) -> None:
    task = TASKS[name]
    dataset = task_dataset(tmp_path, name, wide_bert, train=70, validation=20)
    pretrained = load_tiny(wide_bert, dataset, task=task)
    losses, scores = [], []
    for micro_batch in (1, 3, 7):
        reports = run_fit(
            pretrained,
            dataset,
            task=task,
            rungs=tuple(range(10, 100, 10)),
            epochs=1,
            batch_size=7,
            micro_batch=micro_batch,
            dropout=0.0,
            learning_rate=1e-3,
        )
        assert [r.step for r in reports] == list(range(1, 11))
        assert {r.micro_batch for r in reports} == {micro_batch}
        losses.append([r.train_loss for r in reports])
        scores.append([r.metrics["loss"] for r in reports])
    np.testing.assert_allclose(losses[0], losses[2], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(losses[1], losses[2], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_reported_loss_is_the_mean_over_what_counts(name, tmp_path, wide_bert) -> None:
    task = TASKS[name]
    dataset = task_dataset(tmp_path, name, wide_bert, train=40, validation=10)
    pretrained = load_tiny(wide_bert, dataset, task=task)
    (report,) = run_fit(
        pretrained,
        dataset,
        task=task,
        rungs=(),
        epochs=1,
        batch_size=16,
        dropout=0.0,
        learning_rate=1e-12,
    )
    pretrained.reset(0, dropout=0.0)
    train = dataset.train
    total = 0.0
    with torch.no_grad():
        for item in range(len(train)):
            alone = collate(train, np.array([item]), pad_token=PAD, device=CPU)
            loss = forward_loss(pretrained.model, alone, task, LossOptions(), torch.float32)
            total += float(loss)
    labelled = (train.labels != IGNORED).sum() if name == "token-classification" else len(train)
    assert report.train_loss == pytest.approx(total / int(labelled), rel=1e-5)


def test_an_item_without_labelled_tokens_counts_nothing(tmp_path, wide_bert) -> None:
    name = "token-classification"
    blank = {"tokens": ["\u200b"], "tags": ["O"]}
    dataset = dataset_of(tmp_path, name, wide_bert, [*task_rows(name, 3), blank])
    assert dataset.train.counts[-1] == 0
    assert dataset.train.counts[:-1].all()
    pretrained = load_tiny(wide_bert, dataset, task=TASKS[name])
    reports = run_fit(pretrained, dataset, task=TASKS[name], rungs=(), epochs=1, batch_size=1)
    assert [(r.fault, r.step) for r in reports] == [(None, 4)]
    assert np.isfinite(reports[0].train_loss)
