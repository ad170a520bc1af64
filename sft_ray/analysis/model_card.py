"""The README.md of a winner: what it is, how it was found, how far to trust it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft_ray import space as spaces
from sft_ray.analysis.rows import why_no_gain
from sft_ray.config import Train

CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
{base}---

# {name}

{model}, fine-tuned for {task} on {data} by sft_ray {version}.

| validation split | |
|---|---|
{scores}

The figures are of exactly these weights. {selection}

| parameter | value |
|---|---|
{params}

{labels}Seed {seed}, data fingerprint `{fingerprint}`.
"""
SEARCHED = """They are the best of {num_trials} trials on the same split, so expect somewhat less on
new data; {test}. Gain over the default recipe: {gain}."""
CONFIRMED = """They are those of one training with a seed that was settled beforehand. Over {n}
fresh seeds the configuration reaches {mean:.4f} {metric} on average{interval}, {gain} over
the default recipe on the same seeds. {test}"""
SINGLE = """They are the best evaluation of one training on the same split, so expect somewhat less
on new data; {test}."""
UNFINISHED = """No trial reached the end of its schedule: this one came furthest and was stopped
before its end, so it would likely have scored otherwise there; {test}."""
NOT_SCORED = "the test split had not been scored when this card was written"
# Tasks that the hub's pipelines know by another name.
PIPELINES = {
    "multi-label": "text-classification",
    "regression": "text-classification",
    "relation-extraction": "text-classification",
}


def model_card(
    tree: dict[str, Any],
    experiment: dict[str, Any],
    labels: tuple[str, ...],
    *,
    scored: str | None,
) -> str:
    """Markdown for the winner of results.json (`tree`) of a resolved experiment.

    Args:
        scored: how often the test split was scored in the run, in words; None if it was not.
    """
    best, environment, data = tree["best"], tree["environment"], experiment["data"]
    gain, task, num_trials = best["gain_over_default"], experiment["task"], len(tree["trials"])
    test = NOT_SCORED if scored is None else f"the test split was {scored}"
    searched = SEARCHED.format(
        num_trials=num_trials,
        test=test,
        gain=f"unknown: it {why_no_gain(tree['trials']).removeprefix('which ')}"
        if gain is None
        else f"{gain:+.4f} {tree['metric']}",
    )
    selection = searched if num_trials > 1 else SINGLE.format(test=test)
    if not best["complete"]:
        selection = UNFINISHED.format(test=test)
    if "expected" in best:
        selection = _confirmed(tree, scored)
    # The searched ones too where they are the defaults.
    params = settings_of(Train.model_validate(best["train"])) | best["params"]
    return CARD.format(
        pipeline=PIPELINES.get(task, task),
        task=task,
        model=experiment["model"],
        base=_base_line(experiment["model"]),
        name=tree["name"],
        data=data["path"] or data["train"],
        version=environment["sft_ray"],
        scores="\n".join(f"| {k} | {v:.4f} |" for k, v in best["validation"].items()),
        selection=selection,
        params="\n".join(f"| {k} | {v} |" for k, v in params.items()),
        labels=f"Labels: {', '.join(labels)}. " if labels else "",
        seed=best.get("seed", experiment["seed"]),
        fingerprint=environment["data_fingerprint"],
    )


def settings_of(train: Train) -> dict[str, Any]:
    """What every search varies, and whatever else differs from the defaults, by dotted path."""
    always = {"learning_rate", "batch_size", "epochs", "regularization", "frozen_layers"}
    default = Train().model_dump()
    chosen = {n: v for n, v in train.model_dump().items() if n in always or v != default[n]}
    chosen["regularization"] = {
        name: value for name, value in chosen["regularization"].items() if value is not None
    }
    return spaces.parameters({f"train.{name}": value for name, value in chosen.items()})


def _base_line(model: str) -> str:
    """Of the card's head; none where the hub would refuse what is no id of its own."""
    is_local = model.startswith("package:") or Path(model).exists()
    return "" if is_local else f"base_model: {model}\n"


def _confirmed(tree: dict[str, Any], scored: str | None) -> str:
    best, test = tree["best"], "There was no test split to score."
    expected, interval = best["expected"], ""
    if expected["low"] is not None:
        interval = f" (95 % interval {expected['low']:.4f} to {expected['high']:.4f})"
    gain = best["gain_over_default"]  # None: the default recipe finished on none of them
    if best["test"] is not None:
        found = ", ".join(f"{k} {v:.4f}" for k, v in best["test"]["metrics"].items())
        how_often = scored or "scored once"  # the record may be lost
        test = (
            f"On the test split ({best['test']['num_examples']} examples), {how_often} when this "
            f"card was written: {found}."
        )
    elif scored is not None:  # which the experiment does not name
        test = f"The test split was {scored}."
    return CONFIRMED.format(
        n=expected["n"],
        mean=expected["mean"],
        interval=interval,
        metric=tree["metric"],
        gain="by an unknown amount" if gain is None else f"{gain:+.4f}",
        test=test,
    )
