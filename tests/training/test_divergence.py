"""A trial that learns nothing is found out at a third of its schedule."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from sft_ray.training.divergence import DivergenceWatch, constant_loss
from sft_ray.training.examples import IGNORED, Dataset, Examples, LabelSet
from sft_ray.training.losses import LossOptions
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import Task, find_task
from sft_ray.training.world import World
from tests.models import load_tiny, run_fit


def dataset(labels: Any, names: tuple[str, ...], words: Any = None, lengths: Any = None) -> Dataset:
    lengths = np.ones(len(labels), dtype=int) if lengths is None else np.array(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    examples = Examples(
        tokens=np.ones(offsets[-1], dtype=np.int64),
        offsets=offsets,
        rows=np.arange(len(lengths)),
        segments=None,
        words=words,
        labels=np.array(labels),
    )
    return Dataset(examples, examples, LabelSet(names), "x", {}, 32)


def test_of_classes_it_is_the_entropy_of_their_shares() -> None:
    data = dataset([0, 0, 0, 1], ("a", "b"))
    found = constant_loss(find_task("text-classification"), data, LossOptions())
    assert found == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)


def test_of_values_it_is_their_variance() -> None:
    data = dataset([1.0, 2.0, 6.0], ())
    found = constant_loss(find_task("regression"), data, LossOptions())
    assert found == pytest.approx(np.var([1, 2, 6]), abs=1e-6)


def test_of_tags_only_labelled_tokens_count() -> None:
    words = np.zeros(5, dtype=np.int64)
    data = dataset([0, -100, 0, 1, -100], ("O", "B-X"), words=words, lengths=[3, 2])
    found = constant_loss(find_task("token-classification"), data, LossOptions())
    assert found == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3, abs=1e-6)


def test_of_questions_it_is_that_of_all_tokens_alike() -> None:
    task, labels, lengths = find_task("question-answering"), [[0, 0], [1, 2], [4, 6]], [3, 5, 7]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    expected = task.loss(torch.zeros(3, 7, 2), torch.tensor(labels), mask, LossOptions()).mean()
    found = constant_loss(task, dataset(labels, (), lengths=lengths), LossOptions())
    assert found == pytest.approx(float(expected), abs=1e-6)


def loss_over_all_rows(task: Task, data: Dataset, options: LossOptions) -> float:
    """As it is defined: the smallest mean over the training labels, one after the other."""
    train = data.train
    constant = torch.tensor(task.constant(train, data.label_set), requires_grad=True)
    labels = [torch.tensor(label) for label in train.labels]
    if task.per_token:
        labels = [label for label in labels if label != IGNORED]

    def closure() -> float:
        constant.grad = None
        logits = constant[None, None] if task.per_token else constant[None]
        losses = [
            task.loss(
                logits, label.view(logits.shape[:-1] + label.shape), torch.ones(1, 1), options
            )
            for label in labels
        ]
        loss = torch.cat(losses).mean()
        loss.backward()
        return float(loss.detach())

    torch.optim.LBFGS([constant], line_search_fn="strong_wolfe").step(closure)
    return closure()


OPTIONS = {
    "plain": LossOptions(),
    "smoothed": LossOptions(0.2),
    "weighed": LossOptions(0.1, torch.tensor([1.0, 3.0, 0.5])),
}
WORDS = np.zeros(5, dtype=np.int64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("text-classification", [0, 2, 2, 1, 2], None),
        ("text-classification", [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], None),
        ("multi-label", np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=np.uint8), None),
        ("token-classification", [0, IGNORED, 2, 2, 1], WORDS),
        ("regression", [1.0, 2.5, 1.0, -100.0], None),
    ],
)
def test_equal_labels_counted_once_give_the_loss_over_all_rows(
    name: str, labels: Any, words: Any, options: LossOptions
) -> None:
    task, asked = find_task(name), []

    def loss(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        asked.append(len(logits))
        return task.loss(logits, *others)

    data = dataset(labels, ("a", "b", "c"), words=words)
    found = constant_loss(replace(task, loss=loss), data, options)
    assert found == pytest.approx(loss_over_all_rows(task, data, options), rel=1e-12)
    assert set(asked) == {1 if data.train.labels.ndim == 2 else 3}


def test_other_rows_have_a_constant_of_their_own() -> None:
    few, many = dataset([0, 1], ("a", "b")), dataset([0, 1, 1, 1], ("a", "b"))
    setup = Setup(find_task("text-classification"), few, None, None, World())
    setup.constant_losses["0.0 None"] = math.log(2)
    assert setup.on(few) is setup
    assert setup.on(many).constant_losses == {}
    assert setup.on(many).micro_batches is setup.micro_batches


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
def test_no_constant_has_a_smaller_loss(smoothing: float, weights: list[float] | None) -> None:
    """Against a search over the simplex of all constant answers."""
    labels = [0] * 5 + [1] * 2 + [2] * 3
    options = LossOptions(smoothing, None if weights is None else torch.tensor(weights))
    task = find_task("text-classification")
    found = constant_loss(task, dataset(labels, ("a", "b", "c")), options)
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 1.5, (4000, 3)))
    truth = torch.tensor(labels)
    losses = [
        float(task.loss(one.expand(10, 3), truth, torch.ones(10, 1), options).mean())
        for one in logits
    ]
    assert found is not None
    assert found <= min(losses) + 1e-9
    assert found == pytest.approx(min(losses), abs=5e-3)
    assert softmax(logits.numpy(), axis=1).min() < 0.05  # the search was wide


def test_it_looks_at_a_tenth_of_the_steps_before_a_third_of_them() -> None:
    watch = DivergenceWatch(1.0, 100, World())
    seen = {}
    for step in range(1, 101):
        loss = 3.0 if 24 <= step <= 33 else 0.0
        seen[step] = watch.see(step, torch.tensor(loss * 2), 2)
    assert [step for step, verdict in seen.items() if verdict] == [33]
    assert seen[33] is not None
    assert "training loss 3.000 at 33 % is not below 1.000" in seen[33]


def test_a_learning_trial_and_a_short_schedule_are_left_alone() -> None:
    for num_steps, loss in ((100, 0.99), (40, 5.0)):
        watch = DivergenceWatch(1.0, num_steps, World())
        steps = range(1, num_steps + 1)
        assert not any(watch.see(step, torch.tensor(loss), 1) for step in steps)


def test_a_state_in_the_middle_goes_on_to_the_same_verdict() -> None:
    losses = np.random.default_rng(1).uniform(0, 2.2, 100)
    verdicts = []
    for interrupted in (False, True):
        watch = DivergenceWatch(0.5, 100, World())
        for step in range(1, 34):
            verdict = watch.see(step, torch.tensor(losses[step], dtype=torch.float64), 1)
            if interrupted and step == 28:
                watch.gather()
                state = watch.state()
                watch = DivergenceWatch(0.5, 100, World())
                watch.restore(state)
        verdicts.append(verdict)
    assert verdicts[0] == verdicts[1] is not None


@pytest.mark.parametrize("end_diverged", [True, False])
def test_a_trial_that_breaks_down_ends_at_a_third(tiny_bert, toy, end_diverged) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    reports = run_fit(
        pretrained, toy, learning_rate=0.3, epochs=6, batch_size=32, end_diverged=end_diverged
    )
    assert reports[-1].num_steps == 60
    if not end_diverged:
        assert reports[-1].finished
        return
    assert reports[-1].fault is not None
    assert reports[-1].fault.startswith("diverged: training loss ")
    assert (reports[-1].step, reports[-1].percent) == (20, 33)


def test_a_trial_that_learns_is_left_alone(tiny_bert, toy) -> None:
    pretrained = load_tiny(tiny_bert, toy)
    reports = run_fit(
        pretrained, toy, learning_rate=5e-3, epochs=12, batch_size=16, end_diverged=True
    )
    assert reports[-1].finished
