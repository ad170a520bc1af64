"""A trained model as a Hugging Face folder, and its answers beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sft_ray.config import Data
from sft_ray.training.metrics import Floats
from sft_ray.training.setup import Setup
from sft_ray.training.world import resolve_precision

MODEL_FACTS = "sft_ray.json"  # how to feed the model: task, optional inputs, length, stride


def save_model(
    folder: Path, setup: Setup, trained: dict[str, torch.Tensor], data: Data, precision: str
) -> None:
    """Write the whole model with `trained` weights; `from_pretrained(folder)` reads it back.

    `precision` is the one it was trained and scored with.
    """
    state = setup.pretrained.full_state(trained)
    setup.pretrained.model.save_pretrained(folder, state_dict=state)
    setup.tokenizer.save_pretrained(folder)
    has = setup.dataset.validation.has
    facts = {
        "task": setup.task.name,
        "inputs": [name for name in setup.task.optional_inputs if has(name)],
        "max_length": setup.dataset.max_length,
        "doc_stride": data.doc_stride,
        "precision": str(resolve_precision(precision, setup.world.device)[0]).split(".")[-1],
        "negative_label": setup.dataset.label_set.negative,
        "data_fingerprint": setup.dataset.fingerprint,
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (folder / MODEL_FACTS).write_text(text + "\n", encoding="utf-8")


def save_predictions(path: Path, setup: Setup, outputs: Floats) -> None:
    """Parquet: every validation row with its answer; list columns and texts as they were read."""
    validation = setup.dataset.validation
    assert validation.raw is not None  # a validation split keeps its rows
    answers = setup.task.answer(outputs, validation, setup.dataset.label_set)
    table = validation.raw
    for name, column in _as_columns(answers).items():
        table = table.append_column(f"predicted_{name}", column)
    pq.write_table(table, path)


def _as_columns(answers: list[dict[str, Any]]) -> dict[str, pa.Array]:
    table = pa.Table.from_pylist(answers)
    return {name: table.column(name) for name in table.column_names}
