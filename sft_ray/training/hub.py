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


def is_missing_among_others(name: str) -> bool:
    """Whether the folder that a name would lie in is there, but not what it names: a mistyped run.

    A repository's owner may have a folder here, too, so what is to be trained asks the hub.
    """
    above = os.path.dirname(name)  # noqa: PTH120  # unlike Path, they take any name
    return os.path.exists(above) and not os.path.exists(name)  # noqa: PTH110
