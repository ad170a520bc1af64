"""Where each model family keeps its embeddings and its layers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import nn


@dataclass(frozen=True)
class OwnAttention:
    """Attention that is a family's own code, and wants padding (see `padded_attention`).

    Attributes:
        path: of the module in a layer.
        projections: names in it of the products with weights that every token goes into.
        output: name of the one that every token comes out of; None leaves it to the layer.
    """

    path: str
    projections: tuple[str, ...]
    output: str | None = None


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; names are paths below `model.base_model`.

    Attributes:
        embeddings: the embeddings and any projection between them and the first layer.
        layers: the list of layers.
        shared: modules that feed every layer.
        positions_after_padding: positions are counted from the padding token's id upwards, which
            leaves that much less room for text.
        own_attention: None asks the library's registry of attention functions.
        gives_tuples: its layers answer with more than the hidden states.
        narrows: whether its last layer may be asked for first tokens alone: queries, keys and
            values are products of their own.
    """

    embeddings: tuple[str, ...] = ("embeddings",)
    layers: str = "encoder.layer"
    shared: tuple[str, ...] = ()
    positions_after_padding: bool = False
    own_attention: OwnAttention | None = None
    gives_tuples: bool = False
    narrows: bool = True

    @property
    def pads(self) -> bool:
        """Whether there is padding in its layers; without, they compile and passes record."""
        return self.own_attention is not None


CONVOLUTION = "encoder.conv"  # of large DeBERTa v2, behind the first layer
ROBERTA = Family(positions_after_padding=True)
DEBERTA = Family(
    shared=("encoder.rel_embeddings", "encoder.LayerNorm", CONVOLUTION),
    own_attention=OwnAttention("attention.self", ("in_proj",)),
    gives_tuples=True,
)
DEBERTA_V2 = replace(
    DEBERTA,
    own_attention=OwnAttention("attention.self", ("query_proj", "key_proj", "value_proj")),
)
FAMILIES = {
    "bert": Family(),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "ernie": Family(),
    "electra": Family(embeddings=("embeddings", "embeddings_project")),
    "distilbert": Family(layers="transformer.layer"),
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
    "mpnet": Family(
        shared=("encoder.relative_attention_bias",),
        positions_after_padding=True,
        own_attention=OwnAttention("attention.attn", ("q", "k", "v"), output="o"),
        gives_tuples=True,
    ),
    "modernbert": Family(layers="layers", narrows=False),
}


def module_at(base: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), base)


def has_module(base: nn.Module, path: str) -> bool:
    try:
        return isinstance(module_at(base, path), nn.Module)
    except AttributeError:
        return False


def reads_segments(model: Any) -> bool:
    """Whether a model tells the two texts of a pair apart; others fail on a second segment."""
    num_segments = getattr(model.config, "type_vocab_size", None) or 0
    return num_segments > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def reads_first_token(model: Any) -> bool:
    """Whether a model's head reads the first token of a text and no other."""
    pooling = getattr(model.config, "classifier_pooling", "cls")
    return type(model).__name__.endswith("ForSequenceClassification") and pooling == "cls"
