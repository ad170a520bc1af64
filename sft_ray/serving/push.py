"""`sft-ray push`: a model folder as a repository on the hub, private unless said otherwise."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from sft_ray.errors import ConfigError, TrialError
from sft_ray.run_store import winner_of
from sft_ray.training.checkpoint import MODEL_FACTS

# What a model folder of ours holds; nothing else is sent.
SENT = (
    "README.md",
    "config.json",
    MODEL_FACTS,
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "model.onnx*",
)


@dataclass(frozen=True)
class Push:
    """Where the files went, and which."""

    url: str
    files: list[str]


def push_model(model: str, repo: str, *, public: bool = False, message: str | None = None) -> Push:
    """Upload a run's winner, or a model folder, in one commit; a repository that is there is kept.

    The token is the hub client's own: the environment's HF_TOKEN, or the file that `hf auth login`
    writes.  It is never shown.

    Args:
        repo: owner/name.
        public: whether a new repository is public.

    Raises:
        ConfigError: no such folder, no token, or a name that is none.
        TrialError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    folder = Path(winner_of(model))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"push: {model} is no model folder or run folder with a winner")
    files = sorted({f.name for pattern in SENT for f in folder.glob(pattern) if f.is_file()})
    if not any(name.endswith((".safetensors", ".onnx")) for name in files):
        raise ConfigError(f"push: {folder} holds no weights (*.safetensors)")
    token = get_token()
    if token is None:
        raise ConfigError("push: there is no token; set HF_TOKEN or run `hf auth login`")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=token)
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message=message or _message(folder),
        )
    except HFValidationError as error:
        raise ConfigError(f"push: {repo!r} is no owner/name: {_line(error, token)}") from None
    except Exception as error:  # hub, network and protocol errors have no common base
        raise TrialError(
            f"push to {repo} failed: {type(error).__name__}: {_line(error, token)}"
        ) from None
    return Push(str(made), files)


def _message(folder: Path) -> str:
    try:
        task = json.loads((folder / MODEL_FACTS).read_text(encoding="utf-8"))["task"]
    except (OSError, ValueError, KeyError, TypeError):
        return "Upload a model with sft_ray"
    return f"Upload a {task} model with sft_ray"


def _line(error: Exception, token: str) -> str:
    """An error's first words in one line, without the token should some library ever show it."""
    return " ".join(str(error).replace(token, "…").split())[:300]
