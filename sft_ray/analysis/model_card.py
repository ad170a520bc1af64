"""The README.md of a winner: what it is, how it was found, how far to trust it."""

from __future__ import annotations

from typing import Any

CARD = """---
library_name: transformers
pipeline_tag: {task}
base_model: {model}
---

# {name}

{model}, fine-tuned for {task} on {data} by sft_ray {version}.

| validation split | |
|---|---|
{scores}

The figures are of exactly these weights. They are the best of {num_trials} trials on the same
split, so expect somewhat less on new data; the test split was not scored. Gain over the default
recipe: {gain}.

| parameter | value |
|---|---|
{params}

Labels: {labels}. Seed {seed}, data fingerprint `{fingerprint}`.
"""


def model_card(tree: dict[str, Any], experiment: dict[str, Any], labels: tuple[str, ...]) -> str:
    """Markdown for the winner of results.json (`tree`) of a resolved experiment."""
    best, environment, data = tree["best"], tree["environment"], experiment["data"]
    gain = best["gain_over_default"]
    return CARD.format(
        task=experiment["task"],
        model=experiment["model"],
        name=tree["name"],
        data=data["path"] or data["train"],
        version=environment["sft_ray"],
        scores="\n".join(f"| {k} | {v:.4f} |" for k, v in best["validation"].items()),
        num_trials=len(tree["trials"]),
        gain="unknown, it did not finish" if gain is None else f"{gain:+.4f} {tree['metric']}",
        params="\n".join(f"| {k} | {v} |" for k, v in best["params"].items()),
        labels=", ".join(labels),
        seed=experiment["seed"],
        fingerprint=environment["data_fingerprint"],
    )
