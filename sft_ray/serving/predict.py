"""Answers of a trained model for new inputs, in the order they come."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers

from sft_ray.errors import ConfigError, DataError, first_line
from sft_ray.run_store import winner_of
from sft_ray.training.checkpoint import MODEL_FACTS
from sft_ray.training.columns import check_fields
from sft_ray.training.data import encode_split, load_tokenizer
from sft_ray.training.encoding import Encoder
from sft_ray.training.examples import Examples, LabelSet
from sft_ray.training.families import reads_segments
from sft_ray.training.forward import evaluate
from sft_ray.training.hub import is_missing_among_others
from sft_ray.training.metrics import Floats
from sft_ray.training.model import PLAIN_OUTPUTS, let_pass
from sft_ray.training.model_facts import most_positions, quiet_transformers, resolve_model
from sft_ray.training.tasks import Task, find_task
from sft_ray.training.world import World

UNKNOWN_LENGTH = 512  # most tokens, where no facts of ours say
ROWS_AT_ONCE = 2000  # encoded and sorted by length together
# What a head says of its task, where no facts of ours do.
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
UNREADABLE = (pa.ArrowException, ValueError, OverflowError)  # what Arrow raises for a value
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PROBLEM_TYPES = {"regression": "regression", "multi_label_classification": "multi-label"}


@dataclass(frozen=True)
class Predictor:
    """A trained model with all it takes to feed it.

    Attributes:
        model: with its head, on the device of `world`.
        dtype: of matrix products, the one the model was trained and scored with.
        optional: the task's optional inputs that it was trained with; None if nothing says.
    """

    model: Any
    task: Task
    encoder: Encoder
    label_set: LabelSet
    world: World
    dtype: torch.dtype
    optional: tuple[str, ...] | None = None

    def encode(self, table: pa.Table) -> Examples:
        """Checked rows as the model reads them."""
        examples = encode_split(table, self.task, self.encoder, self.label_set)
        return examples if reads_segments(self.model) else replace(examples, segments=None)

    def outputs(self, examples: Examples) -> Floats:
        """Raw outputs of encoded examples, [n or total, classes]."""
        pad = self.encoder.tokenizer.pad_token_id
        return evaluate(self.model, self.task, examples, pad, self.world, self.dtype)

    def predict(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One answer per row, in order; rows are batched by length, `ROWS_AT_ONCE` together.

        Raises:
            DataError: a row lacks a field of the task, or one holds something else.
        """
        rows, start = iter(rows), 0
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            examples = self.encode(self.checked(chunk, start))
            yield from self.task.answer(self.outputs(examples), examples, self.label_set)
            start += len(chunk)

    def checked(self, rows: list[dict[str, Any]], start: int = 0) -> pa.Table:
        """Rows as a table of the task's fields; `start` rows came before them.

        Raises:
            DataError: a row lacks a field of the task, or one holds something else.
        """
        fields = self.task.fields
        for number, row in enumerate(rows, start=start + 1):
            for entity in ("subject", "object"):
                if isinstance(row.get(entity), list) and len(row[entity]) == 2:
                    row[f"{entity}_start"], row[f"{entity}_end"] = row[entity]
            if missing := [name for name in fields.inputs if name not in row]:
                raise DataError(f"input {number}: {self.task.name} needs {missing[0]!r}")
            self._check_optional(row, number)
        present = [n for n in (*fields.inputs, *fields.optional) if any(n in row for row in rows)]
        try:
            table = pa.Table.from_pylist([{n: row.get(n) for n in present} for row in rows])
        except UNREADABLE as error:
            self._check_each(rows, present, start)
            raise DataError(f"inputs: a field holds values of no one kind: {error}") from None
        if problems := check_fields(table, fields):
            self._check_each(rows, present, start)
            where = f"inputs from {start + 1} on" if start else "input"
            raise DataError(*(f"{where}: {problem}" for problem in problems))
        return table

    def _check_each(self, rows: list[dict[str, Any]], names: list[str], start: int) -> None:
        """Raise DataError for the first row in which a field by itself holds something else."""
        for number, row in enumerate(rows, start=start + 1):
            for name in names:
                value, where = row.get(name), f"input {number}: column {name!r}"
                if value is None:
                    raise DataError(f"{where} is empty; fill it")
                try:
                    alone = pa.chunked_array([pa.array([value])])
                except UNREADABLE as error:
                    raise DataError(f"{where} holds values of no one kind: {error}") from None
                for problem in self.task.fields.kinds[name](alone):
                    raise DataError(f"{where} {problem.replace(' in row 1', '')}")

    def _check_optional(self, row: dict[str, Any], number: int) -> None:
        """Raise DataError unless a row has the optional inputs of training, and no others."""
        if self.optional is None:
            return
        for name in self.task.optional_inputs:
            if name in self.optional and name not in row:
                wanted = ", ".join((*self.task.fields.inputs, *self.optional))
                raise DataError(
                    f"input {number}: the model was trained with {wanted}, got no {name!r}; give it"
                )
            if name in row and name not in self.optional:
                raise DataError(
                    f"input {number}: the model was trained without {name!r}; leave it out"
                )


def load_predictor(
    model: str, device: torch.device | None = None, *, as_trained: bool = True
) -> Predictor:
    """Load a model folder (safetensors only), a hub id, or the winner of a run folder.

    Args:
        as_trained: let it compute without padding, as it did in training, bit by bit; else it is
            the library's model untouched.

    Raises:
        ConfigError: there is no such model, or its head belongs to no task.
    """
    quiet_transformers()
    model = winner_of(model)
    if is_missing_among_others(model):
        raise ConfigError(f"model: {model}: no such folder; name a run, a model folder or a hub id")
    folder = resolve_model(model)
    facts = read_facts(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        task = find_task(facts.get("task") or _task_of(config, model))
        auto_model = getattr(transformers, task.auto_model)
        loaded = auto_model.from_pretrained(
            folder,
            **PLAIN_OUTPUTS,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds for a bad id or folder
        reason = first_line(error).rstrip(".")
        if not os.path.exists(model):  # noqa: PTH110  # unlike Path, it takes any name
            reason = f"no such folder, and as a hub id: {reason}"
        raise ConfigError(
            f"model: {model!r} cannot be loaded: {reason}; give a model folder or a run folder"
        ) from None
    if as_trained:
        let_pass(loaded)
    tokenizer = load_tokenizer(folder)
    most = min(most_positions(config), tokenizer.model_max_length)
    max_length = min(facts.get("max_length", UNKNOWN_LENGTH), most)
    names = tuple(config.id2label[i] for i in range(config.num_labels)) if task.classes else ()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Predictor(
        model=loaded.to(device),
        task=task,
        encoder=Encoder(tokenizer, max_length, facts.get("doc_stride", 64)),
        label_set=LabelSet(names, facts.get("negative_label")),
        world=World(device=device),
        dtype=DTYPES.get(str(facts.get("precision")), torch.float32),
        optional=tuple(facts["inputs"]) if "inputs" in facts else None,
    )


def read_facts(folder: str) -> dict[str, Any]:
    """What `save_model` wrote beside the weights; empty for a model from elsewhere.

    Raises:
        ConfigError: the file is damaged.
    """
    path = Path(folder) / MODEL_FACTS
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged JSON: {error}") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"{path}: must hold an object, got {type(facts).__name__}")
    for name, least in (("max_length", 4), ("doc_stride", 0)):
        value = facts.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{path}: {name} must be a whole number from {least}, got {value!r}")
    inputs = facts.get("inputs", [])
    if not isinstance(inputs, list) or not all(isinstance(name, str) for name in inputs):
        raise ConfigError(f"{path}: inputs must be a list of fields, got {inputs!r}")
    return facts


def read_rows(lines: Iterable[str], task: Task) -> Iterator[dict[str, Any]]:
    """Rows from lines that are all JSON objects, or all plain texts.

    A plain line is the `text` of tasks that read one, or blank-separated `tokens`.

    Raises:
        DataError: a line is empty, is no JSON object among others that are or is one among plain
            texts, or the task reads more than one text.
    """
    plain: bool | None = None
    inputs = list(task.fields.inputs)
    for number, line in enumerate(_decoded(lines), start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            raise DataError(f"line {number}: is empty; every line is one input")
        if plain is None:
            plain = not line.lstrip().startswith("{")
            if plain and inputs not in (["text"], ["tokens"]):
                raise DataError(
                    f"line {number}: {task.name} reads JSON lines with {', '.join(inputs)}, got "
                    f"{line[:60]!r}"
                )
        if plain:
            if line.startswith("{") and _is_row(line, inputs):
                raise DataError(f"line {number}: is JSON behind plain text; write all lines alike")
            yield {inputs[0]: line.split() if inputs[0] == "tokens" else line}
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"line {number}: must be a JSON object, got {line[:60]!r}")
        yield row


def _is_row(line: str, inputs: Sequence[str]) -> bool:
    """Whether it is a JSON object with one of the task's inputs."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(inputs)


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"input: is no UTF-8: {error}; convert it") from None


def _task_of(config: Any, model: str) -> str:
    for architecture in config.architectures or []:
        for ending, task in HEADS.items():
            if architecture.endswith(ending):
                if ending == "ForSequenceClassification":
                    if config.problem_type is None and config.num_labels == 1:
                        return "regression"  # as the library has it: rerankers, for one
                    return PROBLEM_TYPES.get(config.problem_type, task)
                return task
    heads = ", ".join(HEADS)
    raise ConfigError(f"model: {model!r} has no head for a task ({heads}); fine-tune it first")
