"""The loop: repeatable, honest about its best weights, and safe when a trial goes wrong."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_ray.config import Regularization
from sft_ray.training import fitting as fit_module
from sft_ray.training import metrics
from sft_ray.training.divergence import STEPS_PER_LOOK, GradientWatch
from sft_ray.training.examples import Dataset
from sft_ray.training.forward import evaluate
from sft_ray.training.model import Pretrained
from sft_ray.training.progress import Progress
from sft_ray.training.world import World
from tests.models import PAD, TASK, load_tiny, run_fit, tiny_model_folder


@pytest.fixture
def pretrained(tiny_bert: Path, toy: Dataset) -> Pretrained:
    return load_tiny(tiny_bert, toy)


def without_times(reports: list[Progress]) -> list[Progress]:
    return [replace(r, best=None, train_seconds=0, eval_seconds=0) for r in reports]


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_reports_come_at_the_marks_in_order(pretrained, toy) -> None:
    reports = run_fit(pretrained, toy, epochs=2, batch_size=32)
    assert [(r.index, r.percent, r.step) for r in reports] == [
        (0, 10, 2),
        (1, 33, 7),
        (2, 50, 10),
        (3, 100, 20),
    ]
    assert [r.epochs_run for r in reports] == [0.2, 0.7, 1.0, 2.0]
    assert [r.finished for r in reports] == [False, False, False, True]
    assert {r.num_steps for r in reports} == {20}
    assert reports[2].examples_seen == len(toy.train)
    assert reports[3].examples_seen == 2 * len(toy.train)
    scored = {"accuracy", "macro_f1", "precision", "recall", "mcc", "loss"}
    assert all(set(r.metrics) == scored for r in reports)


def test_the_train_loss_of_an_untrained_model_is_that_of_guessing(pretrained, toy) -> None:
    first, *_ = run_fit(pretrained, toy, learning_rate=1e-12, epochs=1)
    assert first.train_loss == pytest.approx(math.log(3), abs=0.1)


@pytest.mark.parametrize("frozen_layers", [0, 1])
def test_the_same_seed_repeats_bitwise_on_the_same_model_object(pretrained, toy, frozen_layers):
    settings = {"learning_rate": 5e-3, "epochs": 2, "frozen_layers": frozen_layers}
    first = run_fit(pretrained, toy, **settings)
    run_fit(pretrained, toy, seed=3, epochs=1, learning_rate=0.1, frozen_layers=2)
    second = run_fit(pretrained, toy, **settings)
    assert without_times(first) == without_times(second)
    assert same_weights(first[-1].best.weights, second[-1].best.weights)


def test_another_seed_gives_other_losses(pretrained, toy) -> None:
    first, second = (run_fit(pretrained, toy, seed=seed, epochs=1) for seed in (17, 18))
    assert [r.train_loss for r in first] != [r.train_loss for r in second]


def test_dropout_follows_the_seed_and_not_the_global_generator(pretrained, toy) -> None:
    first = run_fit(pretrained, toy, epochs=1)
    torch.manual_seed(12345)
    assert without_times(run_fit(pretrained, toy, epochs=1)) == without_times(first)


def test_the_head_follows_the_seed(tiny_bert, toy) -> None:
    heads = [load_tiny(tiny_bert, toy, seed=s).model.classifier.weight for s in (17, 17, 18)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_loading_leaves_the_global_generator_alone(tiny_bert, toy) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_tiny(tiny_bert, toy)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_answer_of_false_ends_the_trial(pretrained, toy, stop_after: int) -> None:
    reports = run_fit(pretrained, toy, stop_after=stop_after, epochs=2)
    assert [r.percent for r in reports] == [10, 33][:stop_after]
    assert not reports[-1].finished


@pytest.mark.parametrize("learning_rate", [1e30, math.inf])
@pytest.mark.parametrize("objective", ["accuracy", "loss"])
def test_a_learning_rate_that_diverges_is_one_fault(pretrained, toy, learning_rate, objective):
    reports = run_fit(
        pretrained,
        toy,
        objective=objective,
        rungs=(50,),
        epochs=1,
        warmup=0.0,
        learning_rate=learning_rate,
    )
    assert len(reports) == 1
    (report,) = reports
    assert "not finite at step 2" in report.fault
    assert report.metrics == {}
    assert report.best is None
    assert not report.finished


def test_a_fault_keeps_the_best_of_the_marks_before_it(pretrained, toy) -> None:
    # The warm-up's first rate is 0, so the mark at step 1 judges a sound model.
    settings = {"rungs": (10, 33), "epochs": 1, "warmup": 0.5, "learning_rate": 1e30}
    sound, fault = run_fit(pretrained, toy, **settings)
    assert (sound.percent, sound.fault) == (10, None)
    assert (fault.index, fault.percent, fault.step) == (1, 30, 3)
    assert "not finite at step 3" in fault.fault
    assert fault.best == sound.best
    assert fault.best.metrics == sound.metrics


class Deferred(GradientWatch):
    """As on a GPU, which is not asked at every step."""

    def __init__(self, device, waits) -> None:
        super().__init__(device, waits=False)


@pytest.mark.parametrize(
    ("batch_size", "rungs", "ended_at"),
    [(32, (50,), 5), (16, (), STEPS_PER_LOOK)],  # at a mark; on the way to one
)
def test_a_gradient_that_a_gpu_was_not_asked_for_is_found_later(
    pretrained, toy, monkeypatch, batch_size, rungs, ended_at
) -> None:
    monkeypatch.setattr(fit_module, "GradientWatch", Deferred)
    settings = {"batch_size": batch_size, "rungs": rungs, "epochs": 1, "warmup": 0.0}
    (report,) = run_fit(pretrained, toy, **settings, learning_rate=1e30)
    rate = 1e30 * (1 - 1 / report.num_steps)
    assert f"not finite at step 2, learning rate {rate:.3g}" in report.fault
    assert report.step == ended_at
    assert report.best is None


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("frozen_layers", [0, "all"])
def test_a_fault_names_the_rate_that_was_configured(pretrained, toy, layer_decay, frozen_layers):
    settings = {"layer_decay": layer_decay, "head_learning_rate_multiplier": 3.0, "warmup": 0.0}
    settings |= {"frozen_layers": frozen_layers, "schedule": "constant", "epochs": 1, "rungs": ()}
    *_, last = run_fit(pretrained, toy, learning_rate=1e30, **settings)
    assert "learning rate 1e+30" in last.fault


def test_a_gpu_that_is_asked_now_and_then_trains_the_same(pretrained, toy, monkeypatch) -> None:
    settings = {"epochs": 1, "batch_size": 4, "max_grad_norm": 0.1}
    expected = run_fit(pretrained, toy, **settings)
    monkeypatch.setattr(fit_module, "GradientWatch", Deferred)
    assert without_times(run_fit(pretrained, toy, **settings)) == without_times(expected)


def test_a_fault_leaves_nothing_behind_for_the_next_trial(pretrained, toy) -> None:
    expected = run_fit(pretrained, toy, epochs=1)
    assert run_fit(pretrained, toy, epochs=1, warmup=0.0, learning_rate=1e30)[-1].fault
    assert without_times(run_fit(pretrained, toy, epochs=1)) == without_times(expected)


def test_weights_that_diverge_in_the_step_before_a_mark_are_a_fault(pretrained, toy) -> None:
    reports = run_fit(
        pretrained, toy, rungs=(), epochs=1, batch_size=512, warmup=0.0, learning_rate=1e30
    )
    assert [r.step for r in reports] == [1]
    assert reports[0].fault, f"a model of NaN was scored: {reports[0].metrics}"


@pytest.fixture
def misleading(toy: Dataset) -> Dataset:
    """Validation labels that learning makes worse, so that the best mark is an early one."""
    labels = (toy.validation.labels + 1) % 3
    return replace(toy, validation=replace(toy.validation, labels=labels))


@pytest.mark.parametrize("objective", ["accuracy", "loss"])
def test_the_best_weights_are_those_of_the_best_score(pretrained, misleading, objective) -> None:
    reports = run_fit(
        pretrained, misleading, objective=objective, epochs=6, learning_rate=5e-3, batch_size=16
    )
    scores = [r.metrics[objective] for r in reports]
    best = reports[-1].best
    expected = max(scores) if objective == "accuracy" else min(scores)
    assert best.score == expected == best.metrics[objective]
    assert best.percent == reports[scores.index(expected)].percent < 100
    assert best.metrics == reports[scores.index(expected)].metrics
    pretrained.reset(0)
    with torch.no_grad():
        for name, parameter in pretrained.trainable().items():
            parameter.copy_(best.weights[name])
    logits = evaluate(pretrained.model, TASK, misleading.validation, PAD, World())
    score = {"accuracy": metrics.accuracy, "loss": metrics.log_loss}[objective]
    assert score(logits, misleading.validation.labels) == best.score


def test_the_best_so_far_is_kept_while_training_goes_on(pretrained, toy) -> None:
    reports = run_fit(pretrained, toy, epochs=6, learning_rate=5e-3, batch_size=16)
    running = np.maximum.accumulate([r.metrics["accuracy"] for r in reports])
    assert [r.best.score for r in reports] == running.tolist()
    assert reports[-1].best.score > reports[0].best.score
    assert not same_weights(reports[0].best.weights, reports[-1].best.weights)


def test_a_tiny_model_learns_the_toy_task(pretrained, toy) -> None:
    constant = TASK.constant_scores(toy.train, toy.validation, toy.label_set)
    assert constant["accuracy"] < 0.4
    last = run_fit(pretrained, toy, epochs=8, learning_rate=5e-3, batch_size=16)[-1]
    assert last.best.score > 0.9
    assert last.metrics["accuracy"] > 0.9
    assert last.train_loss < 0.3


def test_only_trained_weights_are_kept_as_best(pretrained, toy) -> None:
    (report,) = run_fit(pretrained, toy, rungs=(), epochs=1, frozen_layers="all")
    assert {name.split(".")[0] for name in report.best.weights} == {"bert", "classifier"}
    assert all(n.startswith(("bert.pooler.", "classifier.")) for n in report.best.weights)


def test_seconds_are_counted_once_and_lie_within_the_wall(pretrained, toy) -> None:
    start = time.monotonic()
    reports = run_fit(pretrained, toy, epochs=2)
    wall = time.monotonic() - start
    last = reports[-1]
    assert last.eval_seconds > 0
    assert last.train_seconds > 0
    assert last.train_seconds + last.eval_seconds <= wall
    assert [r.train_seconds for r in reports] == sorted(r.train_seconds for r in reports)
    assert [r.eval_seconds for r in reports] == sorted(r.eval_seconds for r in reports)


def test_evaluation_uses_no_dropout_and_training_goes_back_to_it(tmp_path, toy) -> None:
    pretrained = load_tiny(tiny_model_folder(tmp_path, dropout=0.5), toy)
    pretrained.reset(0)
    first, second = (
        evaluate(pretrained.model, TASK, toy.validation, PAD, World()) for _ in range(2)
    )
    assert np.array_equal(first, second)
    run_fit(pretrained, toy, rungs=(10,), epochs=1, stop_after=1)
    assert pretrained.model.training


def test_evaluation_of_one_example_equals_its_row_in_the_whole(pretrained, toy) -> None:
    whole = evaluate(pretrained.model, TASK, toy.validation, PAD, World())
    one = toy.validation.offsets[3:5]
    alone = replace(
        toy.validation,
        tokens=toy.validation.tokens[one[0] : one[1]],
        offsets=one - one[0],
        labels=toy.validation.labels[3:4],
        rows=toy.validation.rows[3:4],
    )
    np.testing.assert_allclose(
        evaluate(pretrained.model, TASK, alone, PAD, World()), whole[3:4], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("max_grad_norm", "moves"), [(1.0, True), (1e-12, False)])
def test_the_clipped_gradient_includes_the_penalty(pretrained, toy, max_grad_norm, moves) -> None:
    # Below Adam's epsilon of 1e-8 a clipped gradient cannot move a weight by its usual step.
    run_fit(
        pretrained,
        toy,
        rungs=(),
        epochs=1,
        batch_size=512,
        warmup=0.0,
        learning_rate=1e-2,
        max_grad_norm=max_grad_norm,
        regularization=Regularization(kind="l2", strength=100.0),
    )
    moved = max(
        float((p.detach() - pretrained.pristine[n]).abs().max())
        for n, p in pretrained.trainable().items()
    )
    assert moved == pytest.approx(1e-2, rel=0.01) if moves else moved < 1e-5


def test_a_seed_begins_the_same_numbers_as_torchs_own() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    World().seed(5)
    assert torch.equal(torch.rand(3), expected)
