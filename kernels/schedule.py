"""The schedule of attention's programs: a table of tiles, computed on the device, longest sequences first.

A grid of (longest sequence / block) x B programs would be mostly idle where lengths differ. The table has T // block +
B + 1 slots, enough for any lengths, so the host need not read cu_seqlens. It takes one launch, O(B) work per program
and no sort: a sequence's rank is the number of sequences that are longer, or as long and before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture

_SEQUENCES = 256  # sequences whose lengths a program reads at a time


@dataclass(frozen=True)
class TileSchedule:
    """`table` (slots, 4) int32: first row, rows and keys of the tile's sequence, and the tile's first row within it.

    Rows behind the last sequence are tiles of a sequence without keys; unused slots have 0 rows.
    """

    table: Tensor
    block: int  # rows of a tile


@triton.jit
def _offset(ptr, mask, total, other):
    """An offset clamped to 0..total, so that attention stays in bounds for any cu_seqlens."""
    return tl.minimum(tl.maximum(tl.load(ptr, mask=mask, other=other), 0), total).to(tl.int32)


@triton.jit(do_not_specialize=["total", "slots", "B"])
def _tile_schedule_kernel(
    cu_seqlens_ptr,  # (B+1,)
    table_ptr,  # (slots, 4)
    total,  # T
    slots,
    B,
    BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    # Program b < B writes the tiles of sequence b; program B, the rows behind the last sequence and the unused slots.
    b = tl.program_id(0)
    start = _offset(cu_seqlens_ptr + b, b <= B, total, 0)
    end = _offset(cu_seqlens_ptr + b + 1, b < B, total, total)
    rows = tl.maximum(end - start, 0)
    keys = tl.where(b < B, rows, 0)
    before = tl.zeros((SEQUENCES,), tl.int32)
    for first in range(0, B, SEQUENCES):
        others = first + tl.arange(0, SEQUENCES)
        mask = others < B
        left, right = (
            _offset(cu_seqlens_ptr + others, mask, total, 0),
            _offset(cu_seqlens_ptr + others + 1, mask, total, 0),
        )
        length = tl.maximum(right - left, 0)
        ahead = (length > rows) | ((length == rows) & (others < b)) | (b == B)
        before += tl.where(ahead, tl.cdiv(length, BLOCK), 0)
    slot = tl.sum(before, axis=0)
    # The sequence's tiles; for program B also all slots left, with rows = 0: their attention programs return at once.
    last = tl.where(b == B, slots, slot + tl.cdiv(rows, BLOCK))
    for first in range(slot, last, SEQUENCES):
        tiles = first + tl.arange(0, SEQUENCES)
        begins = (tiles - slot) * BLOCK
        mask = (tiles < last) & (tiles < slots)
        entry = table_ptr + tiles * 4
        tl.store(entry, tl.zeros_like(tiles) + start, mask=mask)
        tl.store(entry + 1, tl.where(begins < rows, rows, 0), mask=mask)
        tl.store(entry + 2, tl.zeros_like(tiles) + keys, mask=mask)
        tl.store(entry + 3, begins, mask=mask)


def tile_schedule(cu_seqlens: Tensor, total: int, block: int) -> TileSchedule:
    """cu_seqlens (B+1,), from 0 to at most `total` (T) -> the tiles of `block` rows, without waiting for the device.

    Offsets are not checked: descending or out-of-range ones give an arbitrary table of rows below `total`.
    """
    cu_seqlens, B = cu_seqlens.contiguous(), len(cu_seqlens) - 1
    slots = total // block + B + 1
    table = torch.empty((slots, 4), dtype=torch.int32, device=cu_seqlens.device)
    with architecture.on_device(cu_seqlens.device):
        _tile_schedule_kernel[(B + 1,)](
            cu_seqlens, table, total, slots, B, BLOCK=block, SEQUENCES=_SEQUENCES, num_warps=4
        )
    return TileSchedule(table, block)
