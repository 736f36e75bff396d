"""Shared by the kernels with a LayerNorm: tiles of rows, statistics, the gradient, sums over all rows.

A tile is ROWS rows x two blocks of BLOCK_A and BLOCK_B columns. Block sizes are powers of two, but BERT's widths, 384
and 768, are not: in one block of 1024, a quarter of the lanes would be idle. Names in _a are of the first block, names
in _b of the second. A vector along the columns is (1, BLOCK), a statistic (ROWS, 1). Everything is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs, dropout


@triton.jit
def columns_of(BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    return tl.arange(0, BLOCK_A)[None, :], BLOCK_A + tl.arange(0, BLOCK_B)[None, :]


@triton.jit
def load_vector(ptr, columns, N: tl.constexpr):
    return tl.load(ptr + columns, mask=columns < N, other=0.0).to(tl.float32)


@triton.jit
def load_tile(ptr, rows, stride, columns, mask):
    """rows (ROWS, 1) in int64, columns (1, BLOCK) -> (ROWS, BLOCK), zero where `mask` is false."""
    return tl.load(ptr + rows * stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, rows, stride, columns, mask, values):
    tl.store(ptr + rows * stride + columns, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_keys(seed, rows):
    return dropout.row_keys(seed, rows, tl.full((), 0, tl.int32))


@triton.jit
def dropped(x, row_keys, column_keys, threshold, scale):
    return tl.where(dropout.kept(row_keys, column_keys, threshold), x * scale, 0.0)


@triton.jit
def row_sum(a, b):
    return tl.sum(a, axis=1, keep_dims=True) + tl.sum(b, axis=1, keep_dims=True)


@triton.jit
def statistics(x_a, x_b, columns_a, columns_b, eps, N: tl.constexpr):
    """The row minus its mean, zero from column N on; the mean in two terms, to be subtracted in turn; rstd.

    The second term is the rounding error of the first: for a mean far from zero, half an ulp of it is not small against
    the row's spread. The squares are summed about the mean, as E[x^2] - mean^2 would cancel for a large mean.
    """
    mean = row_sum(x_a, x_b) / N
    x_a = tl.where(columns_a < N, x_a - mean, 0.0)
    x_b = tl.where(columns_b < N, x_b - mean, 0.0)
    left = row_sum(x_a, x_b) / N
    x_a = tl.where(columns_a < N, x_a - left, 0.0)
    x_b = tl.where(columns_b < N, x_b - left, 0.0)
    rstd = 1.0 / tl.sqrt_rn(row_sum(x_a * x_a, x_b * x_b) / N + eps)
    return x_a, x_b, mean, left, rstd


@triton.jit
def rms_statistics(x_a, x_b, eps, N: tl.constexpr):
    """As `statistics`, of RMSNorm: the row, means of zero, and 1 / its root mean square."""
    square = row_sum(x_a * x_a, x_b * x_b) / N  # zero from column N on
    rstd = 1.0 / tl.sqrt_rn(square + eps)
    return x_a, x_b, rstd * 0.0, rstd * 0.0, rstd


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, rows, mask_m, M, mean, left, rstd):
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(mean_ptr + M + rows, left, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, rows, mask_m, M):
    mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
    left = tl.load(mean_ptr + M + rows, mask=mask_m, other=0.0)
    return mean, left, tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)


@triton.jit
def gradient(dy_a, dy_b, xhat_a, xhat_b, weight_a, weight_b, rstd, N: tl.constexpr, RMS: tl.constexpr = False):
    """The gradient of LayerNorm's input: rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight; RMSNorm's has
    no mean(g)."""
    g_a = dy_a * weight_a
    g_b = dy_b * weight_b
    shift = 0.0 if RMS else row_sum(g_a, g_b) / N
    slope = row_sum(g_a * xhat_a, g_b * xhat_b) / N
    return (g_a - shift - xhat_a * slope) * rstd, (g_b - shift - xhat_b * slope) * rstd


@triton.jit
def store_partials(partials_ptr, columns, dweight, dbias, N: tl.constexpr):
    """Sums dweight and dbias (ROWS, BLOCK) over ROWS into this program's line of partials (programs, 2, N)."""
    line = partials_ptr + tl.program_id(0).to(tl.int64) * 2 * N + columns
    tl.store(line, tl.sum(dweight, axis=0, keep_dims=True), mask=columns < N)
    tl.store(line + N, tl.sum(dbias, axis=0, keep_dims=True), mask=columns < N)


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partials_ptr,  # (P, 2, N) fp32
    dweight_ptr,  # (N,)
    dbias_ptr,  # (N,)
    P,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        mask = (rows < P) & (columns < N)[None, :]
        total += tl.load(partials_ptr + (rows * 2 + which) * N + columns[None, :], mask=mask, other=0.0)
    total = tl.sum(total, axis=0)
    if which == 0:
        tl.store(dweight_ptr + columns, total.to(dweight_ptr.dtype.element_ty), mask=columns < N)
    else:
        tl.store(dbias_ptr + columns, total.to(dbias_ptr.dtype.element_ty), mask=columns < N)


def programs_for(M: int, tile: configs.RowTile, device: torch.device) -> int:
    """The grid for M rows. It decides which rows a program sums, so it must not vary between runs."""
    tiles = triton.cdiv(M, tile.rows)
    return min(tiles, architecture.multiprocessors(device) * tile.programs) if tile.programs else tiles


def sum_partials(partials: Tensor, weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """partials (P, 2, N) in fp32 -> dweight, dbias (N,), added in the order of the programs."""
    P, _, N = partials.shape
    dweight = torch.empty(N, dtype=weight_dtype, device=partials.device)
    dbias = torch.empty(N, dtype=bias_dtype, device=partials.device)
    BLOCK_P, BLOCK_N = 128, 32
    with architecture.on_device(partials.device):
        _sum_partials_kernel[(triton.cdiv(N, BLOCK_N), 2)](
            partials, dweight, dbias, P, N=N, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, num_warps=4
        )
    return dweight, dbias
