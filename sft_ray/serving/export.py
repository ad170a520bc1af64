"""`sft-ray export --onnx`: a model as an ONNX folder whose answers were compared with ours."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft_ray.errors import ConfigError, TrialError
from sft_ray.location import refuse_empty
from sft_ray.run_store import winner_of
from sft_ray.serving.predict import Predictor, load_predictor
from sft_ray.serving.samples import sample_rows
from sft_ray.training import batches
from sft_ray.training.checkpoint import MODEL_FACTS
from sft_ray.training.examples import Examples
from sft_ray.training.families import reads_segments
from sft_ray.training.metrics import Floats
from sft_ray.training.model_facts import resolve_model

TOLERANCE = 1e-4  # of a raw output, ONNX Runtime against PyTorch, both in float32
ROWS_COMPARED = 100
ROWS_PER_PASS = 8
OPSET = 20
NEEDED = ("onnx", "onnxscript", "onnxruntime")
MODEL = "model.onnx"


@dataclass(frozen=True)
class Export:
    """What was written into `folder`.

    Attributes:
        inputs: names of the graph's inputs, int64 [batch, length].
        outputs: names of its outputs, float32.
        num_compared: rows whose outputs were compared.
        largest_difference: of any raw output.
    """

    folder: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    num_compared: int
    largest_difference: float


def export_onnx(model: str, out: str | None = None) -> Export:
    """Write model.onnx with its tokenizer, label names and facts into a new folder.

    Batch size and length are free.  The graph computes in float32 whatever the training did.

    Args:
        model: run folder, model folder or hub id.
        out: default: `onnx` in a run folder, else the model's name with -onnx.

    Raises:
        ConfigError: a package is missing, there is no such model, or the folder exists.
        TrialError: the exporter fails on the model, or its outputs are off by more than
            `TOLERANCE`; nothing is left behind.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"export: {missing[0]} is not installed; pip install 'sft-ray[onnx]'")
    refuse_empty("--out", out)
    folder = Path(out) if out else _beside(model)
    if folder.exists():
        raise ConfigError(f"{folder} exists and is not overwritten; remove it or choose --out")
    predictor = load_predictor(model, torch.device("cpu"), as_trained=False)
    predictor = replace(predictor, dtype=torch.float32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        inputs, outputs = _write_graph(predictor, made / MODEL, model)
        difference, num_compared = _compare(predictor, made / MODEL, inputs)
        if not difference <= TOLERANCE:
            raise TrialError(
                f"the exported model's outputs differ by {difference:.2g} from the model's, more "
                f"than {TOLERANCE:g}; it is not kept"
            )
        predictor.model.config.save_pretrained(made)
        predictor.encoder.tokenizer.save_pretrained(made)
        facts = Path(resolve_model(winner_of(model))) / MODEL_FACTS
        if facts.is_file():
            shutil.copy(facts, made)
        made.rename(folder)
    return Export(str(folder), inputs, outputs, num_compared, difference)


def _beside(model: str) -> Path:
    if winner_of(model) != model:
        return Path(model) / "onnx"
    return Path(f"{Path(model).absolute().name}-onnx")


class _Graph(torch.nn.Module):
    """The model with tensors in and tensors out."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self._model, self._inputs = model, inputs
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> Any:
        found = self._model(**dict(zip(self._inputs, tensors, strict=True)))
        if "start_logits" in found:
            return found.start_logits, found.end_logits
        return found.logits


def _write_graph(
    predictor: Predictor, path: Path, name: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    model = predictor.model
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    if reads_segments(model):
        inputs += ("token_type_ids",)
    outputs: tuple[str, ...] = ("logits",)
    if predictor.task.name == "question-answering":
        outputs = ("start_logits", "end_logits")
    examples = _examples(predictor, 3)  # more than one row, and no two sizes alike
    batch = next(_batches(predictor, examples, inputs))[1]
    sizes = {
        0: torch.export.Dim("batch", min=1, max=2**15),
        1: torch.export.Dim("length", min=2, max=predictor.encoder.max_length),
    }
    chatter = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in chatter]
    for logger in chatter:  # about operators of packages that are not there, and its own steps
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):  # of the exporter about its own parts
            program = torch.onnx.export(
                _Graph(model, inputs),
                tuple(torch.from_numpy(batch[name]) for name in inputs),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(tuple(sizes for _ in inputs),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # the dynamo exporter returns it
            program.save(path)
    except Exception as error:  # the exporter raises many kinds for what it cannot trace
        reason = " ".join(str(error).split())[:300]
        raise TrialError(
            f"{name}: PyTorch's exporter fails on {model.config.model_type}: "
            f"{type(error).__name__}: {reason}"
        ) from None
    finally:
        for logger, level in zip(chatter, levels, strict=True):
            logger.setLevel(level)
    return inputs, outputs


def _compare(predictor: Predictor, path: Path, inputs: tuple[str, ...]) -> tuple[float, int]:
    """Largest difference of a raw output on real texts, and how many rows they were."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    examples = _examples(predictor, ROWS_COMPARED)
    expected = predictor.outputs(examples)
    largest = 0.0
    for indices, batch in _batches(predictor, examples, inputs):
        found = session.run(None, batch)
        outputs: Floats = np.stack(found, axis=-1) if len(found) > 1 else found[0]
        places = indices
        if predictor.task.per_token:
            outputs = outputs[batch["attention_mask"].astype(bool)]
            places = batches.token_positions(examples, indices)
        differences = np.abs(outputs - expected[places])
        largest = float(np.maximum(largest, differences.max()))  # NaN stays NaN, and fails
    return largest, len(np.unique(examples.rows))


def _examples(predictor: Predictor, num_rows: int) -> Examples:
    rows = sample_rows(predictor.task, num_rows, predictor.optional)
    return predictor.encode(predictor.checked(rows))


def _batches(
    predictor: Predictor, examples: Examples, inputs: tuple[str, ...]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Indices and the graph's inputs, padded to the longest of each batch."""
    order = np.argsort(examples.lengths, kind="stable")
    for start in range(0, len(order), ROWS_PER_PASS):
        indices = order[start : start + ROWS_PER_PASS]
        batch = batches.collate(
            examples,
            indices,
            pad_token=predictor.encoder.tokenizer.pad_token_id,
            device=torch.device("cpu"),
            with_labels=False,
        ).inputs
        segments = batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
        found = {**batch, "token_type_ids": segments}
        yield indices, {name: found[name].numpy() for name in inputs}
