"""Attributions add up, and point to what decides."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_ray import cli
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.serving.explain import attributions, explained
from sft_ray.serving.predict import load_predictor
from sft_ray.single_trial import run_training
from sft_ray.training.tasks import TASKS
from tests.models import (
    KEYWORDS,
    WIDE_VOCABULARY,
    load_tiny,
    save_tiny,
    task_dataset,
    task_rows,
    tiny_model_folder,
)

# One for each way in which attention is computed, or the embeddings are made.
FAMILIES = ("bert", "distilbert", "electra", "mpnet", "deberta", "deberta-v2", "modernbert")


def untrained(folder: Path, task: str, family: str = "bert") -> Any:
    base = tiny_model_folder(folder / "base", family, vocabulary=WIDE_VOCABULARY, noise=0.1, seed=3)
    dataset = task_dataset(folder / "data", task, base, train=40, validation=20)
    pretrained = load_tiny(base, dataset, task=TASKS[task])
    save_tiny(folder / "mine", base, pretrained, dataset, {}, TASKS[task])
    return load_predictor(str(folder / "mine"), torch.device("cpu"))


def assert_complete(explanation: dict[str, Any]) -> None:
    """The tokens' scores sum to what the output is above the baseline's."""
    difference = explanation["output"] - explanation["baseline"]
    total = sum(score for _, score in explanation["tokens"])
    assert abs(difference) > 1e-4
    assert total == pytest.approx(difference, abs=0.01 * abs(difference) + 1e-5)
    assert explanation["gap"] == pytest.approx(difference - total, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_are_complete_in_every_family(family: str, tmp_path: Path) -> None:
    predictor = untrained(tmp_path, "text-classification", family)
    rows = task_rows("text-classification", 3, seed=5)
    for answer, plain in zip(explained(predictor, rows), predictor.predict(rows), strict=True):
        assert_complete(answer["explanation"])
        assert answer["explanation"]["of"] == answer["label"] == plain["label"]


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.per_token])
def test_attributions_are_complete_for_every_task(task: str, tmp_path: Path) -> None:
    predictor = untrained(tmp_path, task)
    for row, answer in zip(
        task_rows(task, 3, seed=5), explained(predictor, task_rows(task, 3, seed=5)), strict=True
    ):
        assert_complete(answer["explanation"])
        shown = [token for token, _ in answer["explanation"]["tokens"]]
        if task != "relation-extraction":  # which marks its entities
            assert shown == row["text"].split()


def test_an_unknown_word_counts_though_its_number_be_0(tmp_path: Path) -> None:
    predictor = untrained(tmp_path, "text-classification")
    tokenizer = predictor.encoder.tokenizer
    tokenizer.cls_token, tokenizer.unk_token = tokenizer.unk_token, tokenizer.cls_token
    assert tokenizer.unk_token_id == 0
    ids = torch.tensor([[tokenizer.cls_token_id, 0, tokenizer.sep_token_id]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    scores, _, _ = attributions(predictor, inputs, 0, 16)
    assert [abs(score) > 1e-4 for score in scores] == [False, True, False]


def test_the_keyword_of_a_trained_model_stands_out(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch, capsys
) -> None:
    train = {"learning_rate": 3e-3, "epochs": 20, "batch_size": 16}
    tree = {**tiny_experiment.to_tree(), "train": train, "storage": str(tmp_path)}
    result = run_training(Experiment.from_tree(tree), quiet=True)
    assert result.best["validation"]["accuracy"] > 0.9
    texts = ["we went near the old horse", "a rose in the big house", "two of the hammer"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["predict", result.location, "--explain"])
    assert not exit_.value.code
    keywords = {word: group for group, words in KEYWORDS.items() for word in words}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(texts)
    for answer in map(json.loads, lines):
        assert_complete(answer["explanation"])
        # A kind that the baseline gets already can only be talked out of: what counts is size.
        strongest = max(answer["explanation"]["tokens"], key=lambda pair: abs(pair[1]))[0]
        assert keywords[strongest] == answer["label"]


def test_tasks_that_answer_per_token_are_refused(tmp_path: Path) -> None:
    predictor = untrained(tmp_path, "token-classification")
    with pytest.raises(ConfigError, match="token-classification answers per token"):
        next(explained(predictor, [{"tokens": ["cat"]}]))
