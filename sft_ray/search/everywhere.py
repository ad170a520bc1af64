"""One question to every machine of the cluster, through a task that is pinned to it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sft_ray.errors import ResourceError, SftError
from sft_ray.file_store import FileStore

ANSWER_SECONDS = 120.0  # a process has to start there, and storage may be tried again for a minute
NOT_SHARED = "does not see what the driver writes"
Answer = TypeVar("Answer")


def nodes() -> dict[str, str]:
    """Names of the machines that are alive, by Ray's id; the head comes first."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: "node:__internal_head__" not in node["Resources"])
    return {node["NodeID"]: node["NodeManagerAddress"] for node in alive}


def ask_every_node(
    names: Mapping[str, str], question: Callable[..., Answer], *arguments: object
) -> dict[str, Answer | Exception]:
    """Answers by node id; an exception where the question raised, or nobody answered in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {
        node: ray.remote(question)
        .options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(*arguments)
        for node in names
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    found: dict[str, Answer | Exception] = {}
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer, timeout=0)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(answer, force=True)
            found[node] = TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
        except ray.exceptions.RayTaskError as error:
            found[node] = error.cause or error
        except ray.exceptions.RayError as error:
            found[node] = error
    return found


def storage_problems(storage: str, names: Mapping[str, str]) -> dict[str, str]:
    """What keeps machines from using a storage location as all must: in words, by node id.

    Each must find the marker that is written here, and write, read and delete one of its own.

    Args:
        storage: as in an experiment, absolute if it is a folder.

    Raises:
        ResourceError: this machine cannot use it itself.
    """
    is_new = "://" not in storage and not Path(storage).exists()
    here = FileStore(storage, f".sft_ray-marker-{uuid.uuid4().hex}")
    try:
        try:
            here.write_text("driver", "written by the driver\n")
            answers = ask_every_node(names, leave_a_marker, storage, here.name)
        finally:
            here.delete()
        if is_new:
            with suppress(OSError):  # another search has begun there
                Path(storage).rmdir()
    except OSError as error:
        raise ResourceError(f"storage: {storage}: {error}") from None
    found = {}
    for node, answer in answers.items():
        if isinstance(answer, Exception):
            said = " ".join(str(answer).split()) or type(answer).__name__
            found[node] = f"{type(answer).__name__}: {said}"
        elif answer is not None:
            found[node] = answer
    return found


def leave_a_marker(storage: str, name: str) -> str | None:
    """On one machine: what is wrong with the storage there, or None."""
    try:
        store = FileStore(storage, name)
        if not store.exists("driver"):
            return NOT_SHARED
        mine, text = uuid.uuid4().hex, f"marker {name}\n"
        store.write_text(mine, text)
        if store.read_text(mine) != text:
            return "does not read back what it has written"
        store.delete_file(mine)
        if store.exists(mine):
            return "cannot delete"
    except (SftError, OSError) as error:
        return " ".join(str(error).split())
    return None


def check_storage_everywhere(storage: str) -> None:
    """Refuse a storage location that not all machines of the cluster can use.

    Raises:
        ResourceError: some cannot; one line.
    """
    names = nodes()
    if len(names) < 2:
        return  # what is written next will tell
    problems = storage_problems(storage, names)
    if not problems:
        return
    if set(problems.values()) == {NOT_SHARED}:
        where = ", ".join(names[node] for node in problems)
        raise ResourceError(
            f"storage: {storage} is not shared: {where} of {len(names)} machines see nothing that "
            "is written there; name a folder that all of them mount, or s3://…, gs://…"
        )
    node, problem = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more machines)" if len(problems) > 1 else ""
    raise ResourceError(f"storage: {storage} cannot be used on {names[node]}{more}: {problem}")
