"""Memory for calls of the extension: aligned, in large pages where it is large, kept between calls."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from fastbert.engine.library import C

KEPT = 64 << 20  # bytes that a thread keeps between calls
_thread = threading.local()


class Memory(NamedTuple):
    """Uninitialised bytes, and the address of the first aligned one: to a large page, or in small memory to 64."""

    held: np.ndarray  # uint8
    start: int
    size: int  # bytes from there on

    @property
    def bytes(self) -> np.ndarray:
        """Those from `start` on, (size,) uint8."""
        return self.held[self.start - address_of(self.held) :][: self.size]


def address_of(x: np.ndarray) -> int:
    """The address of an array's first element."""
    return x.__array_interface__["data"][0]


def fresh_bytes(size: int) -> Memory:
    """Memory of at least `size` bytes; large memory is of large pages, where there are any.

    Looking up pages of 4 KiB costs a tenth of the time of products, and more in a virtual machine.
    """
    alignment = C.HUGE_PAGE if size >= C.HUGE_PAGE else 64
    held = np.empty(size + alignment, dtype=np.uint8)
    address = address_of(held)
    C.prefer_huge_pages(address, held.size)
    offset = -address % alignment
    return Memory(held, address + offset, held.size - offset)


def workspace(size: int) -> Memory:
    """Memory for one call.

    Fresh memory costs a page fault every 4 KiB, so the caller passes the memory to `keep` when it is done, for the
    thread's next call. Until then the caller owns it, even if a signal handler interrupts the call and calls an op.
    """
    memory, _thread.memory = getattr(_thread, "memory", None), None
    return memory if memory is not None and memory.size >= size else fresh_bytes(size)


def keep(memory: Memory) -> None:
    """Leaves memory of `workspace` to the thread's next call, unless it is large."""
    _thread.memory = memory if memory.held.size <= KEPT else None
