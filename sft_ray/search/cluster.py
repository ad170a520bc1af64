"""The Ray cluster: connecting to it, and what it has."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sft_ray.errors import ConfigError, ResourceError, first_line

# Ray reads these when it is imported or started.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables: the screen is ours
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default, without its warning
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how fast a dead worker is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per slot; ours pauses and moves trials
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # the conductor has one per slot; else one at a time
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # copies of the slots' messages
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: running trials write their states first
}
KNOCK_SECONDS = 10.0


@contextmanager
def connected(address: str | None, beside: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A connection to Ray; one that was opened here is closed at the end.

    Without an address, Ray looks for `RAY_ADDRESS`, then for a cluster started on this machine,
    then starts one of its own, without a dashboard, whose services keep to the loopback interface
    and ask for a token.  The logs of that one are removed at the end, unless it is an error.

    Args:
        beside: done in a thread while Ray starts, which leaves this process nothing to do.

    Raises:
        ResourceError: the cluster cannot be reached.
        ConfigError: of `beside`.
    """
    ray = _import_ray()
    if ray.is_initialized():
        beside()
        yield
        return
    where, starts = address or os.environ.get("RAY_ADDRESS"), _starts(address)
    way_out = "start one with `ray start --head`, or leave --address out to use this machine alone"
    if where is None and not starts:
        where = _address_file().read_text().strip()
        way_out = f"{_address_file()} still names it; if it is gone, `ray stop` forgets it"
    where = where or "this machine"
    try:
        _knock(where)
        # Ray prints every death of a worker, whatever log_to_driver says; ours name the trial.
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
        if starts:
            _keep_token_private()
        with (
            ThreadPoolExecutor(1) as pool,
            _for_new_processes() if starts else nullcontext(),
        ):
            done = pool.submit(beside)
            ray.init(
                address="local" if starts else address,
                include_dashboard=False if starts else None,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise ResourceError(f"no Ray at {where!r}: {reason}; {way_out}") from None
    logs = ray._private.worker._global_node.get_session_dir_path()
    is_our_error = False
    try:
        done.result()
        yield
    except ConfigError:
        raise
    except Exception:
        is_our_error = True
        raise
    finally:
        ray.shutdown()
        if starts and not is_our_error:
            shutil.rmtree(logs, ignore_errors=True)


@contextmanager
def _for_new_processes() -> Iterator[None]:
    """Inside, the processes that Ray starts get what a search wants of them.

    Sessions of their own: a closed terminal, or a signal to the driver's group, would end them
    before the running trials have written their states.  They still die with the driver.  And the
    address of their own Ray: parts of Ray Train ask for it and give up where several Rays run on a
    machine, and what a lost slot held would never be free again.  And only the loopback interface
    to listen on, by the switch with which Ray does so on a Mac.  Left out is what serves nobody
    here and takes seconds to start: the dashboard's process, which without one counts usage, the
    autoscaler's, and the one that carries to a driver what workers print.
    """
    from ray._private import node, ray_constants, services

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    popen, names = services.ConsolePopen, {"RAY_GCS_SERVER_PORT": str(port)}
    names["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    names[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    before = {name: os.environ.get(name) for name in names}
    is_wide, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    unwanted = ("start_api_server", "start_monitor", "start_log_monitor")
    starts = {name: getattr(node.Node, name) for name in unwanted}
    for name in unwanted:
        setattr(node.Node, name, lambda *_, **__: None)
    services.ConsolePopen = partial(popen, start_new_session=True)
    os.environ.update(names)
    try:
        yield
    finally:
        services.ConsolePopen = popen
        ray_constants.ENABLE_RAY_CLUSTER = is_wide
        for name, start in starts.items():
            setattr(node.Node, name, start)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _keep_token_private() -> None:
    """Let nobody else on this machine read the token of Ray's services.

    Ray writes it with whatever the umask leaves.  A umask of our own would be handed on to the
    workers, whose run folders a team may share.
    """
    from ray._private.authentication import authentication_token_setup as setup

    path = setup._get_default_token_path()
    with suppress(OSError):  # a home that cannot be written; Ray says so itself
        if not path.exists() and os.environ.get("RAY_AUTH_MODE", "token") == "token":
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            opened = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(opened, "w") as file:
                file.write(setup.generate_new_authentication_token())
        path.chmod(0o600)


def set_ray_environment() -> None:
    """Set for this process, and for those it starts, what a user has not set otherwise."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _import_ray() -> Any:
    set_ray_environment()
    import ray

    return ray


def _knock(address: str) -> None:
    """Open and close a connection: Ray itself takes minutes to find that nobody answers."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def capacity_here(address: str | None) -> dict[str, float] | None:
    """At most what a Ray that would be started on this machine has; None where one runs already.

    Lets an impossible layout be refused together with all other problems, before Ray starts.
    """
    import torch

    ray = _import_ray()
    if ray.is_initialized() or not _starts(address):
        return None
    from ray._private.utils import get_num_cpus  # in a container, what its quota is worth

    cpus = get_num_cpus(override_docker_cpu_warning=True)
    return {"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}


def _starts(address: str | None) -> bool:
    """Whether connecting starts a Ray here."""
    chosen = address or os.environ.get("RAY_ADDRESS")
    return chosen == "local" or (chosen is None and not runs_here())


def runs_here() -> bool:
    """Whether a cluster was started on this machine, or this machine joined one."""
    return _address_file().exists()


def _address_file() -> Path:
    """Where Ray notes the cluster of this machine."""
    from ray._common.utils import get_ray_address_file

    return Path(get_ray_address_file(None))


def draining() -> dict[str, int]:
    """Nodes that are about to go, by id: until when, in milliseconds since 1970, 0 if unknown."""
    from ray._private.state import state

    found: dict[str, int] = state.get_draining_nodes()
    return found


def capacity() -> dict[str, float]:
    """What the cluster has or, with an autoscaler, can start."""
    import ray
    from ray._private.state import state

    present: dict[str, float] = ray.cluster_resources()
    startable = state.get_max_resources_from_cluster_config() or {}
    return {k: max(present.get(k, 0), startable.get(k, 0)) for k in {*present, *startable}}


def accelerators() -> list[str]:
    """What GPUs the cluster's machines have, by Ray's names for them."""
    import ray

    kinds = [kind.partition("accelerator_type:")[2] for kind in ray.cluster_resources()]
    return sorted(kind for kind in kinds if kind)


def free_gpus() -> float:
    """GPUs of the cluster that nobody holds at present."""
    import ray

    found: float = ray.available_resources().get("GPU", 0.0)
    return found
