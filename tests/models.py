"""Tiny tokenizers, models and data sets that tests build in milliseconds."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

from sft_ray.config import Data, Train
from sft_ray.training.checkpoint import ResumeState
from sft_ray.training.data import open_dataset, prepare
from sft_ray.training.examples import Dataset
from sft_ray.training.fit import Progress, fit
from sft_ray.training.model import Pretrained, load_pretrained, quiet_transformers
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import TASKS, Task
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


def tiny_tokenizer(folder: Path, max_length: int = 64) -> Any:
    """Save a fast BERT-style WordPiece tokenizer over `VOCABULARY` and return it."""
    cls, sep = TOKEN_ID["[CLS]"], TOKEN_ID["[SEP]"]
    backend = Tokenizer(models.WordPiece(dict(TOKEN_ID), unk_token="[UNK]"))
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
    **changes: Any,
) -> Path:
    """Save a randomly initialised encoder (safetensors, no head) with its tokenizer.

    `changes` go into the family's configuration.
    """
    quiet_transformers()
    config = tiny_config(model_type, num_layers, hidden=hidden, dropout=dropout, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer(folder)
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
    model: Path, dataset: Dataset, *, seed: int = 17, double: bool = False, rows: str = "used"
) -> Pretrained:
    """The model with a head for the data set; `rows` of the vocabulary: "used" or "all"."""
    used = dataset.used_tokens if rows == "used" else None
    loaded = load_pretrained(
        str(model), TASK, dataset.label_set, seed=seed, device=CPU, used_tokens=None
    )
    whole = loaded.model.double() if double else loaded.model
    return Pretrained(whole, loaded.from_scratch, used)


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
    **train: Any,
) -> list[Progress]:
    """Every report of one `fit` in fp32 (or the model's own float64)."""
    reports: list[Progress] = []

    def report(progress: Progress) -> bool:
        reports.append(progress)
        return len(reports) != stop_after

    fit(
        # Not validated, so that tests can ask for what no experiment may.
        Train().model_copy(update={"precision": "fp32", **train}),
        Setup(task, dataset, pretrained, SimpleNamespace(pad_token_id=PAD), world or World()),
        objective=objective or task.default_objective,
        rungs=list(rungs),
        seed=seed,
        report=report,
        resume=resume,
    )
    return reports
