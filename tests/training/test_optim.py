"""Optimisers, learning rates per layer, dropout and layers that begin anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sft_ray.config import Regularization, Train
from sft_ray.errors import ConfigError
from sft_ray.training.batches import collate, global_batches
from sft_ray.training.examples import Dataset
from sft_ray.training.families import FAMILIES
from sft_ray.training.forward import evaluate, forward_loss
from sft_ray.training.losses import LossOptions
from sft_ray.training.model import Pretrained
from sft_ray.training.optim import build_optimizer, build_schedule
from sft_ray.training.regularize import bind_penalty, is_penalized
from sft_ray.training.world import World
from tests.models import CPU, PAD, TASK, load_tiny, run_fit, tiny_model_folder, toy_dataset

SETTINGS = {"rungs": (), "epochs": 2, "learning_rate": 3e-3, "dropout": 0.0}
DECAY = Regularization(kind="weight_decay", strength=0.3)


@pytest.fixture
def pretrained(tiny_bert: Path, toy: Dataset) -> Pretrained:
    return load_tiny(tiny_bert, toy)


def weights_of(pretrained: Pretrained) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pretrained.trainable().items()}


# -- optimisers ----------------------------------------------------------------------------------


def test_adam_with_weight_decay_is_adamw(pretrained, toy) -> None:
    found = []
    for optimizer in ("adamw", "adam"):
        run_fit(pretrained, toy, **SETTINGS, optimizer=optimizer, regularization=DECAY)
        found.append(weights_of(pretrained))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-7, rtol=0)


def test_adam_with_an_l2_term_is_not_adamw(pretrained, toy) -> None:
    losses = []
    for kind in ("weight_decay", "l2"):
        term = Regularization(kind=kind, strength=0.3)
        *_, report = run_fit(pretrained, toy, **SETTINGS, optimizer="adam", regularization=term)
        losses.append(report.train_loss)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("strength", [None, 0.3])
def test_sgd_is_momentum_with_decoupled_decay(tiny_bert, toy, momentum, strength) -> None:
    pretrained = load_tiny(tiny_bert, toy, double=True)
    regularization = DECAY if strength else Regularization()
    settings = {"epochs": 1, "batch_size": 32, "learning_rate": 0.05, "warmup": 0.0}
    run_fit(
        pretrained,
        toy,
        rungs=(),
        dropout=0.0,
        optimizer="sgd",
        momentum=momentum,
        regularization=regularization,
        **settings,
    )
    found = weights_of(pretrained)

    pretrained.reset(0, dropout=0.0)
    named = pretrained.trainable()
    velocity = {name: torch.zeros_like(p) for name, p in named.items()}
    batches = global_batches(toy.train.lengths, batch_size=32, seed=17, epoch=0)
    for step, indices in enumerate(batches):
        rate = 0.05 * (len(batches) - step) / len(batches)
        batch = collate(toy.train, indices, pad_token=PAD, device=CPU)
        loss = forward_loss(pretrained.model, batch, TASK, LossOptions(), torch.float32)
        gradients = torch.autograd.grad(loss / len(indices), list(named.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                if strength and parameter.ndim >= 2:
                    parameter -= rate * strength * parameter
                clipped = gradient * min(1.0, 1.0 / (norm + 1e-6))
                velocity[name] = momentum * velocity[name] + clipped
                parameter -= rate * velocity[name]
    for name, parameter in named.items():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_weight_decay_spares_biases_and_normalisation(pretrained, optimizer: str) -> None:
    pretrained.reset(0)
    train = Train(optimizer=optimizer, learning_rate=0.1, regularization=DECAY)
    stepper = build_optimizer(train, pretrained)
    for parameter in pretrained.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    stepper.step()
    for name, parameter in pretrained.trainable().items():
        start = pretrained.pristine[name]
        expected = start * (1 - 0.1 * 0.3) if is_penalized(parameter) else start
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=0)


# -- learning rates ------------------------------------------------------------------------------


def rates(pretrained: Pretrained, **train: Any) -> dict[str, float]:
    optimizer = build_optimizer(Train(learning_rate=1e-3, **train), pretrained)
    name_of = {parameter: name for name, parameter in pretrained.trainable().items()}
    found = {name_of[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == pretrained.trainable().keys()
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(found)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_layer_decay_lowers_the_rate_layer_by_layer(pretrained, optimizer: str) -> None:
    pretrained.reset(0)
    expected = {
        "bert.embeddings.": 0.5**3,
        "bert.encoder.layer.0.": 0.5**2,
        "bert.encoder.layer.1.": 0.5,
        "bert.pooler.": 1.0,
        "classifier.": 4.0,
    }
    settings = {"layer_decay": 0.5, "head_learning_rate_multiplier": 4.0, "optimizer": optimizer}
    for name, rate in rates(pretrained, **settings).items():
        (factor,) = [f for prefix, f in expected.items() if name.startswith(prefix)]
        assert rate == pytest.approx(1e-3 * factor, rel=1e-12), name


@pytest.mark.parametrize("frozen_layers", [1, "all"])
def test_frozen_layers_leave_the_rates_of_the_others(pretrained, frozen_layers) -> None:
    pretrained.reset(0)
    whole = rates(pretrained, layer_decay=0.7)
    pretrained.reset(frozen_layers)
    left = rates(pretrained, layer_decay=0.7)
    assert left == {name: whole[name] for name in left}
    assert len(left) < len(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_rise_from_the_embeddings_to_the_head_in_every_family(
    family, toy, tmp_path: Path
) -> None:
    pretrained = load_tiny(tiny_model_folder(tmp_path, family), toy)
    pretrained.reset(0)
    found = rates(pretrained, layer_decay=0.5)
    assert set(found.values()) == {1e-3 * 0.5**exponent for exponent in range(4)}
    assert all(found[name] == 1e-3 for name in pretrained.head())
    assert pretrained.from_scratch >= {n for n in pretrained.head() if "pooler" not in n}
    word_embeddings = pretrained.model.get_input_embeddings().weight
    (name,) = [n for n, p in pretrained.trainable().items() if p is word_embeddings]
    assert found[name] == 1e-3 * 0.5**3


def test_all_rates_follow_one_schedule(pretrained) -> None:
    pretrained.reset(0)
    train = Train(learning_rate=1e-3, layer_decay=0.5, warmup=0.5, schedule="linear")
    optimizer = build_optimizer(train, pretrained)
    peaks = [group["lr"] for group in optimizer.param_groups]
    set_rates = build_schedule(train, optimizer, 8)
    for step, factor in enumerate((0, 1 / 4, 2 / 4, 3 / 4, 1, 3 / 4, 2 / 4, 1 / 4), start=1):
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([peak * factor for peak in peaks])
        set_rates(step)


def expected_factor(name: str, step: int, steps: int, warmup: int, cooldown: int) -> float:
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    if name == "constant_with_cooldown":
        return min(1.0, (steps - step) / cooldown) if cooldown else 1.0
    done = (step - warmup) / (steps - warmup)
    return 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_cooldown"])
def test_schedules_follow_their_formulas(name: str, warmup: float) -> None:
    train = Train(schedule=name, warmup=warmup, cooldown=0.25, learning_rate=2e-3)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], lr=2e-3)
    set_rates = build_schedule(train, optimizer, 40)
    found = []
    for step in range(1, 41):
        found.append(optimizer.param_groups[0]["lr"])
        set_rates(step)
    factors = [expected_factor(name, s, 40, round(40 * warmup), 10) for s in range(40)]
    assert found == pytest.approx([2e-3 * factor for factor in factors], abs=1e-12)
    after = optimizer.param_groups[0]["lr"]
    assert after == pytest.approx(2e-3 if name == "constant" else 0, abs=1e-12)


def test_a_cooldown_of_nothing_is_constant() -> None:
    train = Train(schedule="constant_with_cooldown", warmup=0.0, cooldown=0.0, learning_rate=1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    set_rates = build_schedule(train, optimizer, 5)
    for step in range(1, 6):
        assert optimizer.param_groups[0]["lr"] == 1.0
        set_rates(step)


# -- dropout and layers that begin anew, in every family -----------------------------------------


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("few"), tiny_bert, train=24, validation=24)


@pytest.fixture(scope="module")
def deep(family: str, tmp_path_factory: pytest.TempPathFactory, few: Dataset) -> Pretrained:
    """Three layers of weights that no initialisation draws again."""
    folder = tmp_path_factory.mktemp(family)
    return load_tiny(tiny_model_folder(folder, family, 3, noise=0.05, dropout=0.3), few)


def training_outputs(pretrained: Pretrained, dataset: Dataset) -> torch.Tensor:
    batch = collate(dataset.train, np.arange(8), pad_token=PAD, device=CPU)
    with torch.no_grad():
        return pretrained.model(**batch.inputs).logits


def test_dropout_of_the_whole_model_can_be_set_and_taken_back(deep, few) -> None:
    for probability, repeats in ((0.0, True), (None, False), (0.0, True), (0.5, False)):
        deep.reset(0, dropout=probability)
        assert deep.model.training
        first, second = (training_outputs(deep, few) for _ in range(2))
        assert torch.equal(first, second) == repeats
    deep.reset(0)
    for module in deep.model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p in (0.0, 0.3)


def test_a_dropout_of_0_can_be_set_too(deep, family: str, few, tmp_path: Path) -> None:
    without = load_tiny(tiny_model_folder(tmp_path, family, 3, dropout=0), few)

    def probabilities(pretrained: Pretrained, dropout: float | None) -> dict[str, float]:
        pretrained.reset(0, dropout=dropout)
        return {
            name: module.p if isinstance(module, nn.Dropout) else module.attention_dropout
            for name, module in pretrained.model.named_modules()
            if isinstance(module, nn.Dropout) or hasattr(module, "attention_dropout")
        }

    assert probabilities(without, 0.3) == probabilities(deep, 0.3)
    assert set(probabilities(without, None).values()) == {0}


def test_without_dropout_training_mode_equals_evaluation(deep, few) -> None:
    deep.reset(0, dropout=0.0)
    trained = training_outputs(deep, few)
    found = evaluate(deep.model, TASK, few.train, PAD, World())[:8]
    np.testing.assert_allclose(trained.numpy(), found, atol=1e-5, rtol=0)


LAYERS = {"distilbert": "transformer.layer.", "modernbert": "layers."}


def begun_anew(pretrained: Pretrained, family: str, layers: int) -> set[str]:
    """Names that re-initialising the top layers must change, written out by hand."""
    prefix = pretrained.model.base_model_prefix + "."
    stem = prefix + LAYERS.get(family, "encoder.layer.")
    tops = tuple(f"{stem}{i}." for i in range(3 - layers, 3))
    return {
        name
        for name in pretrained.pristine
        if name.startswith((*tops, f"{prefix}pooler.", "pooler."))
    }


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_top_layers_and_the_pooler_begin_anew(deep, family: str, layers: int) -> None:
    deep.reset(0, reinit_layers=layers, seed=5)
    expected = begun_anew(deep, family, layers)
    changed = {
        name
        for name, parameter in deep.model.named_parameters()
        if not torch.equal(parameter, deep.pristine[name])
    }
    unlearned = {n for n in expected if n in deep.from_scratch}
    assert changed | unlearned == expected
    assert deep.reinitialized == expected
    first = {name: p.detach().clone() for name, p in deep.model.named_parameters()}
    torch.manual_seed(1)
    deep.reset(0, reinit_layers=layers, seed=5)
    assert all(torch.equal(first[n], p) for n, p in deep.model.named_parameters())
    deep.reset(0, reinit_layers=layers, seed=6)
    moved = {n for n, p in deep.model.named_parameters() if not torch.equal(first[n], p)}
    assert moved
    assert moved <= expected | deep.from_scratch  # a seed draws the head too
    deep.reset(0)
    assert all(torch.equal(deep.pristine[n], p) for n, p in deep.model.named_parameters())
    assert not deep.reinitialized


def test_matrices_that_begin_anew_have_the_spread_of_the_models_own_rule(deep, family) -> None:
    deep.reset(0, reinit_layers=1, seed=5)
    for name, parameter in deep.model.named_parameters():
        if name in deep.reinitialized and parameter.ndim == 2 and "rel" not in name:
            spread = float(parameter.detach().std())
            assert 0.5 * 0.01 < spread < 0.15, name
        if name in deep.reinitialized and name.endswith("bias"):
            assert float(parameter.detach().abs().max()) == 0, name


def test_re_initialising_leaves_the_global_generator_alone(deep) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    deep.reset(0, reinit_layers=2)
    assert torch.equal(torch.rand(3), expected)


def test_l2_sp_pulls_layers_that_begin_anew_towards_0(deep) -> None:
    deep.reset(0, reinit_layers=1, seed=5)
    penalty = bind_penalty(Regularization(kind="l2_sp", strength=1.0), deep)
    named = [(n, p) for n, p in deep.trainable().items() if is_penalized(p)]
    assert len(named) == len(penalty.anchors)
    for (name, parameter), weight, anchor in zip(
        named, penalty.weights, penalty.anchors, strict=True
    ):
        assert weight is parameter
        if name in deep.reinitialized | deep.from_scratch:
            assert not anchor.any(), name
        else:
            assert torch.equal(anchor, deep.pristine[name]), name
            assert torch.equal(anchor, parameter), name


def test_frozen_layers_and_layers_that_begin_anew_must_not_overlap(deep) -> None:
    deep.reset(1, reinit_layers=2)
    for frozen, anew in ((2, 2), ("all", 1), (0, 4), (4, 0)):
        with pytest.raises(ConfigError, match="the model has 3 layers"):
            deep.reset(frozen, reinit_layers=anew)


def test_a_trial_with_layers_that_begin_anew_repeats_bitwise(deep, few) -> None:
    settings = {"rungs": (), "epochs": 1, "batch_size": 8, "reinit_layers": 1, "frozen_layers": 1}
    first, second = (run_fit(deep, few, **settings)[-1] for _ in range(2))
    assert first.fault is None
    assert first.metrics == second.metrics
    assert first.train_loss == second.train_loss
    other = run_fit(deep, few, seed=3, **settings)[-1]
    assert other.train_loss != first.train_loss


def test_weights_that_are_drawn_anew_stay_where_they_are(
    tiny_bert: Path, toy: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.clone())  # as from a GPU
    pretrained.reset(1, reinit_layers=1, seed=1)
    places = {name: p.data_ptr() for name, p in pretrained.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in pretrained.model.named_parameters()}
    pretrained.reset(1, reinit_layers=1, seed=2)
    now = dict(pretrained.model.named_parameters())
    assert {name: p.data_ptr() for name, p in now.items()} == places
    drawn = {name for name in now if not torch.equal(now[name], before[name])}
    assert drawn & pretrained.from_scratch
    assert drawn & pretrained.reinitialized
