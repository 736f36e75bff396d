"""Scratch memory that a thread reuses between calls."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_KEPT = 64 << 20  # bytes that a thread keeps between calls
_memory = threading.local()


def workspace(*parts: tuple[torch.dtype, tuple[int, ...]]) -> tuple[Tensor, list[Tensor]]:
    """Memory, and uninitialised tensors of these dtypes and shapes in it, each aligned to 64 bytes.

    Fresh memory costs a page fault every 4 KiB, so the caller passes the memory to `keep` when it is done, for the
    thread's next call. Until then the caller owns it, even if a signal handler interrupts the call and calls an op.
    """
    sizes, total = [], 64
    for dtype, shape in parts:
        sizes.append(math.prod(shape) * dtype.itemsize)
        total += -(-sizes[-1] // 64) * 64
    memory, _memory.bytes = getattr(_memory, "bytes", None), None
    if memory is None or memory.numel() < total:
        memory = torch.empty(total, dtype=torch.uint8, device="cpu")
    start, found = -memory.data_ptr() % 64, []
    for (dtype, shape), size in zip(parts, sizes, strict=True):
        found.append(memory[start : start + size].view(dtype).view(shape))
        start += -(-size // 64) * 64
    return memory, found


def keep(memory: Tensor) -> None:
    """Leaves memory of `workspace` to the thread's next call, unless it is large."""
    _memory.bytes = memory if memory.numel() <= _KEPT else None
