"""Tiny tokenizers, models and data sets that tests build in milliseconds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

from sft_ray.config import Data, Train
from sft_ray.training.checkpoint import save_model
from sft_ray.training.data import load_tokenizer, open_dataset, prepare
from sft_ray.training.examples import Dataset
from sft_ray.training.fitting import fit
from sft_ray.training.last_state import LastState
from sft_ray.training.model import Pretrained, load_pretrained
from sft_ray.training.model_facts import quiet_transformers
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import TASKS, Task
from sft_ray.training.trunk_cache import TrunkCache
from sft_ray.training.world import World

TASK = TASKS["text-classification"]
CPU = torch.device("cpu")
KEYWORDS = {
    "animal": ("cat", "dog", "horse", "mouse"),
    "plant": ("oak", "rose", "fern", "moss"),
    "tool": ("hammer", "saw", "drill", "file"),
}
FILLERS = ("the", "a", "of", "in", "on", "and", "with", "near", "very", "old", "new", "small")
FILLERS += ("big", "red", "green", "we", "went", "there", "was", "one", "two", "under", "over")
FILLERS += ("behind", "house", "road", "field")
NEVER_IN_TOY_ROWS = ("zebra", "quartz", "violin", "harbour")
# Padding is not row 0, so that code which pads with 0 is found out.
SPECIALS = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
PIECES = ("##s", "##ing", "##ed", ".", ",", "?")
WORDS = tuple(word for group in KEYWORDS.values() for word in group)
VOCABULARY = (*SPECIALS.values(), *PIECES, *WORDS, *FILLERS, *NEVER_IN_TOY_ROWS)
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
PAD = TOKEN_ID["[PAD]"]
CHINESE = tuple("我你他在去看了北京上海广州的很大小新旧好坏电影书人猫狗树花锤锯是不")
# Also marks for entities, and characters of a script without blanks.
WIDE_VOCABULARY = (*VOCABULARY, "@", "#", *CHINESE)


def tiny_tokenizer(
    folder: Path, max_length: int = 64, vocabulary: tuple[str, ...] = VOCABULARY
) -> Any:
    """Save a fast BERT-style WordPiece tokenizer and return it.

    Every vocabulary begins with the special tokens.
    """
    cls, sep = TOKEN_ID["[CLS]"], TOKEN_ID["[SEP]"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length, **SPECIALS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(
    model_type: str = "bert",
    num_layers: int = 2,
    *,
    hidden: int = 32,
    dropout: float = 0.1,
    **changes: Any,
) -> Any:
    """A configuration of any supported family under that family's own names."""
    special = {
        "vocab_size": len(VOCABULARY),
        "pad_token_id": PAD,
        "bos_token_id": TOKEN_ID["[CLS]"],
        "eos_token_id": TOKEN_ID["[SEP]"],
        "max_position_embeddings": 80,
        "initializer_range": 0.1,  # at this width 0.02 takes hundreds of steps to break symmetry
    }
    usual = {
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    deberta = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "pooler_hidden_size": hidden,
        "pooler_dropout": dropout,
    }
    by_family: dict[str, dict[str, Any]] = {
        "distilbert": {
            "dim": hidden,
            "n_layers": num_layers,
            "n_heads": 2,
            "hidden_dim": 2 * hidden,
            "dropout": dropout,
            "attention_dropout": dropout,
            "seq_classif_dropout": dropout,
        },
        "electra": {**usual, "embedding_size": hidden // 2, "summary_last_dropout": dropout},
        "deberta": {**usual, **deberta},
        "deberta-v2": {
            **usual,
            **deberta,
            "position_biased_input": False,
            "share_att_key": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        },
        "modernbert": {
            "hidden_size": hidden,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "intermediate_size": 2 * hidden,
            "cls_token_id": TOKEN_ID["[CLS]"],
            "sep_token_id": TOKEN_ID["[SEP]"],
            "embedding_dropout": dropout,
            "mlp_dropout": dropout,
            "attention_dropout": dropout,
            "classifier_dropout": dropout,
            "local_attention": 8,
        },
    }
    own = by_family.get(model_type, {**usual, "type_vocab_size": 2})
    return AutoConfig.for_model(model_type, **{**special, **own, **changes})


def tiny_model_folder(
    folder: Path,
    model_type: str = "bert",
    num_layers: int = 2,
    *,
    hidden: int = 32,
    dropout: float = 0.1,
    seed: int = 0,
    vocabulary: tuple[str, ...] = VOCABULARY,
    noise: float = 0.0,
    **changes: Any,
) -> Path:
    """Save a randomly initialised encoder (safetensors, no head) with its tokenizer.

    `changes` go into the family's configuration; `noise` moves biases and normalisation away from
    where initialisation puts them.
    """
    quiet_transformers()
    changes = {"vocab_size": len(vocabulary), **changes}
    config = tiny_config(model_type, num_layers, hidden=hidden, dropout=dropout, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        model.save_pretrained(folder)
    tiny_tokenizer(folder, vocabulary=vocabulary)
    return folder


def toy_rows(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) of 3 to 25 words; the label is the group of the one keyword in the text."""
    rng = np.random.default_rng(seed)
    labels = list(KEYWORDS)
    rows = []
    for i in range(n):
        label = labels[i % len(labels)]
        words = list(rng.choice(FILLERS, size=rng.integers(2, 25)))
        words.insert(rng.integers(0, len(words) + 1), str(rng.choice(KEYWORDS[label])))
        rows.append((" ".join(words), label))
    return [rows[i] for i in rng.permutation(n)]


def sentence(rng: np.random.Generator, shortest: int = 2, longest: int = 9) -> list[str]:
    return [str(word) for word in rng.choice(FILLERS, size=rng.integers(shortest, longest))]


def with_keyword(words: list[str], group: str, rng: np.random.Generator) -> int:
    """Put a keyword of the group into `words`; its place."""
    place = int(rng.integers(0, len(words) + 1))
    words.insert(place, str(rng.choice(KEYWORDS[group])))
    return place


def class_row(rng: np.random.Generator, i: int) -> dict[str, Any]:
    group, words = list(KEYWORDS)[i % 3], sentence(rng)
    with_keyword(words, group, rng)
    return {"text": " ".join(words), "label": group}


def labels_row(rng: np.random.Generator, i: int) -> dict[str, Any]:
    groups, words = [g for g in KEYWORDS if rng.random() < 0.5], sentence(rng)
    for group in groups:
        with_keyword(words, group, rng)
    return {"text": " ".join(words), "labels": groups}


def value_row(rng: np.random.Generator, i: int) -> dict[str, Any]:
    row = class_row(rng, i)
    return {
        "text": row["text"],
        "label": {"animal": -1.0, "plant": 0.25, "tool": 1.0}[row["label"]],
    }


def tags_row(rng: np.random.Generator, i: int) -> dict[str, Any]:
    """Keywords are entities; "new" before one belongs to it."""
    words, tags = [w for w in sentence(rng, 3) if w != "new"], []
    with_keyword(words, list(KEYWORDS)[i % 3], rng)
    with_keyword(words, list(KEYWORDS)[i % 2], rng)
    group_of = {word: group for group, members in KEYWORDS.items() for word in members}
    found: list[str] = []
    for word in words:
        if word in group_of and rng.random() < 0.3:
            found += ["new", word]
            tags += [f"B-{group_of[word]}", f"I-{group_of[word]}"]
        else:
            found.append(word)
            tags.append(f"B-{group_of[word]}" if word in group_of else "O")
    return {"tokens": found, "tags": tags}


def answer_row(rng: np.random.Generator, i: int) -> dict[str, Any]:
    words = sentence(rng, 4, 12)
    place = with_keyword(words, list(KEYWORDS)[i % 3], rng)
    start = sum(len(word) + 1 for word in words[:place])
    answers = {"text": [words[place]], "answer_start": [start]}
    return {"question": "one in the ?", "context": " ".join(words), "answers": answers}


def relation_row(rng: np.random.Generator, i: int) -> dict[str, Any]:
    """The label is the subject's group, or "none" if the object is no keyword."""
    groups = list(KEYWORDS)
    words = [str(rng.choice(KEYWORDS[groups[i % 3]])), *sentence(rng, 1, 4)]
    words.append("road" if i % 4 == 0 else str(rng.choice(KEYWORDS[groups[i % 3]])))
    label = "none" if i % 4 == 0 else groups[i % 3]
    text = " ".join(words)
    return {
        "text": text,
        "subject_start": 0,
        "subject_end": len(words[0]),
        "object_start": len(text) - len(words[-1]),
        "object_end": len(text),
        "label": label,
    }


ROW_OF_TASK: dict[str, Callable[[np.random.Generator, int], dict[str, Any]]] = {
    "text-classification": class_row,
    "multi-label": labels_row,
    "regression": value_row,
    "token-classification": tags_row,
    "question-answering": answer_row,
    "relation-extraction": relation_row,
}


def task_rows(task: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a task that a tiny model can learn."""
    rng = np.random.default_rng(seed)
    return [ROW_OF_TASK[task](rng, i) for i in range(n)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def dataset_of(
    folder: Path,
    task: str,
    model: Path,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]] | None = None,
    **data: Any,
) -> Dataset:
    """Rows of a task, encoded and opened; validation rows are those of training if None."""
    folder.mkdir(exist_ok=True)
    files = {
        "train": str(write_jsonl(folder / "train.jsonl", train)),
        "validation": str(write_jsonl(folder / "validation.jsonl", validation or train)),
    }
    section = Data(**{**files, "max_length": 32, **data})
    return open_dataset(prepare(section, TASKS[task], str(model), None, seed=17))


def task_dataset(
    folder: Path, task: str, model: Path, *, train: int = 150, validation: int = 60, **data: Any
) -> Dataset:
    """Learnable rows of a task, written, encoded and opened."""
    rows = task_rows(task, train, seed=1), task_rows(task, validation, seed=2)
    return dataset_of(folder, task, model, *rows, **data)


def write_csv(
    path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("text", "label")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def toy_dataset(folder: Path, model: Path, *, train: int = 300, validation: int = 90) -> Dataset:
    """The toy task, written, encoded and opened."""
    data = Data(
        train=str(write_csv(folder / "train.csv", toy_rows(train, seed=1))),
        validation=str(write_csv(folder / "validation.csv", toy_rows(validation, seed=2))),
        max_length=32,
    )
    return open_dataset(prepare(data, TASK, str(model), None, seed=17))


def load_tiny(
    model: Path,
    dataset: Dataset,
    *,
    task: Task = TASK,
    seed: int = 17,
    double: bool = False,
    rows: str = "used",
) -> Pretrained:
    """The model with a head for the data set; `rows` of the vocabulary: "used" or "all"."""
    used = dataset.used_tokens if rows == "used" else None
    loaded = load_pretrained(
        str(model), task, dataset.label_set, seed=seed, device=CPU, used_tokens=None
    )
    whole = loaded.model.double() if double else loaded.model
    return Pretrained(whole, loaded.from_scratch, used, loaded.seed)


class EveryStep(LastState):
    """Keeps a state before every step, in memory."""

    def __init__(self) -> None:
        self.states: list[ResumeState] = []

    def is_due(self) -> bool:
        return True

    def write(self, state: ResumeState) -> None:
        self.states.append(state)


def run_fit(
    pretrained: Pretrained,
    dataset: Dataset,
    *,
    task: Task = TASK,
    seed: int = 17,
    objective: str | None = None,
    rungs: tuple[int, ...] = (10, 33),
    world: World | None = None,
    stop_after: int | None = None,
    resume: ResumeState | None = None,
    halvings: int = 0,
    most_examples: int | None = None,
    end_diverged: bool = False,
    also: Callable[[Progress], Any] | None = None,
    beat: Callable[[str], bool] = lambda activity: False,
    last: LastState | None = None,
    paused: list[ResumeState | None] | None = None,
    trunk_cache: TrunkCache | None = None,
    **train: Any,
) -> list[Progress]:
    """Every report of one `fit` in fp32 (or the model's own float64).

    `also` sees each report when it comes; what `fit` returned is appended to `paused`.
    """
    reports: list[Progress] = []

    def report(progress: Progress) -> bool:
        reports.append(progress)
        if also is not None:
            also(progress)
        return len(reports) != stop_after

    state = fit(
        # Not validated, so that tests can ask for what no experiment may.
        Train().model_copy(update={"precision": "fp32", **train}),
        Setup(
            task,
            dataset,
            pretrained,
            SimpleNamespace(pad_token_id=PAD),
            world or World(),
            trunk_cache=trunk_cache,
        ),
        objective=objective or task.default_objective,
        rungs=list(rungs),
        seed=seed,
        report=report,
        resume=resume,
        halvings=halvings,
        most_examples=most_examples,
        end_diverged=end_diverged,
        beat=beat,
        last=last,
    )
    if paused is not None:
        paused.append(state)
    return reports


def save_tiny(
    folder: Path,
    model: Path,
    pretrained: Pretrained,
    dataset: Dataset,
    trained: dict[str, torch.Tensor],
    task: Task = TASK,
) -> None:
    """Write the trained model as a folder, with the tokenizer of `model`."""
    setup = Setup(task, dataset, pretrained, load_tokenizer(str(model)), World())
    save_model(folder, setup, trained, Data(path="none", max_length=32), "fp32")
