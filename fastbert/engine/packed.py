"""Weights in the order that the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastbert.engine.library import PRECISIONS, C, chosen_isa
from fastbert.engine.memory import fresh_bytes


class RowBlock(NamedTuple):
    """Rows of a weight in memory: number, address, stride in elements, and the address of their biases or 0."""

    rows: int
    address: int
    stride: int
    bias: int = 0


def packed_bytes(dtype: int, precision: str | None, count: int, width: int) -> int:
    """The size of a packed weight (count, width) of a dtype by its number in C++."""
    return C.packed_weight_bytes(dtype, PRECISIONS[precision], count, width, chosen_isa()[1])


def fill_panels(dtype: int, precision: str | None, counts: Sequence[int], width: int) -> bool:
    """True if blocks of rows can be packed one by one: they fill their panels, so the bytes are those of all rows
    packed together."""
    if len(counts) == 1:
        return True
    sizes = [(packed_bytes(dtype, precision, n, width), packed_bytes(dtype, precision, n + 1, width)) for n in counts]
    return all(more > size for size, more in sizes)


def pack(dtype: int, precision: str | None, blocks: Sequence[RowBlock], width: int, threads: int) -> np.ndarray:
    """The packed panels of blocks of rows with their biases, uint8, for the instruction set in use."""
    sizes = [packed_bytes(dtype, precision, block.rows, width) for block in blocks]
    memory = fresh_bytes(sum(sizes))
    place = memory.start
    for block, size in zip(blocks, sizes, strict=True):
        pointers = block.address, block.stride, block.bias, place
        C.pack_weight_cpu(dtype, PRECISIONS[precision], block.rows, width, *pointers, chosen_isa()[1], threads)
        place += size
    return memory.bytes[: sum(sizes)]


def rows_in_turns(count: int) -> np.ndarray:
    """The order of a gated product's rows: of its two halves in turns, half a panel of each; -1 stands for zeros that
    fill the last ones up."""
    half = C.panel_columns(chosen_isa()[1]) // 2
    missing = -(count // 2) % half
    order = np.arange(count).reshape(2, -1)
    order = np.concatenate([order, np.full((2, missing), -1)], axis=1)
    return order.reshape(2, -1, half).swapaxes(0, 1).reshape(-1)
