"""`sft-ray doctor`: whether every machine of a cluster is fit for a search, and what to mend."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_ray.cache import cache_root
from sft_ray.environment import describe_environment
from sft_ray.errors import ResourceError
from sft_ray.location import refuse_lost_slashes
from sft_ray.search.cluster import capacity, connected
from sft_ray.search.everywhere import ask_every_node, nodes, storage_problems

LEAST_DISK_GB = 10.0  # for models, encoded data and what runs leave
LEAST_SHM_GB = 0.5  # batches and what ranks hand each other
MOST_SKEW_SECONDS = 10.0  # leases take clocks for alike within a minute
KNOCK_SECONDS = 3.0


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        ok: None where there was nothing to check.
        mend: what to do about it, if it is not ok.
    """

    name: str
    ok: bool | None
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Machine:
    """What one machine said of itself; plain values, because they travel."""

    versions: dict[str, str]
    gpus: list[str]
    driver: str | None
    disk_gb: float
    shm_gb: float
    has_token_mode: bool
    reaches_dashboard: bool


def run_doctor(storage: str | None, *, address: str | None = None) -> list[Check]:
    """Look at every machine of a cluster.

    Args:
        storage: a storage location of experiments, to be tried from each; None skips it.
        address: of the cluster, as in `run_search`.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    with connected(address):
        import ray

        names = nodes()
        table = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        answers = ask_every_node(names, look_around, _dashboard_elsewhere())
        machines = {n: m for n, m in answers.items() if isinstance(m, Machine)}
        silent = {names[n]: str(e) for n, e in answers.items() if isinstance(e, Exception)}
        return [
            _all(
                "machines",
                silent,
                f"{len(names)} answer",
                "see that sft_ray is installed there, in the Python that Ray runs in",
            ),
            _versions(names, machines),
            _gpus(names, machines, {n: table[n].get("GPU", 0) for n in machines}),
            _storage(storage, names),
            *_room(names, machines),
            _token(names, machines),
            _dashboard(names, machines),
            _clocks(names),
            _resources(),
        ]


def draw(checks: list[Check]) -> None:
    """Print the checks as a table; what is wrong is red and has its mend below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    words = {True: ("ok", ""), False: ("BAD", "red"), None: ("-", "dim")}
    for check in checks:
        word, style = words[check.ok]
        found = check.found if check.ok is not False else f"{check.found}\nmend: {check.mend}"
        table.add_row(word, check.name, found, style=style)
    Console(highlight=False, markup=False).print(table)


def look_around(dashboard: tuple[str, int] | None) -> Machine:
    """On one machine.

    Args:
        dashboard: an address at which the dashboard should not answer.
    """
    facts = describe_environment({})
    gpus, driver = _nvidia()
    cache = cache_root()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    shm = Path("/dev/shm")  # noqa: S108
    return Machine(
        versions={"python": facts["python"], "sft_ray": facts["sft_ray"], **facts["packages"]},
        gpus=gpus,
        driver=driver,
        disk_gb=shutil.disk_usage(there).free / 1e9,
        shm_gb=shutil.disk_usage(shm).free / 1e9 if shm.exists() else LEAST_SHM_GB,
        has_token_mode=_token_mode(),
        reaches_dashboard=dashboard is not None and _answers(*dashboard),
    )


def _nvidia() -> tuple[list[str], str | None]:
    """Names of the GPUs and the version of their driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603
    lines = [line.split(", ") for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not lines:
        return [], None
    return [name for name, _ in lines], lines[0][1]


def _token_mode() -> bool:
    from ray import _raylet

    mode = _raylet.get_authentication_mode()  # type: ignore[attr-defined]
    return bool(mode == _raylet.AuthenticationMode.TOKEN)  # type: ignore[attr-defined]


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=KNOCK_SECONDS).close()
    except OSError:
        return False
    return True


def _dashboard_elsewhere() -> tuple[str, int] | None:
    """Where the dashboard would answer if it did not keep to the loopback interface."""
    import ray

    url = ray._private.worker._global_node.webui_url or ""
    port = url.rpartition(":")[2]
    head = next(iter(nodes().values()))
    if not port.isdigit() or head.startswith("127."):
        return None
    return head, int(port)


def _all(name: str, wrong: Mapping[str, str], right: str, mend: str) -> Check:
    """Good where nobody has anything to say, else who and what."""
    if not wrong:
        return Check(name, True, right)
    said = "; ".join(f"{where}: {what}" for where, what in wrong.items())
    return Check(name, False, said, mend)


def _versions(names: Mapping[str, str], machines: Mapping[str, Machine]) -> Check:
    """Against those of the driver, on this machine."""
    here = describe_environment({})
    ours = {"python": here["python"], "sft_ray": here["sft_ray"], **here["packages"]}
    wrong = {}
    for node, machine in machines.items():
        others = [
            f"{name} {version}, here {ours[name]}"
            for name, version in machine.versions.items()
            if version != ours[name]
        ]
        if others:
            wrong[names[node]] = ", ".join(others)
    mend = "install there with the same constraints.txt, and the same Python"
    return _all("versions", wrong, f"the same: ray {ours['ray']}, torch {ours['torch']}", mend)


def _gpus(
    names: Mapping[str, str], machines: Mapping[str, Machine], wanted: Mapping[str, float]
) -> Check:
    if not any(wanted.values()):
        return Check("GPUs", None, "none in this cluster")
    wrong = {
        names[node]: f"Ray counts {wanted[node]:g}, nvidia-smi finds {len(machine.gpus)}"
        for node, machine in machines.items()
        if len(machine.gpus) < wanted[node]
    }
    kinds = sorted({gpu for machine in machines.values() for gpu in machine.gpus})
    drivers = sorted({m.driver for m in machines.values() if m.driver})
    right = f"{sum(wanted.values()):g}: {', '.join(kinds)}; driver {', '.join(drivers)}"
    return _all("GPUs", wrong, right, "install or reload the NVIDIA driver there, or replace it")


def _storage(storage: str | None, names: Mapping[str, str]) -> Check:
    if storage is None:
        mend = "set SFT_RAY_STORAGE, or pass --storage"
        return Check("storage", None if len(names) == 1 else False, "none named", mend)
    local = "://" not in storage
    place = str(Path(storage).absolute()) if local else storage
    try:
        refuse_lost_slashes(storage)
        wrong = {names[n]: said for n, said in storage_problems(place, names).items()}
    except (ResourceError, ValueError) as error:
        wrong = {"here": str(error)}
    mend = "a folder that all mount, or a bucket with its credentials or role on every machine"
    return _all("storage", wrong, f"{storage}: written, read, deleted from each", mend)


def _room(names: Mapping[str, str], machines: Mapping[str, Machine]) -> list[Check]:
    def room(name: str, of: Callable[[Machine], float], least: float, mend: str) -> Check:
        wrong = {
            names[n]: f"{of(m):.1f} GB, wanted {least:g}"
            for n, m in machines.items()
            if of(m) < least
        }
        smallest = min((of(m) for m in machines.values()), default=0.0)
        return _all(name, wrong, f"at least {smallest:.0f} GB", mend)

    return [
        room(
            "free disk",
            lambda m: m.disk_gb,
            LEAST_DISK_GB,
            "make room, or set SFT_RAY_CACHE to a larger disk",
        ),
        room(
            "free /dev/shm",
            lambda m: m.shm_gb,
            LEAST_SHM_GB,
            "delete what was left there; in a container, give it more (--shm-size)",
        ),
    ]


def _token(names: Mapping[str, str], machines: Mapping[str, Machine]) -> Check:
    wrong = {names[n]: "off" for n, m in machines.items() if not m.has_token_mode}
    mend = "RAY_AUTH_MODE=token and ~/.ray/auth_token (ray get-auth-token --generate) everywhere"
    return _all("token authentication", wrong, "on", mend)


def _dashboard(names: Mapping[str, str], machines: Mapping[str, Machine]) -> Check:
    wrong = {names[n]: "can open it" for n, m in machines.items() if m.reaches_dashboard}
    if wrong and "KUBERNETES_SERVICE_HOST" in os.environ:
        return Check("dashboard", None, "open to the pods, as KubeRay needs it; keep the token on")
    mend = "ray start --head --dashboard-host=127.0.0.1, and a port forward to look at it"
    return _all("dashboard", wrong, "on the head's loopback interface only", mend)


def _now() -> float:
    return time.time()


def _clocks(names: Mapping[str, str]) -> Check:
    """How far each clock is from this one, beyond what asking took."""
    wrong, most = {}, 0.0
    for node, name in names.items():
        ask_every_node({node: name}, _now)  # the process is there from here on
        before = time.time()
        answer = ask_every_node({node: name}, _now)[node]
        after = time.time()
        if isinstance(answer, Exception):
            wrong[name] = str(answer)
            continue
        skew = max(before - answer, answer - after, 0.0)
        most = max(most, skew)
        if skew > MOST_SKEW_SECONDS:
            wrong[name] = f"{skew:.0f} s"
    return _all("clocks", wrong, f"within {most:.1f} s", "run chrony or systemd-timesyncd there")


def _resources() -> Check:
    has = capacity()
    said = ", ".join(f"{has[kind]:g} {kind}" for kind in ("CPU", "GPU") if has.get(kind))
    mend = "start worker nodes, or give the autoscaler some to start"
    return Check("Ray resources", bool(said), said or "no CPU and no GPU", mend)
