"""Memory that a thread's calls write to and forget."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from fastbert.native.extension import C

_KEPT = 64 << 20  # bytes that a thread keeps between calls
_memory = threading.local()


def workspace(*parts: tuple[torch.dtype, tuple[int, ...]]) -> list[Tensor]:
    """Uninitialised tensors of these dtypes and shapes, each aligned to 64 bytes, out of one allocation.

    The thread keeps it for its next call unless it is large: fresh memory costs a page fault every 4 KiB. So what a
    call gets is its own until the next call of this function only. In a signal's handler that interrupts such a call
    it is allocated.
    """
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in parts]
    padded = [-(-size // 64) * 64 for size in sizes]
    total = sum(padded) + 64
    interrupts = C.asks_to_stop()
    memory = None if interrupts else getattr(_memory, "bytes", None)
    if memory is None or memory.numel() < total:
        memory = torch.empty(total, dtype=torch.uint8, device="cpu")
        if not interrupts:
            _memory.bytes = memory if total <= _KEPT else None
    start, found = -memory.data_ptr() % 64, []
    for (dtype, shape), size, step in zip(parts, sizes, padded, strict=True):
        found.append(memory[start : start + size].view(dtype).view(shape))
        start += step
    return found
