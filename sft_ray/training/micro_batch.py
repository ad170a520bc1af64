"""How many examples fit through the model at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sft_ray.training.encoding import IntArray

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_CPUS = Path("/sys/fs/cgroup/cpu.max")
# How a lack of memory reads where it is no error of a kind of its own.
SIGNS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
SHARE_FOR_ACTIVATIONS = 0.5  # of a CPU worker's memory; weights and optimiser need the rest


@dataclass(frozen=True)
class Probe:
    """What was found for one kind of trial, see `Setup.micro_batches`.

    Attributes:
        fits: most examples that go through the model at once.
        bytes_per_example: what the longest example keeps for its backward pass; 0 on a GPU, which
            counts by itself.
        bytes_per_pass: what a pass keeps however many examples it has: weights in another number
            format.
    """

    fits: int
    bytes_per_example: int = 0
    bytes_per_pass: int = 0

    def kept_bytes(self, examples: int) -> int:
        """What a pass of so many of the longest keeps."""
        return self.bytes_per_pass + examples * self.bytes_per_example


class NothingFitsError(Exception):
    """Not even one example fits."""


class StepOutOfMemoryError(RuntimeError):
    """A trial ran out of memory although its steps had been found to fit.

    Attributes:
        micro_batch: examples that went through the model at once.
    """

    def __init__(self, micro_batch: int) -> None:
        super().__init__(f"out of memory at micro-batch {micro_batch}")
        self.micro_batch = micro_batch


@contextmanager
def raised_as_out_of_memory(micro_batch: int) -> Iterator[None]:
    """What runs out of memory inside says so as a `StepOutOfMemoryError`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise StepOutOfMemoryError(micro_batch) from error
        raise


def largest_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """Halve from `most` until an attempt does not run out of memory.

    Raises:
        NothingFitsError: an attempt with one example ran out of it.
    """
    size = most
    while True:
        try:
            attempt(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return size
        if size == 1:
            raise NothingFitsError("out of memory at micro-batch 1")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2


def limited(size: int, most_examples: int | None, halvings: int) -> int:
    """A micro-batch after what is known of others that did not fit."""
    return max(1, min(size, most_examples or size) >> halvings)


def in_parts(work: Callable[[IntArray], None], items: IntArray) -> None:
    """Do what is to be done for all items at once, or for halves of them that fit into memory."""
    try:
        work(items)
        return
    except Exception as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
    # Behind the handler, which holds all that the attempt had in memory.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for half in np.array_split(items, 2):
        in_parts(work, half)


def kept_bytes(forward: Callable[[], torch.Tensor], weights: Iterable[torch.Tensor]) -> int:
    """What a forward pass keeps for its backward pass, beside the weights."""
    shared = {weight.untyped_storage().data_ptr() for weight in weights}
    # What several operations keep counts once; held here, so that no other takes its place.
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # itself, it would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def probe_on_a_cpu(kept: Callable[[int], int]) -> Probe:
    """As many examples as keep their activations in a CPU worker's memory.

    A CPU does not refuse: it swaps, or kills the process.  So it is not tried but computed.

    Args:
        kept: bytes that so many of the longest examples keep; asked for one and, if there is room,
            for two.
    """
    room = worker_memory_bytes() * SHARE_FOR_ACTIVATIONS
    one = kept(1)
    if 2 * one > room:
        return Probe(1, one)
    per_example = kept(2) - one
    per_pass = max(one - per_example, 0)
    return Probe(max(1, int((room - per_pass) // max(per_example, 1))), per_example, per_pass)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def worker_memory_bytes() -> float:
    """This worker's part of the machine's, or its container's, memory: its share of the CPUs."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()) != "max":
        total = min(total, int(limit))
    return total * min(1.0, torch.get_num_threads() / num_cpus())


def num_cpus() -> int:
    """CPUs of this machine or, in a container, what its quota is worth, as Ray counts them.

    So all workers that Ray starts here have all of the memory together.  On which CPUs a process
    may run does not count: Ray does not look at it, and workers would take what others have.
    """
    if CGROUP_CPUS.is_file():
        quota, period = CGROUP_CPUS.read_text().split()
        if quota != "max":
            return max(1, int(quota) // int(period))
    return os.cpu_count() or 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the CPU's allocator had no more memory to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
