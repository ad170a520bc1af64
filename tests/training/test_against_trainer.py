"""From equal weights and batches our losses are those of `transformers.Trainer`, for every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.against_trainer import LOSS_LIMIT, STEPS, STEPS_TRAIN, compare_steps, for_steps
from sft_ray.config import Data, Regularization, Train
from sft_ray.training.data import open_dataset, prepare
from sft_ray.training.tasks import TASKS
from tests.models import FILLERS, KEYWORDS, PAD, WORDS

SEED = 17
# So strong that decay, clipping and schedule each show in the losses of 20 steps.
TRAIN = STEPS_TRAIN.model_copy(
    update={
        "learning_rate": 3e-3,
        "regularization": Regularization(kind="weight_decay", strength=0.3),
        "max_grad_norm": 0.5,
    }
)
GROUPS = list(KEYWORDS)
GROUP_OF = {word: group for group, words in KEYWORDS.items() for word in words}


def some_words(rng: np.random.Generator) -> list[str]:
    """3 to 14 words, about a third of them keywords."""
    return [
        str(rng.choice(WORDS if rng.random() < 0.3 else FILLERS))
        for _ in range(rng.integers(3, 15))
    ]


def class_row(rng: np.random.Generator) -> dict[str, Any]:
    """A pair of texts, so that both parts carry their segment."""
    group = str(rng.choice(GROUPS))
    text = " ".join([*some_words(rng), str(rng.choice(KEYWORDS[group]))])
    return {"text": text, "text_pair": " ".join(some_words(rng)), "label": group}


def labels_row(rng: np.random.Generator) -> dict[str, Any]:
    words = some_words(rng)
    labels = sorted({GROUP_OF[word] for word in words if word in GROUP_OF})
    return {"text": " ".join(words), "labels": labels}


def value_row(rng: np.random.Generator) -> dict[str, Any]:
    words = some_words(rng)
    return {"text": " ".join(words), "label": sum(word in GROUP_OF for word in words) / 3}


def tags_row(rng: np.random.Generator) -> dict[str, Any]:
    # "cats" and its like are two pieces, of which only the first is labelled.
    words = [word + "s" if word in GROUP_OF else word for word in some_words(rng)]
    return {
        "tokens": words,
        "tags": [f"B-{GROUP_OF[w[:-1]]}" if w[:-1] in GROUP_OF else "O" for w in words],
    }


def question_row(rng: np.random.Generator) -> dict[str, Any]:
    """A context of several windows."""
    words = [str(word) for word in rng.choice(FILLERS, size=60)]
    place, answer = int(rng.integers(60)), str(rng.choice(WORDS))
    words[place] = answer
    start = sum(len(word) + 1 for word in words[:place])
    answers = {"text": [answer], "answer_start": [start]}
    question = f"{GROUP_OF[answer]} was there?"
    return {"question": question, "context": " ".join(words), "answers": answers}


def relation_row(rng: np.random.Generator) -> dict[str, Any]:
    first, second = (str(word) for word in rng.choice(WORDS, size=2))
    before, between = " ".join(some_words(rng)), " ".join(some_words(rng))
    start = len(before) + 1
    object_start = start + len(first) + len(between) + 2
    return {
        "text": f"{before} {first} {between} {second}",
        "subject_start": start,
        "subject_end": start + len(first),
        "object_start": object_start,
        "object_end": object_start + len(second),
        "label": "same" if GROUP_OF[first] == GROUP_OF[second] else "other",
    }


ROWS: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "text-classification": class_row,
    "multi-label": labels_row,
    "regression": value_row,
    "token-classification": tags_row,
    "question-answering": question_row,
    "relation-extraction": relation_row,
}


Compare = Callable[[str, Train], tuple[list[float], list[float]]]


@pytest.fixture
def compare(tiny_bert: Path, tmp_path: Path) -> Compare:
    """Losses of ours and of `Trainer` on generated rows of a task."""

    def compare(name: str, train: Train) -> tuple[list[float], list[float]]:
        task, rng = TASKS[name], np.random.default_rng(SEED)
        num_items = STEPS * train.batch_size
        for split, count in (("train", num_items), ("validation", 30)):
            rows = [ROWS[name](rng) for _ in range(count)]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        data = Data(
            train=str(tmp_path / "train.parquet"),
            validation=str(tmp_path / "validation.parquet"),
            max_length=48,
        )
        dataset = open_dataset(prepare(data, task, str(tiny_bert), None, SEED))
        dataset = for_steps(dataset, task, num_items, SEED)
        tokenizer = SimpleNamespace(pad_token_id=PAD)
        return compare_steps(str(tiny_bert), task, dataset, tokenizer, train, SEED)

    return compare


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_those_of_the_trainer(name: str, compare: Compare) -> None:
    ours, theirs = compare(name, TRAIN)
    assert len(ours) == STEPS
    assert theirs == pytest.approx(ours, abs=LOSS_LIMIT, rel=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"regularization": Regularization(kind="weight_decay", strength=0.0)},
        {"max_grad_norm": 1e9},
        {"warmup": 0.0},
        {"schedule": "cosine"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_limit_tells_one_setting_from_another(
    changed: dict[str, Any], compare: Compare
) -> None:
    ours, _ = compare("text-classification", TRAIN)
    _, theirs = compare("text-classification", TRAIN.model_copy(update=changed))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > LOSS_LIMIT
