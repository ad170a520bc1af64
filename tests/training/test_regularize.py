"""Penalties are the gradients of their written-out terms, on the right weights only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sft_ray.config import Regularization
from sft_ray.training import regularize
from sft_ray.training.batches import collate
from sft_ray.training.examples import Dataset
from sft_ray.training.forward import forward_loss
from sft_ray.training.losses import LossOptions
from sft_ray.training.model import Pretrained
from sft_ray.training.regularize import bind_penalty
from tests.models import (
    CPU,
    NEVER_IN_TOY_ROWS,
    PAD,
    TASK,
    TOKEN_ID,
    load_tiny,
    run_fit,
    save_tiny,
)

KINDS = ("l1", "l2", "l2_sp")
STRENGTH = 0.03


def regularization(kind: str, strength: float = STRENGTH) -> Regularization:
    return Regularization(kind=kind, strength=strength)


def is_bias_or_normalisation(name: str) -> bool:
    return name.endswith(".bias") or "LayerNorm" in name


@pytest.fixture
def moved(tiny_bert: Path, toy: Dataset) -> Pretrained:
    """A model in float64 that has left its pretrained weights, without dropout."""
    pretrained = load_tiny(tiny_bert, toy, double=True)
    pretrained.reset(0)
    pretrained.model.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in pretrained.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pretrained


def written_out(pretrained: Pretrained, kind: str) -> torch.Tensor:
    """lambda R(theta) as the design states it, by the names of the weights."""
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in pretrained.trainable().items():
        if is_bias_or_normalisation(name):
            continue
        start = pretrained.pristine[name]
        anchor = torch.zeros_like(start) if name.startswith("classifier.") else start
        total = (
            total
            + {
                "l1": weight.abs().sum(),
                "l2": weight.square().sum() / 2,
                "l2_sp": (weight - anchor).square().sum() / 2,
            }[kind]
        )
    return STRENGTH * total


def task_loss(pretrained: Pretrained, dataset: Dataset) -> torch.Tensor:
    batch = collate(dataset.train, np.arange(12), pad_token=PAD, device=CPU)
    return forward_loss(pretrained.model, batch, TASK, LossOptions(), torch.float32)


@pytest.mark.parametrize("k", [0, 1, "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_equals_autograd_of_loss_plus_term(moved, toy, kind: str, k) -> None:
    for module in moved._trunk(2 if k == "all" else k):
        module.requires_grad_(False)
    named = moved.trainable()
    objective = task_loss(moved, toy) + written_out(moved, kind)
    expected = dict(zip(named, torch.autograd.grad(objective, list(named.values())), strict=True))
    task_loss(moved, toy).backward()
    bind_penalty(regularization(kind), moved).add_gradient()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_equals_the_written_out_term(moved, kind: str) -> None:
    value = bind_penalty(regularization(kind), moved).value()
    assert value == pytest.approx(written_out(moved, kind).item(), rel=1e-12)
    assert value > 0


@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_normalisation_get_no_penalty(moved, toy, kind: str) -> None:
    task_loss(moved, toy).backward()
    before = {name: p.grad.clone() for name, p in moved.trainable().items()}
    bind_penalty(regularization(kind), moved).add_gradient()
    changed = {n for n, p in moved.trainable().items() if not torch.equal(p.grad, before[n])}
    assert changed == {n for n in before if not is_bias_or_normalisation(n)}


def test_l2_sp_anchors_the_new_head_at_zero_and_the_rest_at_pretrained(tiny_bert, toy) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    pretrained.reset(0)
    head = pretrained.model.classifier.weight
    assert head.detach().abs().sum() > 0
    value = bind_penalty(regularization("l2_sp"), pretrained).value()
    assert value == pytest.approx(STRENGTH * float(head.detach().square().sum()) / 2, rel=1e-5)


def test_l2_sp_pulls_towards_the_pretrained_weights(tiny_bert, toy) -> None:
    pretrained = load_tiny(tiny_bert, toy)

    def distance(strength: float) -> float:
        run_fit(
            pretrained,
            toy,
            rungs=(),
            epochs=2,
            learning_rate=3e-3,
            regularization=regularization("l2_sp", strength),
        )
        return sum(
            float((p.detach() - pretrained.pristine[n]).square().sum())
            for n, p in pretrained.trainable().items()
            if not is_bias_or_normalisation(n) and not n.startswith("classifier.")
        )

    assert distance(1.0) < distance(0.0) / 4


@pytest.mark.parametrize("kind", ["none", "weight_decay"])
def test_kinds_without_a_term_add_nothing(moved, toy, kind: str) -> None:
    task_loss(moved, toy).backward()
    before = {name: p.grad.clone() for name, p in moved.trainable().items()}
    strength = {"none": None, "weight_decay": 0.5}[kind]
    penalty = bind_penalty(Regularization(kind=kind, strength=strength), moved)
    penalty.add_gradient()
    assert penalty.value() == 0
    assert all(torch.equal(p.grad, before[n]) for n, p in moved.trainable().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_term_is_reported_apart_from_the_task_loss(tiny_bert, toy, kind: str) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    settings = {"epochs": 1, "learning_rate": 1e-3, "rungs": ()}
    (plain,) = run_fit(pretrained, toy, **settings, regularization=Regularization())
    (report,) = run_fit(pretrained, toy, **settings, regularization=regularization(kind, 1e-4))
    assert plain.penalty == 0
    term = written_out(pretrained, kind).item() * 1e-4 / STRENGTH
    assert report.penalty == pytest.approx(term, rel=1e-4)
    assert report.train_loss == pytest.approx(plain.train_loss, rel=0.02)


@pytest.mark.parametrize("kind", ["weight_decay", "l1", "l2", "l2_sp"])
def test_vocabulary_rows_outside_the_data_are_written_back_unchanged(
    tiny_bert: Path, toy: Dataset, tmp_path: Path, kind: str
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    run_fit(
        pretrained,
        toy,
        rungs=(),
        epochs=1,
        learning_rate=1e-2,
        regularization=regularization(kind, 0.5),
    )
    trained = {name: p.detach().clone() for name, p in pretrained.trainable().items()}
    save_tiny(tmp_path, tiny_bert, pretrained, toy, trained)
    before = load_file(tiny_bert / "model.safetensors")["embeddings.word_embeddings.weight"]
    name = "bert.embeddings.word_embeddings.weight"
    after = load_file(tmp_path / "model.safetensors")[name]
    used = set(toy.used_tokens.tolist())
    unused = sorted(set(range(len(TOKEN_ID))) - used - {PAD})
    assert {TOKEN_ID[word] for word in NEVER_IN_TOY_ROWS} <= set(unused)
    assert torch.equal(after[unused], before[unused])
    assert all(not torch.equal(after[row], before[row]) for row in used)


def test_a_new_kind_is_one_row(moved: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    cubic = regularize.Kind(
        lambda weight: weight.abs().pow(3).sum() / 3,
        lambda weights: tuple(weight * weight.abs() for weight in weights),
    )
    monkeypatch.setitem(regularize.KINDS, "l3", cubic)
    penalty = bind_penalty(Regularization.model_construct(kind="l3", strength=STRENGTH), moved)
    for weight in penalty.weights:
        weight.grad = torch.zeros_like(weight)
    penalty.add_gradient()
    total = STRENGTH * sum(weight.abs().pow(3).sum() / 3 for weight in penalty.weights)
    assert penalty.value() == pytest.approx(total.item())
    found = torch.autograd.grad(total, penalty.weights)
    torch.testing.assert_close([w.grad for w in penalty.weights], list(found))
