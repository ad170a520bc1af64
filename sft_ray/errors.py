"""Errors a user can act on.

Each carries one or more lines; a line states the rule, what was got and how to mend it.
The command line prints the lines and exits with code 2, without a traceback.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable

# What a disk answers that only its owner can mend.
DISK_ERRORS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room or ask for more",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "name another place or change who may use it",
    errno.EPERM: "name another place or change who may use it",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "mend the links",
    errno.EIO: "look after the disk",
}

# Of a URI: `user@` or `key:secret@`; secrets hold slashes.
USER_INFO = re.compile(r"://([^/\s@]*|[^/\s@]+:[^\s@]*)@")
RUST_ERROR = re.compile(r"\(os error (\d+)\)")


class SftError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        problems: one line per problem, all that were found.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(SftError):
    """An experiment, an override or a run folder that does not fit the rules."""


class DataError(SftError):
    """A data set that cannot be read or does not fit its task."""


class ResourceError(SftError):
    """More workers, GPUs or storage than there are, or a cluster that cannot be reached."""


class TrialError(SftError):
    """A search that could not go on because its trials or slots kept failing."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest known name, or all of them when none is close."""
    names = [str(candidate) for candidate in known]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What an error says; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return without_credentials(lines[0]) if lines else type(error).__name__


def without_credentials(text: str) -> str:
    """A text whose URIs name no user and no password."""
    return USER_INFO.sub("://…@", text)


def disk_problem(error: BaseException) -> str | None:
    """One line for an error of a disk that its owner can mend; None for any other."""
    number, place = getattr(error, "errno", None), getattr(error, "filename", None)
    if told := RUST_ERROR.search(str(error)):  # safetensors raises no OSError
        number = int(told.group(1))
    if number not in DISK_ERRORS:
        return None
    where = f"{place}: " if place else ""
    return f"{where}{os.strerror(number)}; {DISK_ERRORS[number]}; the same command goes on"
