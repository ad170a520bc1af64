"""Exported models answer as the models they were made from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sft_ray import cli
from sft_ray.errors import ConfigError, TrialError
from sft_ray.serving import export
from sft_ray.serving.export import export_onnx
from sft_ray.serving.predict import load_predictor
from sft_ray.training.tasks import TASKS
from tests.models import (
    WIDE_VOCABULARY,
    load_tiny,
    save_tiny,
    task_dataset,
    tiny_model_folder,
)

onnxruntime = pytest.importorskip("onnxruntime")


def trained(folder: Path, task: str, model_type: str = "bert") -> Path:
    """A tiny model with a head for the task, as a model folder."""
    base = tiny_model_folder(
        folder / "base", model_type, vocabulary=WIDE_VOCABULARY, noise=0.1, seed=3
    )
    dataset = task_dataset(folder / "data", task, base, train=40, validation=20)
    pretrained = load_tiny(base, dataset, task=TASKS[task])
    save_tiny(folder / "mine", base, pretrained, dataset, {}, TASKS[task])
    return folder / "mine"


def run_onnx(folder: Path, texts: list[str]) -> Any:
    """As the documentation shows it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [i.name for i in session.get_inputs()]
    batch = tokenizer(texts, padding=True, return_tensors="np", return_token_type_ids=True)
    return session.run(None, {name: batch[name].astype(np.int64) for name in names})[0]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_agrees(task: str, tmp_path: Path) -> None:
    model = trained(tmp_path, task)
    found = export_onnx(str(model), str(tmp_path / "out" / "onnx"))
    assert found.largest_difference < 1e-5
    assert found.num_compared == export.ROWS_COMPARED
    expected = ("start_logits", "end_logits") if task == "question-answering" else ("logits",)
    assert found.outputs == expected
    assert found.inputs == ("input_ids", "attention_mask", "token_type_ids")
    folder = Path(found.folder)
    assert {"model.onnx", "config.json", "tokenizer.json", "sft_ray.json"} <= {
        f.name for f in folder.iterdir()
    }
    assert [f.name for f in folder.parent.iterdir()] == ["onnx"]
    if task == "text-classification":
        texts = ["the cat", "a very old oak near the house"]
        assert_same_labels(model, folder, texts)


def assert_same_labels(model: Path, folder: Path, texts: list[str]) -> None:
    predictor = load_predictor(str(model))
    answers = [a["label"] for a in predictor.predict({"text": t} for t in texts)]
    names = json.loads((folder / "config.json").read_text())["id2label"]
    logits = run_onnx(folder, texts)
    assert [names[str(i)] for i in logits.argmax(axis=1)] == answers


@pytest.mark.parametrize("family", ["distilbert", "roberta", "mpnet"])
def test_families_with_other_inputs_agree(family: str, tmp_path: Path) -> None:
    model = trained(tmp_path, "text-classification", family)
    found = export_onnx(str(model), str(tmp_path / "onnx"))
    assert found.largest_difference < 1e-5
    assert found.inputs[:2] == ("input_ids", "attention_mask")


def test_what_does_not_agree_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    model = trained(tmp_path, "text-classification")
    honest = export._write_graph

    def other_weights(predictor: Any, *arguments: Any) -> Any:
        found = honest(predictor, *arguments)
        with torch.no_grad():
            predictor.model.classifier.bias += 0.001
        return found

    monkeypatch.setattr(export, "_write_graph", other_weights)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TrialError, match=r"differ by 0\.001 .* more than 0\.0001; it is not kept"):
        export_onnx(str(model), str(tmp_path / "onnx"))
    assert sorted(tmp_path.iterdir()) == before


def test_mistakes_are_named_and_the_command_says_what_it_did(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    run = tmp_path / "runs" / "my"
    run.mkdir(parents=True)
    trained(tmp_path, "text-classification").rename(run / "best")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["export", str(run)])
    assert exit_.value.code == 2
    assert "export: say --onnx" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["export", str(run), "--onnx"])
    assert not exit_.value.code
    assert str(run / "onnx") in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        export_onnx(str(run))
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else honest(n, *a)
    )
    with pytest.raises(ConfigError, match=r"pip install 'sft-ray\[onnx\]'"):
        export_onnx(str(run))
