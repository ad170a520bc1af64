"""Where the process group of a slot's workers meets."""

import psutil
import torch.distributed as dist

from sft_ray.search.process_group import interface_of, open_store


def test_an_address_has_its_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None


def test_the_store_of_the_first_worker_listens_at_its_address_only() -> None:
    store = open_store("127.0.0.1", size=2)
    listening = {
        found.laddr.ip
        for found in psutil.Process().net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == store.port
    }
    assert listening == {"127.0.0.1"}
    other = dist.TCPStore("127.0.0.1", store.port, 2)
    store.set("said", "once")
    assert other.get("said") == b"once"
