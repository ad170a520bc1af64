"""Names that may mean a folder here or a repository on the hub."""

import os

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


def is_missing_folder(name: str) -> bool:
    """Whether a name can only mean a folder, and there is none: the hub need not be asked."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return not os.path.isdir(name)  # noqa: PTH112  # unlike Path, it takes any name
    return False
