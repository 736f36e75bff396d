"""The processes of one run: alone, or as many as `torchrun` started, each with a copy of the model (DDP) or a part."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Host tensors travel by gloo, gradients by what suits the device."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """A tensor on the host of each process, all of one shape, stacked by rank: (world_size, ...)."""
        table = values.new_zeros(self.world_size, *values.shape)
        table[self.rank] = values
        if self.world_size > 1:
            dist.all_reduce(table)
        return table

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(torch.zeros(1))

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module, on its device, whose backward averages its gradients over the processes."""
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    def backward(self, module: nn.Module, *, last: bool) -> AbstractContextManager:
        """Around the forward and backward of a micro-batch: gradients travel with the last of a step only."""
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP's
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if self.world_size == 1 or last else module.no_sync()


def local_rank() -> int | None:
    """Which of this machine's processes this one is, where torchrun started it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say so), or this one alone.

    Its threads end with it: one that still lets go of a tensor while the interpreter ends would abort the process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Torch's DDP imports it, and for good its functions' defaults hold the group that there is at that time.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        gc.collect()  # replicas are cycles, and each holds the group
        dist.destroy_process_group()
