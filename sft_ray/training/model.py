"""A pretrained encoder that is loaded once and reset for every trial.

Knows what freezing k layers means, and trains only the rows of the vocabulary that the data uses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from sft_ray.errors import ConfigError, first_line
from sft_ray.training.compiled import CompiledLayers
from sft_ray.training.cpu_dropout import hasten_dropout
from sft_ray.training.cuda_graphs import RecordedPasses
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import LabelSet
from sft_ray.training.families import (
    CONVOLUTION,
    FAMILIES,
    has_module,
    module_at,
    reads_first_token,
)
from sft_ray.training.model_facts import quiet_transformers
from sft_ray.training.passes import prepare_model
from sft_ray.training.seeds import derived_seed
from sft_ray.training.tasks import Task

# A model's own config.json may say otherwise; neither a pass nor a saved folder can use that.
PLAIN_OUTPUTS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
}


def let_pass(model: Any) -> None:
    """Prepare a model of a known family for `passes.passing`; leave any other as it is."""
    family = FAMILIES.get(model.config.model_type)
    if family is not None:
        base = model.base_model
        layers = list(module_at(base, family.layers))
        prepare_model(
            model,
            [module_at(base, path) for path in family.embeddings if has_module(base, path)],
            layers,
            own_attention=family.own_attention,
            convolution=module_at(base, CONVOLUTION) if has_module(base, CONVOLUTION) else None,
            gives_tuples=family.gives_tuples,
            narrows=family.narrows and reads_first_token(model),
        )


class UsedRowsEmbedding(nn.Module):
    """The rows of an embedding that the data uses; takes the original token ids.

    Rows that never occur get no gradient, so leaving them out changes no other weight; it keeps
    them out of regularisation, optimiser state and all-reduce.
    """

    row_of_token: torch.Tensor

    def __init__(self, full: nn.Embedding, used_tokens: IntArray) -> None:
        super().__init__()
        rows = torch.from_numpy(np.asarray(used_tokens, dtype=np.int64))
        row_of_token = torch.full((full.num_embeddings,), -1)
        row_of_token[rows] = torch.arange(len(rows))
        self.register_buffer("row_of_token", row_of_token, persistent=False)
        self.weight = nn.Parameter(full.weight.detach()[rows].clone())
        pad = full.padding_idx
        self.padding_idx = None if pad is None else int(row_of_token[pad])

    def forward(self, token_ids_BL: torch.Tensor) -> torch.Tensor:
        return F.embedding(self.row_of_token[token_ids_BL], self.weight, self.padding_idx)


class Pretrained:
    """One model object and its pristine weights.

    Attributes:
        model: the model with its head, on its device; only vocabulary rows in use.
        pristine: name -> weights as loaded, the starting point of every trial.
        from_scratch: names of weights the checkpoint lacks (the head), newly initialised.
        seed: that they were drawn from.
        full_embedding: the whole embedding matrix on the CPU, for writing the model back; or None.
        compiled: its layers as they were compiled, for all trials.
        recorded: its passes as they were recorded, for all trials.
    """

    def __init__(
        self,
        model: Any,
        from_scratch: frozenset[str],
        used_tokens: IntArray | None,
        seed: int,
    ) -> None:
        self.model = model
        self.from_scratch = from_scratch
        self.reinitialized: frozenset[str] = frozenset()  # in the current trial
        self.family = FAMILIES[model.config.model_type]
        self.full_embedding: torch.Tensor | None = None
        if used_tokens is not None:
            full = model.get_input_embeddings()
            pad = [] if full.padding_idx is None else [full.padding_idx]
            used = np.union1d(used_tokens, pad).astype(np.int64)
            if used[-1] >= full.num_embeddings:
                raise ConfigError(
                    f"model: its tokenizer gives the token {used[-1]}, its embeddings end at "
                    f"{full.num_embeddings - 1}; save model and tokenizer together"
                )
            self.used_tokens = used
            self.full_embedding = full.weight.detach().cpu().clone()
            model.set_input_embeddings(UsedRowsEmbedding(full, used).to(full.weight.device))
        self.pristine = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._draw_head(seed)
        for name, parameter in model.named_parameters():
            parameter.data = self.pristine[name]  # the file of the checkpoint is let go
        self._frozen: list[nn.Module] = []
        self._copies: dict[str, torch.Tensor] = {}  # of weights that are frozen at present
        _put_dropouts_back(model)
        self._dropouts = list(_dropouts(model))
        if model.device.type == "cpu":
            hasten_dropout(model)
        self.compiled = CompiledLayers()
        self.recorded = RecordedPasses()
        let_pass(model)

    @property
    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = module_at(self.model.base_model, self.family.layers)
        return found

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def can_split(self) -> bool:
        """Whether the layers above any depth need no more than the output of the one below."""
        return not has_module(self.model.base_model, CONVOLUTION)  # mixes both ends of the first

    @cached_property
    def fingerprint(self) -> str:
        """Of all weights below the head as they were loaded, and of what computes with them."""
        digest = hashlib.sha256(f"{self.model.config.model_type} {self.family}".encode())
        config = self.model.config.to_dict()
        for name in ("_name_or_path", "id2label", "label2id"):
            config.pop(name, None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        head = self.head() | self.from_scratch
        for name, weights in sorted(self.pristine.items()):
            if name not in head:
                digest.update(name.encode())
                digest.update(weights.detach().cpu().numpy())
        return digest.hexdigest()

    def layer_parameters(self) -> int:
        """How many numbers all layers hold."""
        return sum(parameter.numel() for parameter in self.layers.parameters())

    def reset(
        self,
        frozen_layers: int | Literal["all"],
        *,
        dropout: float | None = None,
        reinit_layers: int = 0,
        seed: int | None = None,
    ) -> None:
        """Pristine weights again, the first `frozen_layers` layers and their inputs frozen.

        0 trains everything; k >= 1 freezes the embeddings, all that feeds the layers and the
        first k layers; "all" leaves the pooler and the head.

        Args:
            dropout: probability of every dropout in the model; None takes the model's own.
            reinit_layers: layers from the top, and the pooler, that start anew (Zhang et al.,
                "Revisiting Few-sample BERT Fine-tuning", ICLR 2021), drawn from (seed, "reinit").
            seed: of the head and of what starts anew; None keeps the one before.

        Raises:
            ConfigError: more layers are frozen or begun anew than there are.
        """
        depth = self.num_layers if frozen_layers == "all" else frozen_layers
        if depth + reinit_layers > self.num_layers:
            raise ConfigError(
                f"train.frozen_layers and train.reinit_layers: the model has {self.num_layers} "
                f"layers, got {depth} + {reinit_layers}"
            )
        if seed is not None and seed != self.seed:
            self._draw_head(seed)
        for module, attribute, own in self._dropouts:
            setattr(module, attribute, own if dropout is None else dropout)
        self.model.requires_grad_(True)
        self._frozen = self._trunk(depth)
        for module in self._frozen:
            module.requires_grad_(False)
        self._take_pristine()
        self._reinitialize(reinit_layers)
        self.train()

    @torch.no_grad()
    def _take_pristine(self) -> None:
        """Frozen weights are the pristine ones themselves, trained ones a copy.

        Where passes are recorded, which reads weights where they lie, copies are kept meanwhile.
        """
        for name, parameter in self.model.named_parameters():
            parameter.grad, pristine = None, self.pristine[name]
            is_copy = parameter.data_ptr() != pristine.data_ptr()
            if parameter.requires_grad:
                if not is_copy:
                    kept = self._copies.pop(name, None)
                    parameter.data = torch.empty_like(pristine) if kept is None else kept
                parameter.copy_(pristine)
            else:
                if is_copy and not self.recorded.is_empty:
                    self._copies[name] = parameter.data
                parameter.data = pristine

    def _reinitialize(self, num_layers: int) -> None:
        """Draw the top layers and the pooler anew, by the model's own rules."""
        self.reinitialized = frozenset()
        if num_layers == 0:
            return
        base = self.model.base_model
        parts = list(self.layers[-num_layers:])
        # Some families keep the pooler beside the base model.
        poolers = (getattr(owner, "pooler", None) for owner in (base, self.model))
        parts += [pooler for pooler in poolers if pooler is not None]
        fresh = {parameter for part in parts for parameter in part.parameters()}
        self._initialize(fresh, derived_seed(self.seed, "reinit"))
        self.reinitialized = frozenset(
            name for name, parameter in self.model.named_parameters() if parameter in fresh
        )

    def _draw_head(self, seed: int) -> None:
        """Draw what the checkpoint lacks from (seed, "init"), and keep it as pristine."""
        self.seed = seed
        fresh = {n: p for n, p in self.model.named_parameters() if n in self.from_scratch}
        self._initialize(set(fresh.values()), derived_seed(seed, "init"))
        self.pristine |= {name: p.detach().clone() for name, p in fresh.items()}

    def _initialize(self, fresh: set[nn.Parameter], seed: int) -> None:
        """Draw weights by the model's own rules, on the CPU so that every device gets the same."""
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = parameter not in fresh

        def draw(module: nn.Module) -> None:
            if not fresh.isdisjoint(module.parameters()):
                self.model._init_weights(module)

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            # Recorded passes are bound to where the weights lie.
            places = {parameter: parameter.data for parameter in fresh}
            for parameter in fresh:
                parameter.data = parameter.data.cpu()
            self.model.apply(draw)  # inner modules first: outer ones have the last word
            for parameter, place in places.items():
                parameter.data = place.copy_(parameter.data)

    def depths(self) -> dict[str, int]:
        """Parameter name -> 0 for what feeds the layers, i + 1 for layer i, else one more."""
        depth_of = {p: 0 for module in self._trunk(0, inputs=True) for p in module.parameters()}
        for i, layer in enumerate(self.layers):
            depth_of |= dict.fromkeys(layer.parameters(), i + 1)
        top = self.num_layers + 1
        return {name: depth_of.get(p, top) for name, p in self.model.named_parameters()}

    def head(self) -> frozenset[str]:
        """Names of the parameters that the task put on the encoder."""
        return head_of(self.model)

    def train(self) -> None:
        """Training mode; frozen modules stay in evaluation mode (no dropout)."""
        self.model.train()
        for module in self._frozen:
            module.eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def full_state(self, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """State of the whole model with `trained` weights put in and every vocabulary row.

        The next call overwrites the rows in use.
        """
        state = {name: t.detach().cpu() for name, t in self.model.state_dict().items()}
        state |= {name: t.cpu() for name, t in self.pristine.items()}
        state |= {name: t.cpu() for name, t in trained.items()}
        if self.full_embedding is not None:
            embedding = self.model.get_input_embeddings()
            name = next(n for n, p in self.model.named_parameters() if p is embedding.weight)
            used = torch.from_numpy(self.used_tokens)
            self.full_embedding[used] = state[name].to(self.full_embedding.dtype)
            state[name] = self.full_embedding
        return state

    def _trunk(self, depth: int, *, inputs: bool = False) -> list[nn.Module]:
        """The first `depth` layers and, from one layer on or if asked, what feeds them."""
        base = self.model.base_model
        fed_by = [
            module_at(base, path)
            for path in (*self.family.embeddings, *self.family.shared)
            if has_module(base, path)
        ]
        return [*(fed_by if depth or inputs else []), *self.layers[:depth]]


def load_pretrained(
    folder: str,
    task: Task,
    label_set: LabelSet,
    *,
    seed: int,
    device: torch.device,
    used_tokens: IntArray | None = None,
    revision: str | None = None,
) -> Pretrained:
    """Load weights (safetensors only) and put a head for the task's answers on them.

    The head is initialised from (seed, "init"), the same on every worker and for every trial of
    that seed.

    Raises:
        ConfigError: the folder holds no weights that can be loaded safely, or not all of the
            encoder's.
    """
    quiet_transformers()
    auto_model = getattr(transformers, task.auto_model)
    head: dict[str, Any] = {"num_labels": task.outputs_of(label_set)}
    if task.classes:
        head["id2label"] = dict(enumerate(label_set.names))
        head["label2id"] = {name: i for i, name in enumerate(label_set.names)}
    if task.problem_type is not None:
        head["problem_type"] = task.problem_type
    with torch.random.fork_rng(devices=[]):  # drawn again by `Pretrained`
        try:
            model, info = auto_model.from_pretrained(
                folder,
                revision=revision,
                **head,
                **PLAIN_OUTPUTS,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a head of other shape is replaced by ours
                output_loading_info=True,
            )
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            reason = first_line(error)
            raise ConfigError(
                f"model: no weights can be loaded from {folder}: {reason}; "
                "a model folder holds model.safetensors"
            ) from None
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    from_scratch = frozenset(info["missing_keys"]) | frozenset(mismatched)
    if task.classes and _classes_of(folder, revision) != tuple(label_set.names):
        from_scratch |= _answering(model)  # which tells other classes apart
    pretrained = Pretrained(model.to(device), from_scratch, used_tokens, seed)
    encoder = [n for n, depth in pretrained.depths().items() if depth <= pretrained.num_layers]
    if lacking := [name for name in encoder if name in from_scratch]:
        raise ConfigError(
            f"model: {folder} lacks {len(lacking)} of the encoder's {len(encoder)} weights, or has "
            f"them in another shape, for example {lacking[0]}; save the model itself, unwrapped, "
            "with save_pretrained"
        )
    return pretrained


def head_of(model: Any) -> frozenset[str]:
    """Names of the parameters that a task puts on the encoder."""
    base = set(model.base_model.parameters())
    return frozenset(n for n, p in model.named_parameters() if p not in base)


def _answering(model: Any) -> frozenset[str]:
    """Names of the parameters with one row per class; the rest of a head serves any classes."""
    head = head_of(model)
    *_, last = (name for name, _ in model.named_parameters() if name in head)
    return frozenset(n for n in head if n.rpartition(".")[0] == last.rpartition(".")[0])


def _classes_of(folder: str, revision: str | None) -> tuple[str, ...]:
    """The class names of a checkpoint, which the library makes up where it has no head."""
    config = transformers.AutoConfig.from_pretrained(
        folder, revision=revision, trust_remote_code=False
    )
    return tuple(name for _, name in sorted(config.id2label.items()))


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Where a model keeps its dropout probabilities, and what they are."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p", module.p
        else:
            # Fused attention takes a number instead of a module.
            for attribute in ("attention_dropout", "dropout_prob"):
                own = getattr(module, attribute, None)
                if isinstance(own, float | int):
                    yield module, attribute, own


def _put_dropouts_back(model: nn.Module) -> None:
    """ModernBERT has none behind its attention where config.json says 0, its default."""
    for module in model.modules():
        if isinstance(getattr(module, "out_drop", None), nn.Identity):
            module.out_drop = nn.Dropout(0.0)
