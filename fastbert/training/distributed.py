"""The processes of a run: one, or those that `torchrun` started, each with a copy of the model (DDP) or a shard."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbert.precision import torch_device


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Host tensors are exchanged by gloo, gradients by the device's backend."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """True in the process that writes files (rank 0)."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Gathers host tensors of one shape from all processes, stacked by rank: (world_size, ...)."""
        table = values.new_zeros(self.world_size, *values.shape)
        table[self.rank] = values
        if self.world_size > 1:
            dist.all_reduce(table)
        return table

    def concatenate(self, values: Tensor) -> list[Tensor]:
        """The rows of all processes, by rank; they may differ in number: (n, ...) each."""
        if self.world_size == 1:
            return [values]
        counts = self.gather(torch.tensor(len(values))).tolist()
        padded = values.new_zeros(max(counts), *values.shape[1:])
        padded[: len(values)] = values
        table = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(table, padded)
        return [rows[:count] for rows, count in zip(table, counts, strict=True)]

    def sum_gradients(self, module: nn.Module) -> None:
        """Sums the gradients of all processes, where no DDP does."""
        if self.world_size == 1:
            return
        for parameter in module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Waits until every process has reached this call."""
        self.gather(torch.zeros(1))

    def replicate(self, module: nn.Module) -> nn.Module:
        """Wraps the module by DDP, so that its backward averages gradients over the processes."""
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    def backward(self, module: nn.Module, *, last: bool) -> AbstractContextManager:
        """A context for forward and backward of a micro-batch; only the last one of a step synchronises gradients."""
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if self.world_size == 1 or last else module.no_sync()


def local_rank() -> int | None:
    """This process's rank on its machine; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def device_of(name: str | None) -> str:
    """The device of that name; with several GPUs, each of torchrun's processes uses its own."""
    number, device = local_rank(), torch_device(name)
    return f"cuda:{number}" if device == "cuda" and number is not None else device


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started (by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), or this one alone.

    On exit the process group and its threads end: a thread that frees a tensor at interpreter exit aborts the process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DDP imports this module, whose default arguments hold the group that exists then forever. Import it before.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        gc.collect()  # DDP replicas are reference cycles that hold the group
        dist.destroy_process_group()
