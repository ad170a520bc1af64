"""Sums over the workers of one machine through memory that they share.

Gloo sends everything through sockets, also between two processes of one machine: what a step of a
small model says takes longer there than its last layers.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

MOST_BYTES = 64 << 20  # of one worker's tensors at a time


class SharedSum:
    """What one worker holds of the memory, and whom it tells how far it is.

    Args:
        memory: file of `size` times `MOST_BYTES`; only what is used takes room.
        peers: rank 0 has a connection to every other worker, each of them one to rank 0.
    """

    def __init__(self, rank: int, size: int, memory: int, peers: Sequence[socket.socket]) -> None:
        self._rank, self._peers = rank, peers
        for peer in peers:
            peer.settimeout(dist.default_pg_timeout.total_seconds())
        mapped = mmap.mmap(memory, size * MOST_BYTES)
        self._slots = torch.frombuffer(mapped, dtype=torch.uint8).view(size, MOST_BYTES)

    @torch.no_grad()
    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum over all workers, in place, and to the last bit the same on each of them.

        Args:
            tensors: contiguous, of one dtype, and of the same shapes on every worker.

        Raises:
            DistNetworkError: a worker is gone.
        """
        # Everybody adds from rank 0 on.  The first two may begin with their own: a + b = b + a.
        others = list(range(len(self._slots)))
        others.remove(min(self._rank, 1))
        for pieces in _portions(tensors):
            sizes = [piece.numel() for piece in pieces]
            held = self._slots.view(pieces[0].dtype)[:, : sum(sizes)]
            of = [slot.split(sizes) for slot in held]
            torch._foreach_copy_(of[self._rank], pieces)
            self._meet()  # everybody has written
            if self._rank > 1:
                torch._foreach_copy_(pieces, of[1])
            for other in others:
                torch._foreach_add_(pieces, of[other])
            self._meet()  # everybody has read

    def _meet(self) -> None:
        """Wait until all workers are here."""
        try:
            if self._rank > 0:
                self._peers[0].sendall(b"!")
            arrived = [peer.recv(1) for peer in self._peers]
            if self._rank == 0:
                for peer in self._peers:
                    peer.sendall(b"!")
        except OSError as error:
            raise dist.DistNetworkError(f"a worker of this machine is gone: {error}") from None
        if b"" in arrived:
            raise dist.DistNetworkError("a worker of this machine is gone")


def _portions(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Flat pieces of all tensors, as many at a time as fit into `MOST_BYTES`."""
    most = MOST_BYTES // tensors[0].element_size()
    portion: list[torch.Tensor] = []
    room = most
    for tensor in tensors:
        for piece in tensor.view(-1).split(most):
            if piece.numel() > room:
                yield portion
                portion, room = [], most
            portion.append(piece)
            room -= piece.numel()
    yield portion


def open_shared_sum(rank: int, size: int) -> SharedSum | None:
    """Have all workers of the default process group share memory; None if they cannot.

    They cannot where they are on several machines, or where the system (Linux can) has no memory
    that is handed on as a file.  What is made here has no name that outlives the call, so nothing
    is left of a worker that is killed.
    """
    with tempfile.TemporaryDirectory(prefix="sft_ray-") as folder:
        listener = _listen(Path(folder) / "rank-0", size) if rank == 0 else None
        address: list[str | None] = [listener.getsockname() if listener else None]
        dist.broadcast_object_list(address)
        mine = listener or _connect(address[0])
        ready = torch.tensor(0 if mine is None else 1)
        dist.all_reduce(ready, dist.ReduceOp.MIN)
        if mine is None:
            return None
        if not ready:
            mine.close()
            return None
        if listener is None:
            _, [memory], _, _ = socket.recv_fds(mine, 1, 1)
            peers = [mine]
        else:
            memory = os.memfd_create("sft_ray")
            os.ftruncate(memory, size * MOST_BYTES)
            peers = [listener.accept()[0] for _ in range(size - 1)]  # they have connected
            for peer in peers:
                socket.send_fds(peer, [b"!"], [memory])
            listener.close()
    try:
        return SharedSum(rank, size, memory, peers)
    finally:
        os.close(memory)  # mapped by now


def _listen(path: Path, size: int) -> socket.socket | None:
    if not hasattr(os, "memfd_create"):
        return None
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
    except OSError:  # too long a path
        listener.close()
        return None
    listener.listen(size)
    return listener


def _connect(address: str | None) -> socket.socket | None:
    """To rank 0, if it is on this machine."""
    if address is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection
