"""What is different about our groups of Ray Train: where gloo binds, who frees their room."""

from __future__ import annotations

import os
from typing import Any

import psutil
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class GroupTrainer(TorchTrainer):
    """Without the process that frees the group's room, see `free_what_the_dead_hold`."""

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, PlacementGroupCleanerCallback)
        ]


class AddressedBackend(_TorchBackend):
    """Torch's process group over the interface that has the node's address.

    By itself gloo takes the address of the host's name, which is a loopback one wherever
    /etc/hosts says so, as it does on Debian.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_the_nodes_interface)
        super().on_start(worker_group, backend_config)


class AddressedTorch(TorchConfig):
    """A `TorchConfig` for machines whose names lead to themselves."""

    @property
    def backend_cls(self) -> type[AddressedBackend]:
        return AddressedBackend


def use_the_nodes_interface() -> None:
    """On a worker, unless its user has chosen an interface."""
    import ray

    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None
