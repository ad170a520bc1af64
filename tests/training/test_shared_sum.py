"""Sums through shared memory: any shapes, the same bits everywhere, no waiting for the dead."""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sft_ray.training import shared_sum
from sft_ray.training.shared_sum import SharedSum
from tests.training.parallel_worker import run_group

pytestmark = pytest.mark.timeout(300)

SHAPES = [(3, 5), (1,), (700,), (2, 0), (40, 9), (16,)]


@contextmanager
def opened(size: int) -> Iterator[list[SharedSum]]:
    """One for each of `size` workers, which are threads here."""
    memory = os.memfd_create("test")
    os.ftruncate(memory, size * shared_sum.MOST_BYTES)
    pairs = [socket.socketpair() for _ in range(size - 1)]
    first = SharedSum(0, size, memory, [mine for mine, _ in pairs])
    yield [first, *(SharedSum(r + 1, size, memory, [s]) for r, (_, s) in enumerate(pairs))]
    os.close(memory)
    for connection in itertools.chain(*pairs):
        connection.close()


def at_once(sums: list[SharedSum], tensors: list[list[torch.Tensor]]) -> None:
    """All of them sum what is theirs, three times."""

    def work(rank: int) -> None:
        for _ in range(3):
            sums[rank].sum(tensors[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(sums))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("size", [2, 3, 5])
# Portions of a tensor, or all of them.
@pytest.mark.parametrize("most_bytes", [1024, 4096, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_workers_hold_the_same_sum(monkeypatch, size: int, most_bytes: int, dtype) -> None:
    monkeypatch.setattr(shared_sum, "MOST_BYTES", most_bytes)
    generator = torch.Generator().manual_seed(size)
    mine = [[torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES] for _ in range(size)]
    wanted = [sum(ts[1:], ts[0]).double() for ts in zip(*mine, strict=True)]
    for _ in range(2):  # the second and third sum of what all hold then
        wanted = [tensor * size for tensor in wanted]
    with opened(size) as sums:
        at_once(sums, mine)
    for tensors in mine:
        assert all(torch.equal(a, b) for a, b in zip(tensors, mine[0], strict=True))
        for tensor, right in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor.double(), right, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_worker_that_is_gone_is_told_of(gone: int) -> None:
    with opened(2) as sums:
        sums[gone]._peers[0].close()
        with pytest.raises(dist.DistNetworkError, match="a worker of this machine is gone"):
            sums[1 - gone].sum([torch.ones(4)])


def test_workers_on_several_machines_do_without(tmp_path: Path) -> None:
    run_group("tests.training.apart_worker", 3, [], tmp_path)
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"shares": False, "averaged_over": 3, "sum": 3.0}  # all of them go on


@pytest.mark.parametrize("missing", ["folder", "path", "memory"])
def test_what_the_first_worker_cannot_make_is_no_error(
    monkeypatch, tmp_path: Path, missing: str
) -> None:
    told = []
    monkeypatch.setattr(dist, "broadcast_object_list", told.append)
    temporary = {"folder": tmp_path / "none", "path": tmp_path / ("long" * 40), "memory": tmp_path}
    (tmp_path / ("long" * 40)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary[missing]))
    if missing == "memory":
        monkeypatch.delattr(os, "memfd_create")
    assert shared_sum.open_shared_sum(0, 2, int) is None
    assert told == [[None]]
    assert not any(path.is_file() or path.is_socket() for path in tmp_path.rglob("*"))


def test_a_first_worker_that_ends_before_it_hands_the_memory_on_is_gone(monkeypatch) -> None:
    mine, theirs = socket.socketpair()
    theirs.close()
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told: None)
    monkeypatch.setattr(shared_sum, "_connect", lambda address: mine)
    with pytest.raises(dist.DistNetworkError, match=shared_sum.GONE), mine:
        shared_sum.open_shared_sum(1, 2, int)
