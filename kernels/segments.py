"""Sums of rows with equal keys, for rows sorted by key: an embedding's gradient.

A chunk of CHUNK sorted rows is one segmented scan. The sum of a segment inside the chunk goes to the table. A segment
that crosses the chunk's first or last edge leaves a partial sum, at most two per chunk. The partial sums, still in the
order of their keys, are the rows of the next round: 32 times fewer, so a million rows take four rounds for any keys.
The host knows the number of rounds from the number of rows. No atomics: the order of each sum is fixed.

Reads n * N * itemsize bytes once; writes partial sums in fp32, at most 1 / 32 as many elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs


@triton.jit
def _add_within_segment(first_a, sum_a, first_b, sum_b):
    """The scan's operator on a run of rows and the next run; `first` is set if a run has a segment's first row."""
    return first_a | first_b, tl.where(first_b != 0, sum_b, sum_a + sum_b)


@triton.jit(do_not_specialize=["n", "modulus", "size"])
def _segment_sums_kernel(
    values_ptr,  # (modulus, N)
    order_ptr,  # (n,) int64: row i of the sorted ones is row order[i] % modulus of values; None: row i
    keys_ptr,  # (n,) int32, ascending except for keys outside 0..size-1, which are ignored
    table_ptr,  # (size, N)
    partials_ptr,  # (2 * chunks, N) fp32
    partial_keys_ptr,  # (2 * chunks,) int32
    stride_v,
    n,
    modulus,
    size,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask_n = columns < N
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, n) - 1
    i = (first + tl.arange(0, CHUNK))[:, None]
    mask_i = i <= last
    key = tl.load(keys_ptr + i, mask=mask_i, other=-1)
    before = tl.load(keys_ptr + i - 1, mask=mask_i & (i > 0), other=-1)
    after = tl.load(keys_ptr + i + 1, mask=i + 1 < n, other=-1)
    known = mask_i & (key >= 0) & (key < size)
    row = i.to(tl.int64) if order_ptr is None else tl.load(order_ptr + i, mask=mask_i, other=0) % modulus
    values = tl.load(values_ptr + row * stride_v + columns, mask=known & mask_n, other=0.0).to(tl.float32)

    starts = tl.broadcast_to((key != before).to(tl.int32), (CHUNK, BLOCK_N))
    started, sums = tl.associative_scan((starts, values), 0, _add_within_segment)
    crosses_first = started == 0  # the segment began in an earlier chunk
    ends = known & ((i == last) | (key != after))
    crosses_last = ends & (key == after)  # only at the last row

    inside = (ends & (key != after)) & ~crosses_first & mask_n
    out = key.to(tl.int64)
    tl.store(table_ptr + out * N + columns, sums.to(table_ptr.dtype.element_ty), mask=inside)

    # Two lines per chunk: the segments that cross its first and its last edge. If one segment crosses both, the first
    # line has its sum and the second zeros, so that equal keys stay neighbours in the next round.
    line = partials_ptr + chunk.to(tl.int64) * 2 * N + columns + i * 0
    tl.store(line, sums, mask=ends & crosses_first & mask_n)
    tl.store(line + N, tl.where(crosses_first, 0.0, sums), mask=crosses_last & mask_n)
    if tl.program_id(1) == 0:
        first_key = tl.load(keys_ptr + first)
        last_key = tl.load(keys_ptr + last)
        key_before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
        key_after = tl.load(keys_ptr + last + 1, mask=last + 1 < n, other=-1)
        tl.store(partial_keys_ptr + 2 * chunk, tl.where(first_key == key_before, first_key, -1))
        tl.store(partial_keys_ptr + 2 * chunk + 1, tl.where(last_key == key_after, last_key, -1))


def segment_sums(values: Tensor, order: Tensor, keys: Tensor, size: int) -> Tensor:
    """values (R, N), order (n,) int64, keys (n,) int32 ascending -> table (size, N) in the dtype of values.

    Row k of the table is the sum, in fp32, of values[order[i] % R] over all i with keys[i] == k; zero without any.
    Negative keys are ignored. The columns of values are contiguous.
    """
    modulus, N = values.shape
    table = torch.zeros((size, N), dtype=values.dtype, device=values.device)
    n, rows, where = keys.shape[0], values, order
    if not n or not N:
        return table
    tile = configs.segments(N, architecture.architecture(values.device))
    while True:
        chunks = triton.cdiv(n, tile.chunk)
        partials = torch.empty((2 * chunks, N), dtype=torch.float32, device=values.device)
        partial_keys = torch.empty(2 * chunks, dtype=torch.int32, device=values.device)
        with architecture.on_device(values.device):
            _segment_sums_kernel[(chunks, triton.cdiv(N, tile.block_n))](
                rows,
                where,
                keys,
                table,
                partials,
                partial_keys,
                rows.stride(0),
                n,
                modulus,
                size,
                N=N,
                CHUNK=tile.chunk,
                BLOCK_N=tile.block_n,
                num_warps=tile.num_warps,
            )
        if chunks == 1:
            return table
        n, rows, where, keys = 2 * chunks, partials, None, partial_keys
