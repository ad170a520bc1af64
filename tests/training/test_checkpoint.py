"""What a trial leaves behind: a model folder that anyone can load, and its predictions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from sft_ray.training.batches import collate
from sft_ray.training.checkpoint import save_predictions
from sft_ray.training.data import load_tokenizer
from sft_ray.training.encoding import Encoder
from sft_ray.training.examples import Dataset
from sft_ray.training.forward import evaluate, model_outputs
from sft_ray.training.model import Pretrained
from sft_ray.training.progress import Best
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import TASKS, Task
from sft_ray.training.world import World
from tests.models import (
    CPU,
    PAD,
    WIDE_VOCABULARY,
    dataset_of,
    load_tiny,
    run_fit,
    save_tiny,
    task_dataset,
    task_rows,
)

RELATE, ANSWER = "relation-extraction", "question-answering"


@pytest.fixture(scope="module", params=list(TASKS))
def trained(request, tmp_path_factory: pytest.TempPathFactory, wide_bert: Path) -> Any:
    """A task, its data, what was learned, and the folder it was saved to."""
    name = request.param
    folder, task = tmp_path_factory.mktemp(name), TASKS[name]
    data = {"negative_label": "none"} if name == RELATE else {}
    dataset = task_dataset(folder / "rows", name, wide_bert, train=64, validation=20, **data)
    pretrained = load_tiny(wide_bert, dataset, task=task)
    best = run_fit(pretrained, dataset, task=task, rungs=(), epochs=2, learning_rate=5e-3)[-1].best
    save_tiny(folder / "model", wide_bert, pretrained, dataset, best.weights, task)
    return SimpleNamespace(
        task=task, dataset=dataset, pretrained=pretrained, best=best, folder=folder / "model"
    )


def test_the_folder_holds_no_pickles_and_says_how_to_feed_the_model(trained) -> None:
    files = {file.name for file in trained.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "sft_ray.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    facts = json.loads((trained.folder / "sft_ray.json").read_text(encoding="utf-8"))
    assert facts == {
        "task": trained.task.name,
        "inputs": [],
        "max_length": 32,
        "doc_stride": 64,
        "precision": "float32",
        "negative_label": "none" if trained.task.name == RELATE else None,
        "data_fingerprint": trained.dataset.fingerprint,
    }


def test_the_folder_loads_by_its_auto_class_and_gives_the_same_outputs(trained) -> None:
    auto = getattr(transformers, trained.task.auto_model)
    back, info = auto.from_pretrained(trained.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    found = evaluate(back, trained.task, trained.dataset.validation, PAD, World())
    np.testing.assert_allclose(found, trained.best.outputs, atol=1e-5, rtol=0)
    assert back.get_input_embeddings().num_embeddings == len(WIDE_VOCABULARY)
    if trained.task.classes:
        assert tuple(back.config.id2label.values()) == trained.dataset.label_names
    assert back.config.problem_type == trained.task.problem_type


def test_the_saved_tokenizer_encodes_the_validation_rows_as_before(trained) -> None:
    encoder = Encoder(load_tokenizer(str(trained.folder)), 32)
    again = trained.task.encode(trained.dataset.validation.raw, encoder)
    np.testing.assert_array_equal(again.tokens, trained.dataset.validation.tokens)
    np.testing.assert_array_equal(again.offsets, trained.dataset.validation.offsets)


def test_predictions_are_one_row_per_validation_row_with_its_answer(trained, tmp_path) -> None:
    name = trained.task.name
    setup = setup_of(trained.task, trained.dataset, trained.pretrained)
    save_predictions(tmp_path / "p.parquet", setup, trained.best.outputs)
    table = pq.read_table(tmp_path / "p.parquet")
    rows = task_rows(name, 20, seed=2)
    assert table.num_rows == len(rows)
    answers = trained.task.answer(
        trained.best.outputs, trained.dataset.validation, trained.dataset.label_set
    )
    for row, answer, found in zip(rows, answers, table.to_pylist(), strict=True):
        assert {key: found[key] for key in row} == row
        assert {key: found[f"predicted_{key}"] for key in answer} == answer
    assert len(table.column_names) == len(rows[0]) + len(answers[0])


def setup_of(task: Task, dataset: Dataset, pretrained: Pretrained | None) -> Setup:
    return Setup(task, dataset, pretrained, None, World())


@pytest.mark.parametrize("name", ["multi-label", "token-classification"])
def test_predictions_of_nothing_at_all_can_be_written(name, tmp_path, wide_bert) -> None:
    task, dataset = TASKS[name], task_dataset(tmp_path / "rows", name, wide_bert, train=20)
    classes = len(dataset.label_names)
    rows = len(dataset.validation.tokens) if task.per_token else len(dataset.validation)
    outputs = np.full((rows, classes), -9.0)
    if name == "token-classification":
        outputs[:, dataset.label_names.index("O")] = 9
    save_predictions(tmp_path / "p.parquet", setup_of(task, dataset, None), outputs)
    column = {"multi-label": "predicted_labels", "token-classification": "predicted_entities"}
    found = pq.read_table(tmp_path / "p.parquet").column(column[name]).to_pylist()
    assert found == [[]] * 60


def test_predictions_are_per_question_and_not_per_window(tmp_path, wide_bert) -> None:
    context = " ".join(["the old road"] * 9 + ["cat"])
    answers = {"text": ["cat"], "answer_start": [context.index("cat")]}
    rows = [{"question": "one in the ?", "context": context, "answers": answers}] * 3
    dataset = dataset_of(tmp_path / "rows", ANSWER, wide_bert, rows, max_length=16)
    assert len(dataset.validation) > 6
    outputs = np.zeros((len(dataset.validation.tokens), 2))
    setup = setup_of(TASKS[ANSWER], dataset, None)
    save_predictions(tmp_path / "p.parquet", setup, outputs)
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 3


def test_best_weights_and_outputs_belong_together(trained) -> None:
    best: Best = trained.best
    pretrained = trained.pretrained
    pretrained.reset(0)
    with torch.no_grad():
        for name, parameter in pretrained.trainable().items():
            parameter.copy_(best.weights[name])
    found = evaluate(pretrained.model, trained.task, trained.dataset.validation, PAD, World())
    assert np.array_equal(found, best.outputs)


def test_outputs_per_token_stand_where_their_tokens_do(trained) -> None:
    validation = trained.dataset.validation
    pretrained = trained.pretrained
    whole = evaluate(pretrained.model, trained.task, validation, PAD, World())
    for item in (0, len(validation) - 1):
        batch = collate(validation, np.array([item]), pad_token=PAD, device=CPU)
        with torch.no_grad():
            alone = model_outputs(pretrained.model, batch)[0].numpy()
        where = validation[item] if trained.task.per_token else item
        np.testing.assert_allclose(whole[where], alone, atol=1e-5, rtol=0)
