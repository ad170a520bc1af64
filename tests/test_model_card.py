"""The card of a winner says what it is, on invented results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_ray.analysis.model_card import model_card
from sft_ray.config import Experiment, Train
from sft_ray.yaml_text import parse_yaml


def card_of(
    model: str = "owner/base",
    train: dict[str, Any] | None = None,
    scored: str | None = None,
    **best: Any,
) -> str:
    """Of a search of two trials whose default recipe did not finish."""
    experiment = Experiment.from_tree(
        {"name": "mine", "model": model, "data": {"train": "x.csv", "split": {"validation": 0.1}}}
    )
    rows: list[dict[str, Any]] = [{"role": "default recipe"}, {"role": "sampled"}]
    tree = {
        "name": "mine",
        "metric": "accuracy",
        "trials": rows,
        "environment": {"sft_ray": "1", "data_fingerprint": "f"},
        "best": {
            "complete": True,
            "params": {"train.learning_rate": 1e-4},
            "train": Train(**(train or {})).model_dump(mode="json"),
            "validation": {"accuracy": 0.5},
            "gain_over_default": None,
            **best,
        },
    }
    return model_card(tree, experiment.to_tree(), ("a", "b"), scored=scored)


@pytest.mark.parametrize(
    ("model", "known"),
    [("owner/base", True), ("bert", True), ("package:some/model", False), ("{here}", False)],
)
def test_the_base_model_is_named_where_it_is_the_hubs(
    model: str, known: bool, tmp_path: Path
) -> None:
    model = model.format(here=tmp_path)
    card = card_of(model)
    head = parse_yaml(card.split("---\n")[1], "README.md")
    assert head.get("base_model") == (model if known else None)
    assert head["pipeline_tag"] == "text-classification"
    assert f"{model}, fine-tuned for text-classification" in card


def test_settings_that_were_fixed_are_told_too() -> None:
    train = {"learning_rate": 1e-4, "layer_decay": 0.9, "frozen_layers": 2, "epochs": 5}
    card = card_of(train=train, params={"train.learning_rate": 1e-4, "train.warmup": 0.06})
    rows = dict(line.strip("| ").split(" | ") for line in card.splitlines() if "| train." in line)
    assert rows["train.layer_decay"] == "0.9"
    assert (rows["train.frozen_layers"], rows["train.epochs"]) == ("2", "5")
    assert rows["train.regularization.weight_decay.strength"] == "0.01"
    assert rows["train.warmup"] == "0.06"  # searched, though it is the default
    assert "train.momentum" not in rows


def test_it_says_how_far_to_trust_the_scores() -> None:
    complete = " ".join(card_of().split())
    assert "They are the best of 2 trials on the same split" in complete
    assert "Gain over the default recipe: unknown: it did not finish." in complete
    unfinished = " ".join(card_of(complete=False).split())
    assert "No trial reached the end of its schedule: this one came furthest" in unfinished
    assert "the best of 2 trials" not in unfinished


def test_it_says_how_often_the_test_split_was_scored() -> None:
    twice = "scored 2 times in this run"
    for best in ({}, {"complete": False}):
        before, after = (" ".join(card_of(scored=s, **best).split()) for s in (None, twice))
        assert "; the test split had not been scored when this card was written." in before
        assert f"; the test split was {twice}." in after
    expected = {"mean": 0.5, "low": None, "high": None, "n": 2}
    test = {"metrics": {"accuracy": 0.75}, "num_examples": 40}
    confirmed = card_of(scored=twice, expected=expected, test=test)
    assert f"On the test split (40 examples), {twice} when this card was written: " in confirmed
    assert "There was no test split to score." in card_of(expected=expected, test=None)
    unnamed = card_of(scored="scored once", expected=expected, test=None)
    assert "The test split was scored once." in unnamed
