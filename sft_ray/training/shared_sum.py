"""Sums over the workers of one machine through memory that they share.

Gloo sends everything through sockets, also between two processes of one machine: what a step of a
small model says takes longer there than its last layers.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist

MOST_BYTES = 64 << 20  # of one worker's tensors at a time
PATIENCE_SECONDS = 1800.0  # with a worker that says nothing; as torch has with a collective
GONE = "a worker of this machine is gone"


class SharedSum:
    """What one worker holds of the memory, and whom it tells how far it is.

    Args:
        memory: file of `size` times `MOST_BYTES`; only what is used takes room.
        peers: rank 0 has a connection to every other worker, each of them one to rank 0.
    """

    def __init__(self, rank: int, size: int, memory: int, peers: Sequence[socket.socket]) -> None:
        self._rank, self._peers = rank, peers
        for peer in peers:
            peer.settimeout(PATIENCE_SECONDS)
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
        # All add in one order, so that their sums are the same to the last bit: 1 + 0 + 2 + 3 ….
        # Rank 0 begins with its own, too, because 0 + 1 = 1 + 0.
        first, *others = [0, 1] if self._rank == 0 else [1, 0]
        others += range(2, len(self._slots))
        for pieces in _portions(tensors):
            sizes = [piece.numel() for piece in pieces]
            held = self._slots.view(pieces[0].dtype)[:, : sum(sizes)]
            of_rank = [slot.split(sizes) for slot in held]
            torch._foreach_copy_(of_rank[self._rank], pieces)
            self._meet()  # everybody has written
            if first != self._rank:
                torch._foreach_copy_(pieces, of_rank[first])
            for other in others:
                torch._foreach_add_(pieces, of_rank[other])
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
            raise dist.DistNetworkError(f"{GONE}: {error}") from None
        if b"" in arrived:
            raise dist.DistNetworkError(GONE)


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


def open_shared_sum(rank: int, size: int, minimum: Callable[[int], int]) -> SharedSum | None:
    """Have all workers of the default process group share memory; None if they cannot.

    They cannot where they are on several machines, or where the system has no memory that is
    handed on as a file (Linux has).  Nothing that is made here has a name for longer than the call,
    so nothing is left of a worker that is killed.

    Args:
        minimum: the smallest of all workers' values.

    Raises:
        DistNetworkError: a worker is gone.
    """
    try:
        return _offer(size, minimum) if rank == 0 else _take_up(rank, size, minimum)
    except OSError as error:
        raise dist.DistNetworkError(f"{GONE}: {error}") from None


def _offer(size: int, minimum: Callable[[int], int]) -> SharedSum | None:
    """Rank 0 makes the memory, and hands it to the others if all of them reach it."""
    with ExitStack() as stack:
        address = None
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sft_ray-"))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.settimeout(PATIENCE_SECONDS)
            listener.bind(f"{folder}/rank-0")
            listener.listen(size)
            memory = os.memfd_create("sft_ray")
            stack.callback(os.close, memory)  # which ends no mapping of it
            os.ftruncate(memory, size * MOST_BYTES)
            address = listener.getsockname()
        except (OSError, AttributeError):  # too long a path, no room, no such call
            pass
        dist.broadcast_object_list([address])
        if not minimum(int(address is not None)):
            return None
        peers = [listener.accept()[0] for _ in range(size - 1)]  # they have connected
        for peer in peers:
            socket.send_fds(peer, [b"!"], [memory])
        return SharedSum(0, size, memory, peers)


def _take_up(rank: int, size: int, minimum: Callable[[int], int]) -> SharedSum | None:
    """Any other worker connects to rank 0 and is handed the memory."""
    address: list[str | None] = [None]
    dist.broadcast_object_list(address)
    connection = _connect(address[0])
    if not minimum(int(connection is not None)) or connection is None:
        if connection is not None:
            connection.close()
        return None
    _, files, _, _ = socket.recv_fds(connection, 1, 1)
    if not files:
        raise dist.DistNetworkError(GONE)
    try:
        return SharedSum(rank, size, files[0], [connection])
    finally:
        os.close(files[0])


def _connect(address: str | None) -> socket.socket | None:
    """To rank 0, if it is on this machine."""
    if address is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_SECONDS)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection
