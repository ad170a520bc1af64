"""What another seed changes on a loaded model, and a training set cut to a share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from sft_ray.training.examples import Dataset
from sft_ray.training.families import FAMILIES
from sft_ray.training.labels import LabelSet
from sft_ray.training.model import load_pretrained
from sft_ray.training.tasks import TASKS
from tests.models import CPU, TASK, task_dataset, tiny_model_folder


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_another_seed_draws_the_head_that_a_load_with_it_would(
    family: str, toy: Dataset, tmp_path: Path
) -> None:
    folder = str(tiny_model_folder(tmp_path / family, family))

    def load(seed: int) -> dict[str, torch.Tensor]:
        loaded = load_pretrained(folder, TASK, toy.label_set, seed=seed, device=CPU)
        return {name: loaded.pristine[name] for name in sorted(loaded.from_scratch)}

    loaded = load_pretrained(folder, TASK, toy.label_set, seed=1, device=CPU)
    pretrained = {n: p.clone() for n, p in loaded.pristine.items() if n not in loaded.from_scratch}
    assert loaded.from_scratch
    for seed in (2, 1, 1):
        loaded.reset(0, seed=seed)
        wanted, state = load(seed), loaded.model.state_dict()
        for name, head in wanted.items():
            assert torch.equal(state[name], head), (seed, name)
        for name, weights in pretrained.items():
            assert torch.equal(state[name], weights), (seed, name)
    one, two = load(1), load(2)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_head_is_kept_for_the_classes_it_tells_apart_and_no_others(
    tiny_bert: Path, toy: Dataset, tmp_path: Path
) -> None:
    mine = LabelSet(("animal", "plant"))
    trained = load_pretrained(str(tiny_bert), TASK, mine, seed=3, device=CPU)
    trained.model.save_pretrained(tmp_path)
    head = trained.pristine["classifier.weight"]
    again = load_pretrained(str(tmp_path), TASK, mine, seed=4, device=CPU)
    assert not again.from_scratch
    assert torch.equal(again.pristine["classifier.weight"], head)
    for others in (("zoo", "garden"), ("plant", "animal")):
        other = load_pretrained(str(tmp_path), TASK, LabelSet(others), seed=4, device=CPU)
        assert other.from_scratch == {"classifier.weight", "classifier.bias"}
        assert not torch.equal(other.pristine["classifier.weight"], head)
        before = other.pristine["classifier.weight"].clone()
        other.reset(0, seed=5)
        assert not torch.equal(other.pristine["classifier.weight"], before)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_only_what_has_a_row_per_class_is_drawn_for_other_classes(
    family: str, toy: Dataset, tmp_path: Path, head: str
) -> None:
    """ModernBERT's head is pretrained with its encoder."""
    base = tiny_model_folder(tmp_path / "base", family)
    auto_model = getattr(transformers, f"AutoModelFor{head}")
    many = {} if head == "MaskedLM" else {"num_labels": len(toy.label_names)}
    saved = auto_model.from_pretrained(base, **many)
    saved.save_pretrained(tmp_path / "saved")
    loaded = load_pretrained(str(tmp_path / "saved"), TASK, toy.label_set, seed=3, device=CPU)
    known = {n: p for n, p in saved.named_parameters() if n in loaded.head()}
    drawn = {n for n in known if not torch.equal(known[n], loaded.pristine[n])}
    rows = [len(loaded.pristine[name]) for name in loaded.from_scratch & set(known)]
    if head == "MaskedLM":
        assert not drawn
        assert bool(known) == (family == "modernbert")
    else:
        assert rows == [len(toy.label_names)] * 2
        assert any(name.endswith("weight") for name in drawn)


def test_a_head_has_the_size_its_model_prescribes(tiny_bert: Path, toy: Dataset) -> None:
    loaded = load_pretrained(str(tiny_bert), TASK, toy.label_set, seed=3, device=CPU)
    weight, bias = loaded.pristine["classifier.weight"], loaded.pristine["classifier.bias"]
    assert 0.5 < weight.std() / loaded.model.config.initializer_range < 1.5
    assert not bias.any()


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_training_share_keeps_whole_rows_and_grows(
    task: str, tmp_path: Path, wide_bert: Path
) -> None:
    dataset = task_dataset(tmp_path, task, wide_bert)
    all_rows = set(dataset.train.rows.tolist())
    before: set[int] = set()
    for share in (0.01, 0.1, 0.5, 1.0):
        small = dataset.with_training_share(share, seed=5)
        rows = set(small.train.rows.tolist())
        assert len(rows) == max(1, round(share * len(all_rows)))
        assert before <= rows
        before = rows
        assert small.validation is dataset.validation
        old = [i for i, row in enumerate(dataset.train.rows) if row in rows]
        assert len(old) == len(small.train)
        for new, item in enumerate(old):
            here, there = small.train[new], dataset.train[item]
            np.testing.assert_array_equal(small.train.tokens[here], dataset.train.tokens[there])
            labels, source = small.train.labels, dataset.train.labels
            if dataset.train.labels_per_token:
                np.testing.assert_array_equal(labels[here], source[there])
            else:
                np.testing.assert_array_equal(labels[new], source[item])


def test_a_share_follows_the_seed(toy: Dataset) -> None:
    shares = [toy.with_training_share(0.2, seed).train.rows.tolist() for seed in (1, 1, 2)]
    assert shares[0] == shares[1] != shares[2]
