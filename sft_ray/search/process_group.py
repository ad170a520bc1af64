"""The process group of a slot's workers, which they join themselves."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

TIMEOUT = timedelta(minutes=30)  # of a collective; Ray Train's, too


def join_process_group(rank: int, size: int, device: torch.device) -> None:
    """Make the default process group with the others; each worker of a group of Ray Train calls it.

    The first opens a store at a free port and tells the others through Ray Train, so no port is
    chosen that somebody else may take before it is used.

    Raises:
        torch.distributed.DistError: another worker is gone.
    """
    from ray.train.collective import broadcast_from_rank_zero  # takes half a second to import

    here = ray.util.get_node_ip_address()
    use_interface_of(here)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank == 0:
        store = open_store(here, size)
        broadcast_from_rank_zero((here, store.port))
    else:
        address, port = broadcast_from_rank_zero(None)
        store = TCPStore(address, port, size, timeout=TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def leave_process_group() -> None:
    """End what there is of it, at the end of a worker's work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def open_store(address: str, size: int) -> TCPStore:
    """A store for the first of so many workers; it listens at this address only."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        return TCPStore(
            address,
            port,
            size,
            is_master=True,
            timeout=TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )


def use_interface_of(address: str) -> None:
    """Have gloo bind the interface that has this address, unless its user has chosen one.

    By itself gloo takes the address of the host's name, which is a loopback one wherever
    /etc/hosts says so, as it does on Debian.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None
