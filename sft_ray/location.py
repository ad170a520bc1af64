"""A place that a user names: a path, a URI or a hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from sft_ray.errors import ConfigError

ENV_REFERENCE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
SECRET_OPTION = re.compile(r"(key|secret|token|password)[^=&]*=", re.IGNORECASE)
# `user@` or `key:secret@`; secrets hold slashes, and a hub id an @ behind its name.
USER_INFO = re.compile(r"://([^/@]*|[^/@]+:[^@]*)@")

# Of what storage may be; behind such a word a path would be a folder of that name.
SCHEME = re.compile(r"(s3|gs|gcs|abfss?|hdfs|viewfs|hf|file):(?!//)", re.IGNORECASE)


def expand_environment(value: Any) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in a text; other values pass through."""

    def lookup(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(
                f"the environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return found

    return ENV_REFERENCE.sub(lookup, value) if isinstance(value, str) else value


def expand_home(value: Any) -> Any:
    """Replace a leading `~`, which a shell leaves as it is behind a `storage=`."""
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return str(Path(value).expanduser())
    return value


def refuse_credentials(place: str) -> str:
    """The place, which is written into files and said on screen.

    Raises:
        ValueError: it is a URI that holds a key or a password; the text does not show it.
    """
    address, _, options = place.partition("?")
    if USER_INFO.search(address) or ("://" in address and SECRET_OPTION.search(options)):
        raise ValueError(
            "a URI must not hold credentials, because run folders keep it; set them in the "
            "environment (AWS_ACCESS_KEY_ID, …) or give the machines a role"
        )
    return place


def refuse_lost_slashes(storage: str) -> None:
    """Look at a storage location.

    Raises:
        ValueError: it begins as a URI does, and would be a local folder.
    """
    if scheme := SCHEME.match(storage):
        raise ValueError(
            f"a URI is written {scheme[1]}://…, got {storage!r}; put both slashes, or ./ before a "
            "folder of that name"
        )


def check_ending(path: str, endings: Sequence[str], what: str) -> None:
    """Whether a file to be written has the ending of what it will be.

    Args:
        path: from the option --out.

    Raises:
        ConfigError: it has not.
    """
    if (ending := Path(path).suffix).lower() not in endings:
        raise ConfigError(
            f"{path or '--out'}: {what} is written as {' or '.join(endings)}, got {ending!r}"
        )


def refuse_empty(option: str, given: str | None) -> None:
    """Look at an option that may be left out.

    Raises:
        ConfigError: it was given, without a value.
    """
    if given is not None and not given.strip():
        raise ConfigError(f"{option} is empty; give it a value, or leave it out")


def refuse_control_characters(place: str) -> str:
    """The place.

    Raises:
        ValueError: no path, URI or hub id holds such a character, and some libraries die of it.
    """
    if any(ord(character) < 32 for character in place):
        raise ValueError(f"a place is written without control characters, got {place!r}")
    return place


Location = Annotated[
    str,
    BeforeValidator(expand_home),
    BeforeValidator(expand_environment),
    Field(min_length=1),
    AfterValidator(refuse_control_characters),
    AfterValidator(refuse_credentials),
]
