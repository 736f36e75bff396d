"""y = LayerNorm(dropout(x) + residual) * weight + bias, or RMSNorm, and its gradients.

Bytes: the forward reads x and residual and writes y, 3 * M * N * itemsize. For training it also writes their sum,
which replaces x and residual: both can be freed, and the backward reads one tensor instead of two. The backward reads
dy and the sum and writes dx, which without dropout is also dresidual: 3 * M * N * itemsize, with dropout 4. Without
dropout and residual, x is the sum. Everything is computed in fp32. The sum is rounded to the dtype of y, as eager
PyTorch rounds it, also in inference, so that training computes the same y. Each program sums dweight and dbias over
its rows, which depend only on the numbers of rows and of multiprocessors; then the programs' sums are added. There are
no atomics: repeated runs are bit-equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs, dropout
from fastbert.kernels.layer_norm import (
    columns_of,
    dropped,
    gradient,
    load_statistics,
    load_tile,
    load_vector,
    programs_for,
    rms_statistics,
    row_keys,
    statistics,
    store_partials,
    store_statistics,
    store_tile,
    sum_partials,
)


@triton.jit(do_not_specialize=["M", "threshold"])
def _add_layer_norm_fwd_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    weight_ptr,  # (N,)
    bias_ptr,  # (N,) or None
    seed_ptr,  # (1,) or None: no dropout
    y_ptr,  # (M, N)
    total_ptr,  # (M, N) or None: not saved
    mean_ptr,  # (2, M) or None: not saved
    rstd_ptr,  # (M,)
    stride_xm,
    stride_rm,
    M,
    threshold,
    scale,
    eps,
    N: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns_a, columns_b = columns_of(BLOCK_A, BLOCK_B)
    weight_a = load_vector(weight_ptr, columns_a, N)
    weight_b = load_vector(weight_ptr, columns_b, N)
    bias_a, bias_b = 0.0, 0.0
    if bias_ptr is not None:
        bias_a = load_vector(bias_ptr, columns_a, N)
        bias_b = load_vector(bias_ptr, columns_b, N)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keys_a = dropout.column_keys(seed, columns_a)
        keys_b = dropout.column_keys(seed, columns_b)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        mask_m = rows < M
        mask_a = mask_m & (columns_a < N)
        mask_b = mask_m & (columns_b < N)
        x_a = load_tile(x_ptr, rows, stride_xm, columns_a, mask_a)
        x_b = load_tile(x_ptr, rows, stride_xm, columns_b, mask_b)
        if seed_ptr is not None:
            keys_m = row_keys(seed, rows)
            x_a = dropped(x_a, keys_m, keys_a, threshold, scale)
            x_b = dropped(x_b, keys_m, keys_b, threshold, scale)
        if residual_ptr is not None:
            x_a += load_tile(residual_ptr, rows, stride_rm, columns_a, mask_a)
            x_b += load_tile(residual_ptr, rows, stride_rm, columns_b, mask_b)
        # Rounded even if not saved: the statistics must be those of the rounded sum, which the backward reads.
        x_a = x_a.to(y_ptr.dtype.element_ty).to(tl.float32)
        x_b = x_b.to(y_ptr.dtype.element_ty).to(tl.float32)
        if total_ptr is not None:
            store_tile(total_ptr, rows, N, columns_a, mask_a, x_a)
            store_tile(total_ptr, rows, N, columns_b, mask_b, x_b)
        if RMS:
            x_a, x_b, mean, left, rstd = rms_statistics(x_a, x_b, eps, N)
        else:
            x_a, x_b, mean, left, rstd = statistics(x_a, x_b, columns_a, columns_b, eps, N)
        if mean_ptr is not None:
            store_statistics(mean_ptr, rstd_ptr, rows, mask_m, M, mean, left, rstd)
        store_tile(y_ptr, rows, N, columns_a, mask_a, x_a * rstd * weight_a + bias_a)
        store_tile(y_ptr, rows, N, columns_b, mask_b, x_b * rstd * weight_b + bias_b)


@triton.jit(do_not_specialize=["M", "threshold"])
def _add_layer_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    dsum_ptr,  # (M, N) or None: the gradient of the sum, where that is an output too
    total_ptr,  # (M, N)
    weight_ptr,  # (N,)
    mean_ptr,  # (2, M)
    rstd_ptr,  # (M,)
    seed_ptr,  # (1,) or None: no dropout
    dx_ptr,  # (M, N) or None: not needed
    dresidual_ptr,  # (M, N) or None: not needed, or equal to dx
    partials_ptr,  # (programs, 2, N) fp32 or None: neither dweight nor dbias is needed
    stride_dym,
    stride_dsm,
    stride_tm,
    M,
    threshold,
    scale,
    N: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns_a, columns_b = columns_of(BLOCK_A, BLOCK_B)
    weight_a = load_vector(weight_ptr, columns_a, N)
    weight_b = load_vector(weight_ptr, columns_b, N)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keys_a = dropout.column_keys(seed, columns_a)
        keys_b = dropout.column_keys(seed, columns_b)
    # One sum per row of the tile until the end: rows lie in different warps.
    dweight_a = tl.zeros((ROWS, BLOCK_A), tl.float32)
    dweight_b = tl.zeros((ROWS, BLOCK_B), tl.float32)
    dbias_a = tl.zeros((ROWS, BLOCK_A), tl.float32)
    dbias_b = tl.zeros((ROWS, BLOCK_B), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        mask_m = rows < M
        mask_a = mask_m & (columns_a < N)
        mask_b = mask_m & (columns_b < N)
        dy_a = load_tile(dy_ptr, rows, stride_dym, columns_a, mask_a)
        dy_b = load_tile(dy_ptr, rows, stride_dym, columns_b, mask_b)
        mean, left, rstd = load_statistics(mean_ptr, rstd_ptr, rows, mask_m, M)
        xhat_a = (load_tile(total_ptr, rows, stride_tm, columns_a, mask_a) - mean - left) * rstd
        xhat_b = (load_tile(total_ptr, rows, stride_tm, columns_b, mask_b) - mean - left) * rstd
        if partials_ptr is not None:
            dweight_a += dy_a * xhat_a
            dweight_b += dy_b * xhat_b
            dbias_a += dy_a
            dbias_b += dy_b
        if dx_ptr is not None or dresidual_ptr is not None:
            d_a, d_b = gradient(dy_a, dy_b, xhat_a, xhat_b, weight_a, weight_b, rstd, N, RMS)
            if dsum_ptr is not None:
                d_a += load_tile(dsum_ptr, rows, stride_dsm, columns_a, mask_a)
                d_b += load_tile(dsum_ptr, rows, stride_dsm, columns_b, mask_b)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr, rows, N, columns_a, mask_a, d_a)
                store_tile(dresidual_ptr, rows, N, columns_b, mask_b, d_b)
            if dx_ptr is not None:
                if seed_ptr is not None:
                    keys_m = row_keys(seed, rows)
                    d_a = dropped(d_a, keys_m, keys_a, threshold, scale)
                    d_b = dropped(d_b, keys_m, keys_b, threshold, scale)
                store_tile(dx_ptr, rows, N, columns_a, mask_a, d_a)
                store_tile(dx_ptr, rows, N, columns_b, mask_b, d_b)
    if partials_ptr is not None:
        store_partials(partials_ptr, columns_a, dweight_a, dbias_a, N)
        store_partials(partials_ptr, columns_b, dweight_b, dbias_b, N)


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None = None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    training: bool = False,
    rms: bool = False,
    return_sum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x, residual (M, N), weight, bias (N,), columns contiguous, any floating dtypes -> y, total, mean, rstd.

    y (M, N) has the wider dtype of x and residual. The others are saved for backward, None unless `training`, but for
    total with `return_sum`: total = dropout(x) + residual (M, N) in y's dtype, or x itself if they are equal; mean
    (2, M) and rstd (M,) in fp32, with mean[1] the rounding error of mean[0]. `seed` is read if dropout_p is above 0.
    """
    M, N = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty((M, N), dtype=dtype, device=x.device)
    total = mean = rstd = None
    changed = residual is not None or dropout_p > 0
    if training or return_sum:
        total = torch.empty((M, N), dtype=dtype, device=x.device) if changed else x
    if training:
        mean = torch.empty((2, M), dtype=torch.float32, device=x.device)
        rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    if not y.numel():
        return y, total, mean, rstd
    tile = configs.layer_norm_forward(N, architecture.architecture(x.device), dropout=dropout_p > 0)
    with architecture.on_device(x.device):
        _add_layer_norm_fwd_kernel[(programs_for(M, tile, x.device),)](
            x,
            residual,
            weight,
            bias,
            seed if dropout_p else None,
            y,
            total if changed else None,
            mean,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            M,
            dropout.threshold(dropout_p),
            1.0 / (1.0 - dropout_p),
            eps,
            N=N,
            RMS=rms,
            ROWS=tile.rows,
            BLOCK_A=tile.block_a,
            BLOCK_B=tile.block_b,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
        )
    return y, total, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype],
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, True),
    rms: bool = False,
    dsum: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy (M, N), columns contiguous, and the forward's saved tensors -> dx, dresidual, dweight, dbias.

    `dsum` (M, N), columns contiguous, is the gradient of total, if that was an output too. `dtypes` are those of x,
    residual (None: there was none) and bias. Gradients that are not `wanted` are None. dx and
    dresidual are one tensor where they are equal.
    """
    M, N = total.shape
    x_dtype, residual_dtype, bias_dtype = dtypes
    wants_x, wants_residual = wanted[0], wanted[1] and residual_dtype is not None
    shared = wants_x and wants_residual and not dropout_p and x_dtype == residual_dtype
    device = total.device
    dx = torch.empty((M, N), dtype=x_dtype, device=device) if wants_x else None
    own_dresidual = wants_residual and not shared
    dresidual = torch.empty((M, N), dtype=residual_dtype, device=device) if own_dresidual else None
    tile = configs.layer_norm_bwd(N, architecture.architecture(device))
    programs = programs_for(M, tile, device)
    partials = None
    if wanted[2] or wanted[3]:
        partials = torch.empty((programs, 2, N), dtype=torch.float32, device=device)
    if total.numel() and any(t is not None for t in (dx, dresidual, partials)):
        with architecture.on_device(device):
            _add_layer_norm_bwd_kernel[(programs,)](
                dy,
                dsum,
                total,
                weight,
                mean,
                rstd,
                seed if dropout_p else None,
                dx,
                dresidual,
                partials,
                dy.stride(0),
                0 if dsum is None else dsum.stride(0),
                total.stride(0),
                M,
                dropout.threshold(dropout_p),
                1.0 / (1.0 - dropout_p),
                N=N,
                RMS=rms,
                ROWS=tile.rows,
                BLOCK_A=tile.block_a,
                BLOCK_B=tile.block_b,
                STAGES=tile.num_stages,
                num_warps=tile.num_warps,
            )
    dweight = dbias = None
    if partials is not None:
        dweight, dbias = sum_partials(partials, weight.dtype, bias_dtype)
    return dx, dx if shared else dresidual, dweight if wanted[2] else None, dbias if wanted[3] else None
