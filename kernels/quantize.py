"""Rotates rows of x and quantises them to int8 with a scale per row: reference.rotate, reference.quantize_rows.

One pass: reads M K elements and writes M K bytes, 3 M K bytes in all for 16-bit x. A program holds a row in registers
as eight vectors: the i-th has columns 16 i to 16 i + 15 of every 128, so that the Hadamard transform over the eight,
three steps of sums and differences, moves no data between threads. All operations are fp32 and rounded as in the
reference, including the division, so the integers equal the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs

_GROUP = tl.constexpr(128)  # columns that are rotated together
PADDED_TO = 128  # columns of the result: a product then has no last step to mask


@triton.jit
def _butterfly(x0, x1, x2, x3, x4, x5, x6, x7):
    """Sums and differences of pairs; applied three times, it is the Hadamard transform of order 8."""
    return x0 + x4, x1 + x5, x2 + x6, x3 + x7, x0 - x4, x1 - x5, x2 - x6, x3 - x7


@triton.jit
def _load(row_ptr, columns, K):
    return tl.load(row_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)


@triton.jit
def _rotated(x, y, columns, K, EVEN_K: tl.constexpr):
    """y / sqrt(8) in full groups of 128 columns, x elsewhere."""
    y *= 0.35355339059327373
    return y if EVEN_K else tl.where((columns // _GROUP + 1) * _GROUP <= K, y, x)


@triton.jit
def _store(row_ptr, columns, x, scale, P):
    x = tl.div_rn(x, scale)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)  # for rows so small that their scale is inexact
    x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to an integer, half to even
    tl.store(row_ptr + columns, x.to(tl.int8), mask=columns < P)


@triton.jit
def _quantize_rows_fwd_kernel(
    x_ptr,  # (M, K)
    y_ptr,  # (M, P) int8, zeros from K on
    scale_ptr,  # (M,)
    stride_xm,
    K,
    P,  # K rounded up to whole groups
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + m * stride_xm
    offs = tl.arange(0, BLOCK)
    columns = offs // 16 * _GROUP + offs % 16
    x0, x1 = _load(row_ptr, columns, K), _load(row_ptr, columns + 16, K)
    x2, x3 = _load(row_ptr, columns + 32, K), _load(row_ptr, columns + 48, K)
    x4, x5 = _load(row_ptr, columns + 64, K), _load(row_ptr, columns + 80, K)
    x6, x7 = _load(row_ptr, columns + 96, K), _load(row_ptr, columns + 112, K)
    y0, y1, y2, y3, y4, y5, y6, y7 = _butterfly(x0, x1, x2, x3, x4, x5, x6, x7)
    y0, y1, y4, y5, y2, y3, y6, y7 = _butterfly(y0, y1, y4, y5, y2, y3, y6, y7)
    y0, y2, y4, y6, y1, y3, y5, y7 = _butterfly(y0, y2, y4, y6, y1, y3, y5, y7)
    x0, x1 = _rotated(x0, y0, columns, K, EVEN_K), _rotated(x1, y1, columns, K, EVEN_K)
    x2, x3 = _rotated(x2, y2, columns, K, EVEN_K), _rotated(x3, y3, columns, K, EVEN_K)
    x4, x5 = _rotated(x4, y4, columns, K, EVEN_K), _rotated(x5, y5, columns, K, EVEN_K)
    x6, x7 = _rotated(x6, y6, columns, K, EVEN_K), _rotated(x7, y7, columns, K, EVEN_K)
    low = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
    high = tl.maximum(tl.maximum(tl.abs(x4), tl.abs(x5)), tl.maximum(tl.abs(x6), tl.abs(x7)))
    scale = tl.div_rn(tl.max(tl.maximum(low, high), axis=0), 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    # A maximum ignores NaN. The row's sum times 0 is NaN if an element is not finite, else 0.
    scale += tl.sum(((x0 + x1) + (x2 + x3) + (x4 + x5) + (x6 + x7)) * 0.0, axis=0)
    tl.store(scale_ptr + m, scale)
    y_row_ptr = y_ptr + m * P
    _store(y_row_ptr, columns, x0, scale, P)
    _store(y_row_ptr, columns + 16, x1, scale, P)
    _store(y_row_ptr, columns + 32, x2, scale, P)
    _store(y_row_ptr, columns + 48, x3, scale, P)
    _store(y_row_ptr, columns + 64, x4, scale, P)
    _store(y_row_ptr, columns + 80, x5, scale, P)
    _store(y_row_ptr, columns + 96, x6, scale, P)
    _store(y_row_ptr, columns + 112, x7, scale, P)


def quantize_rows_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K), columns contiguous -> rotated rows as int8 (M, P), and their scales (M,) in fp32.

    P is K rounded up to a multiple of PADDED_TO; the columns from K on are zeros.
    """
    M, K = x.shape
    P = triton.cdiv(K, PADDED_TO) * PADDED_TO
    y = torch.empty((M, P), dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if M == 0:
        return y, scale
    BLOCK, num_warps = configs.quantize_rows(P)
    with architecture.on_device(x.device):
        _quantize_rows_fwd_kernel[(M,)](
            x,
            y,
            scale,
            x.stride(0),
            K,
            P,
            EVEN_K=K == P,
            BLOCK=BLOCK,
            num_warps=num_warps,
        )
    return y, scale
