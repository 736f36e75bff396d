"""Rotary positions of queries and keys (Su et al., 2021), and their gradient.

Memory-bound: it reads (H + 2 G) D values per token and writes 3 H D. A program turns all heads of one token, whose
angles it reads once. The gradient turns back; where a head of keys serves several of queries, their gradients are
summed first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture


@triton.jit
def _part(
    x_row,
    y_row,
    cos,
    sin,
    columns,
    inside,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,  # 0 queries, 1 keys, 2 values
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """All heads of queries, of keys or of values of a token."""
    HALF: tl.constexpr = D // 2
    REPEATS: tl.constexpr = 1 if PART == 0 else H // G
    HEADS: tl.constexpr = H if PART == 0 else G
    GROUPED: tl.constexpr = 0 if PART == 0 else H + (PART - 1) * G  # their first head next to those of queries
    WRITTEN: tl.constexpr = HEADS if BACKWARD else H
    SUMMED: tl.constexpr = REPEATS if BACKWARD else 1
    for start in tl.static_range(0, WRITTEN, BLOCK_H):
        heads = (start + tl.arange(0, BLOCK_H))[:, None]
        mask = (heads < WRITTEN) & inside
        a = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        b = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        for i in tl.static_range(SUMMED):
            source = PART * H + heads * REPEATS + i if BACKWARD else GROUPED + heads // REPEATS
            a += tl.load(x_row + source * D + columns, mask=mask, other=0.0).to(tl.float32)
            b += tl.load(x_row + source * D + HALF + columns, mask=mask, other=0.0).to(tl.float32)
        if PART < 2:
            a, b = a * cos - b * sin, b * cos + a * sin
        target = y_row + ((GROUPED if BACKWARD else PART * H) + heads) * D + columns
        tl.store(target, a.to(y_row.dtype.element_ty), mask=mask)
        tl.store(target + HALF, b.to(y_row.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_kernel(
    x_ptr,  # (T, H + 2 G, D), BACKWARD: (T, 3, H, D)
    y_ptr,  # (T, 3, H, D), BACKWARD: (T, H + 2 G, D)
    table_ptr,  # (places, D) fp32: cosines, then sines
    positions_ptr,  # (T,)
    places,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = columns < D // 2
    place = tl.minimum(tl.maximum(tl.load(positions_ptr + t), 0), places - 1)
    angles = table_ptr + place * D + columns
    cos = tl.load(angles, mask=inside, other=0.0)
    sin = tl.load(angles + D // 2, mask=inside, other=0.0)
    if BACKWARD:
        sin = -sin
    x_row = x_ptr + t * ((3 * H if BACKWARD else H + 2 * G) * D)
    y_row = y_ptr + t * ((H + 2 * G if BACKWARD else 3 * H) * D)
    _part(x_row, y_row, cos, sin, columns, inside, H, G, D, 0, BLOCK_H, BLOCK_D, BACKWARD)
    _part(x_row, y_row, cos, sin, columns, inside, H, G, D, 1, BLOCK_H, BLOCK_D, BACKWARD)
    _part(x_row, y_row, cos, sin, columns, inside, H, G, D, 2, BLOCK_H, BLOCK_D, BACKWARD)


def rotary_fwd(qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    """qkv (T, H + 2 G, D), contiguous, table (places, D) fp32, positions (T,) -> (T, 3, H, D).

    Positions outside the table are clamped to it.
    """
    T, heads, D = qkv.shape
    y = torch.empty((T, 3, num_heads, D), dtype=qkv.dtype, device=qkv.device)
    return _run(qkv, y, table, positions, num_heads, (heads - num_heads) // 2, backward=False)


def rotary_bwd(dy: Tensor, table: Tensor, positions: Tensor, groups: int) -> Tensor:
    """dy (T, 3, H, D), contiguous -> the gradient of qkv, (T, H + 2 G, D)."""
    T, _, H, D = dy.shape
    dx = torch.empty((T, H + 2 * groups, D), dtype=dy.dtype, device=dy.device)
    return _run(dy, dx, table, positions, H, groups, backward=True)


def _run(x: Tensor, y: Tensor, table: Tensor, positions: Tensor, H: int, G: int, *, backward: bool) -> Tensor:
    D = x.shape[-1]
    if x.numel():
        with architecture.on_device(x.device):
            _rotary_kernel[(len(x),)](
                x,
                y,
                table.contiguous(),
                positions,
                len(table),
                H=H,
                G=G,
                D=D,
                BLOCK_H=min(triton.next_power_of_2(H), 16),
                BLOCK_D=max(triton.next_power_of_2(D // 2), 16),
                BACKWARD=backward,
                num_warps=4,
            )
    return y
