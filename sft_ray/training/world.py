"""Who takes part in training: ranks, devices, number formats."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sft_ray.training.shared_sum import SharedSum, open_shared_sum

ARRIVED, SECONDS_BETWEEN_LOOKS = "sft_ray/arrived", 0.05
# Instructions that multiply bf16 faster than fp32, as torch and the makers call them.
BF16_CAPABILITIES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16"}


@dataclass(frozen=True)
class World:
    """One worker's place among the data-parallel workers of a trial.

    With `size` above 1 the default process group of torch.distributed must exist.

    Attributes:
        shared: what workers on the CPUs of one machine sum gradients with.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shared: SharedSum | None = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def minimum(self, value: int) -> int:
        """The smallest of all workers' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def wait_for_all(self, beat: Callable[[], object]) -> None:
        """Return when every worker has called this as often.

        Inside a collective nobody sees that somebody waits and does not hang; here `beat` is called
        now and then.
        """
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        arrived = store.add(ARRIVED, 1)
        while store.add(ARRIVED, 0) < self.size * -(-arrived // self.size):
            beat()
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all workers during backward.

        Every worker starts from the same weights, so none are broadcast.  Workers that share
        memory sum gradients behind backward instead: their cores have nothing idle meanwhile.
        """
        if self.size == 1 or self.shared is not None:
            return model
        parallel = nn.parallel.DistributedDataParallel
        arguments = inspect.signature(parallel.__init__).parameters
        new, old = "forward_sync_buffers", "broadcast_buffers"  # until torch 2.12
        buffers: dict[str, Any] = {new if new in arguments else old: False}
        return parallel(model, **buffers, gradient_as_bucket_view=True, init_sync=False)

    @property
    def averaged_over(self) -> int:
        """What backward divides gradients by, beside summing them."""
        return self.size if self.shared is None else 1

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over all workers, where backward did not."""
        if self.shared is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            assert len(gradients) == len(parameters), "a trained weight has no gradient"
            self.shared.sum(gradients)

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay on each worker; the first backward outside averages what has come up."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.no_sync()
        return nullcontext()

    def seed(self, seed: int) -> None:
        """Begin the device's random numbers anew.

        `torch.manual_seed` writes down a stack for each kind of device that is not there, which on
        a CPU takes a seventh of a step that trains a head only.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def join_world(rank: int, size: int, device: torch.device) -> World:
    """A worker's place in the default process group; every worker has to call it."""
    world = World(rank, size, device)
    if size == 1 or device.type != "cpu":
        return world
    return replace(world, shared=open_shared_sum(rank, size, world.minimum))


def resolve_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format of matrix products, and the reason for it.

    `auto` takes bf16 where the hardware multiplies it natively; elsewhere on CPUs bf16 is slower
    than fp32.  Weights, optimiser state and sums stay in fp32.
    """
    if precision == "bf16":
        return torch.bfloat16, "as configured"
    if precision == "fp16":
        return torch.float16, "as configured, with loss scaling"
    if precision == "fp32":
        return torch.float32, "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies bf16 natively"
        return torch.float32, "the GPU has no native bf16"
    capabilities = torch.cpu.get_capabilities()
    for name, said in BF16_CAPABILITIES.items():
        if capabilities.get(name):
            return torch.bfloat16, f"the CPU has {said}"
    return torch.float32, f"the CPU has neither {' nor '.join(BF16_CAPABILITIES.values())}"
