"""y = dropout(LayerNorm(word[id] + token_type[id] + position[id])), and its gradients.

Bytes: the forward reads ids and three rows per token, two of them from small tables and so from cache, and writes y:
a little over 2 * T * E * itemsize. In training it saves mean and rstd. The backward gathers the rows again, reads dy
and writes the gradient of their sum (T, E) in the tables' dtype: 3 * T * E * itemsize. `segment_sums` then reads that
gradient once per table, in the order of the ids. All sums are fp32, without atomics.

An id outside its table is never read: its token's row of y is NaN, and so are the gradients that depend on that row.
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
    row_keys,
    statistics,
    store_partials,
    store_statistics,
    store_tile,
    sum_partials,
)
from fastbert.kernels.segments import segment_sums


@triton.jit
def _load_ids(ids_ptr, rows, mask_m, size):
    """(ROWS, 1): ids in int64, with 0 for ids outside 0..size-1, and a mask that is false for these."""
    ids = tl.load(ids_ptr + rows, mask=mask_m, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < size)
    return tl.where(known, ids, 0), known


@triton.jit
def _store_keys(keys_ptr, rows, mask_m, ids, has_gradient, base):
    keys = tl.where(has_gradient & (base >= 0), base + ids, -1)
    tl.store(keys_ptr + rows, keys.to(tl.int32), mask=mask_m)


@triton.jit
def _sum_rows(tables, ids, strides, columns, mask, known):
    """The sum of the three tables' rows, (ROWS, BLOCK); NaN where `known` is false."""
    mask = mask & known
    x = load_tile(tables[0], ids[0], strides[0], columns, mask)
    x += load_tile(tables[1], ids[1], strides[1], columns, mask)
    x += load_tile(tables[2], ids[2], strides[2], columns, mask)
    return tl.where(known, x, float("nan"))


@triton.jit(do_not_specialize=["T", "V", "types", "P", "threshold"])
def _embed_layer_norm_fwd_kernel(
    input_ids_ptr,  # (T,)
    token_type_ids_ptr,  # (T,)
    position_ids_ptr,  # (T,)
    word_ptr,  # (V, N)
    token_type_ptr,  # (types, N)
    position_ptr,  # (P, N)
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    seed_ptr,  # (1,) or None: no dropout
    y_ptr,  # (T, N)
    mean_ptr,  # (2, T) or None: not saved
    rstd_ptr,  # (T,)
    stride_w,
    stride_t,
    stride_p,
    T,
    V,
    types,
    P,
    threshold,
    scale,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    columns_a, columns_b = columns_of(BLOCK_A, BLOCK_B)
    weight_a = load_vector(weight_ptr, columns_a, N)
    weight_b = load_vector(weight_ptr, columns_b, N)
    bias_a = load_vector(bias_ptr, columns_a, N)
    bias_b = load_vector(bias_ptr, columns_b, N)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keys_a = dropout.column_keys(seed, columns_a)
        keys_b = dropout.column_keys(seed, columns_b)
    tables = (word_ptr, token_type_ptr, position_ptr)
    strides = (stride_w, stride_t, stride_p)
    for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        mask_m = rows < T
        mask_a = mask_m & (columns_a < N)
        mask_b = mask_m & (columns_b < N)
        word_ids, word_known = _load_ids(input_ids_ptr, rows, mask_m, V)
        type_ids, type_known = _load_ids(token_type_ids_ptr, rows, mask_m, types)
        position_ids, position_known = _load_ids(position_ids_ptr, rows, mask_m, P)
        ids = (word_ids, type_ids, position_ids)
        known = word_known & type_known & position_known
        x_a = _sum_rows(tables, ids, strides, columns_a, mask_a, known)
        x_b = _sum_rows(tables, ids, strides, columns_b, mask_b, known)
        x_a, x_b, mean, left, rstd = statistics(x_a, x_b, columns_a, columns_b, eps, N)
        if mean_ptr is not None:
            store_statistics(mean_ptr, rstd_ptr, rows, mask_m, T, mean, left, rstd)
        y_a = x_a * rstd * weight_a + bias_a
        y_b = x_b * rstd * weight_b + bias_b
        if seed_ptr is not None:
            keys_m = row_keys(seed, rows)
            y_a = dropped(y_a, keys_m, keys_a, threshold, scale)
            y_b = dropped(y_b, keys_m, keys_b, threshold, scale)
        store_tile(y_ptr, rows, N, columns_a, mask_a, y_a)
        store_tile(y_ptr, rows, N, columns_b, mask_b, y_b)


@triton.jit(do_not_specialize=["T", "V", "types", "P", "base_w", "base_t", "base_p", "padding_idx", "threshold"])
def _embed_layer_norm_bwd_kernel(
    dy_ptr,  # (T, N)
    input_ids_ptr,  # (T,)
    token_type_ids_ptr,  # (T,)
    position_ids_ptr,  # (T,)
    word_ptr,  # (V, N)
    token_type_ptr,  # (types, N)
    position_ptr,  # (P, N)
    weight_ptr,  # (N,)
    mean_ptr,  # (2, T)
    rstd_ptr,  # (T,)
    seed_ptr,  # (1,) or None: no dropout
    dtotal_ptr,  # (T, N) or None: no table's gradient is needed
    keys_ptr,  # (3, T) int32: rows of the concatenated tables, each from its base; -1 where there is no gradient
    partials_ptr,  # (programs, 2, N) fp32 or None: neither dweight nor dbias is needed
    stride_dyt,
    stride_w,
    stride_t,
    stride_p,
    T,
    V,
    types,
    P,
    base_w,
    base_t,
    base_p,
    padding_idx,
    threshold,
    scale,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    columns_a, columns_b = columns_of(BLOCK_A, BLOCK_B)
    weight_a = load_vector(weight_ptr, columns_a, N)
    weight_b = load_vector(weight_ptr, columns_b, N)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keys_a = dropout.column_keys(seed, columns_a)
        keys_b = dropout.column_keys(seed, columns_b)
    tables, strides = (word_ptr, token_type_ptr, position_ptr), (stride_w, stride_t, stride_p)
    dweight_a = tl.zeros((ROWS, BLOCK_A), tl.float32)
    dweight_b = tl.zeros((ROWS, BLOCK_B), tl.float32)
    dbias_a = tl.zeros((ROWS, BLOCK_A), tl.float32)
    dbias_b = tl.zeros((ROWS, BLOCK_B), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        mask_m = rows < T
        mask_a = mask_m & (columns_a < N)
        mask_b = mask_m & (columns_b < N)
        dy_a = load_tile(dy_ptr, rows, stride_dyt, columns_a, mask_a)
        dy_b = load_tile(dy_ptr, rows, stride_dyt, columns_b, mask_b)
        word_ids, word_known = _load_ids(input_ids_ptr, rows, mask_m, V)
        type_ids, type_known = _load_ids(token_type_ids_ptr, rows, mask_m, types)
        position_ids, position_known = _load_ids(position_ids_ptr, rows, mask_m, P)
        ids = (word_ids, type_ids, position_ids)
        known = word_known & type_known & position_known
        mean, left, rstd = load_statistics(mean_ptr, rstd_ptr, rows, mask_m, T)
        xhat_a = (_sum_rows(tables, ids, strides, columns_a, mask_a, known) - mean - left) * rstd
        xhat_b = (_sum_rows(tables, ids, strides, columns_b, mask_b, known) - mean - left) * rstd
        if seed_ptr is not None:
            keys_m = row_keys(seed, rows)
            dy_a = dropped(dy_a, keys_m, keys_a, threshold, scale)
            dy_b = dropped(dy_b, keys_m, keys_b, threshold, scale)
        if partials_ptr is not None:
            dweight_a += dy_a * xhat_a
            dweight_b += dy_b * xhat_b
            dbias_a += dy_a
            dbias_b += dy_b
        if dtotal_ptr is not None:
            d_a, d_b = gradient(dy_a, dy_b, xhat_a, xhat_b, weight_a, weight_b, rstd, N)
            store_tile(dtotal_ptr, rows, N, columns_a, mask_a, d_a)
            store_tile(dtotal_ptr, rows, N, columns_b, mask_b, d_b)
            _store_keys(keys_ptr, rows, mask_m, word_ids, word_known & (word_ids != padding_idx), base_w)
            _store_keys(keys_ptr + T, rows, mask_m, type_ids, type_known, base_t)
            _store_keys(keys_ptr + 2 * T, rows, mask_m, position_ids, position_known, base_p)
    if partials_ptr is not None:
        store_partials(partials_ptr, columns_a, dweight_a, dbias_a, N)
        store_partials(partials_ptr, columns_b, dweight_b, dbias_b, N)


def embed_layer_norm_fwd(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None = None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """ids (T,) int32 or int64, contiguous; tables (V, N), (types, N), (P, N), columns contiguous -> y, mean, rstd.

    y is (T, N). mean (2, T) and rstd (T,) are fp32, None unless `training`; mean[1] is the rounding error of mean[0].
    `seed` is read if dropout_p is above 0.
    """
    T, N, device = ids[0].shape[0], weight.shape[0], weight.device
    y = torch.empty((T, N), dtype=tables[0].dtype, device=device)
    mean = torch.empty((2, T), dtype=torch.float32, device=device) if training else None
    rstd = torch.empty(T, dtype=torch.float32, device=device) if training else None
    if not y.numel():
        return y, mean, rstd
    tile = configs.layer_norm_forward(N, architecture.architecture(device), dropout=dropout_p > 0)
    with architecture.on_device(device):
        _embed_layer_norm_fwd_kernel[(programs_for(T, tile, device),)](
            *ids,
            *tables,
            weight,
            bias,
            seed if dropout_p else None,
            y,
            mean,
            rstd,
            *(table.stride(0) for table in tables),
            T,
            *(table.shape[0] for table in tables),
            dropout.threshold(dropout_p),
            1.0 / (1.0 - dropout_p),
            eps,
            N=N,
            ROWS=tile.rows,
            BLOCK_A=tile.block_a,
            BLOCK_B=tile.block_b,
            num_warps=tile.num_warps,
        )
    return y, mean, rstd


def embed_layer_norm_bwd(
    dy: Tensor,
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
    wanted: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """dy (T, N), columns contiguous, and the forward's inputs and saved tensors -> gradients of tables, weight, bias.

    Gradients that are not `wanted` are None. Row `padding_idx` of the word table's gradient is zero. The tables'
    gradients are slices of one tensor.
    """
    (T, N), device = dy.shape, dy.device
    wants_tables, wants_vectors = any(wanted[:3]), any(wanted[3:])
    sizes = [table.shape[0] for table in tables]
    bases, total = [], 0
    for size, want in zip(sizes, wanted, strict=False):
        bases.append(total if want else -1)
        total += size if want else 0
    tile = configs.layer_norm_bwd(N, architecture.architecture(device))
    programs = programs_for(T, tile, device)
    dtotal = torch.empty((T, N), dtype=tables[0].dtype, device=device) if wants_tables else None
    keys = torch.empty((3, T), dtype=torch.int32, device=device) if wants_tables else None
    partials = torch.empty((programs, 2, N), dtype=torch.float32, device=device) if wants_vectors else None
    if dy.numel() and (wants_tables or wants_vectors):
        with architecture.on_device(device):
            _embed_layer_norm_bwd_kernel[(programs,)](
                dy,
                *ids,
                *tables,
                weight,
                mean,
                rstd,
                seed if dropout_p else None,
                dtotal,
                keys,
                partials,
                dy.stride(0),
                *(table.stride(0) for table in tables),
                T,
                *sizes,
                *bases,
                -1 if padding_idx is None else padding_idx % sizes[0],
                dropout.threshold(dropout_p),
                1.0 / (1.0 - dropout_p),
                N=N,
                ROWS=tile.rows,
                BLOCK_A=tile.block_a,
                BLOCK_B=tile.block_b,
                num_warps=tile.num_warps,
            )
    dtables = [None, None, None]
    if wants_tables:  # one sort and one sum for all three tables, concatenated
        sorted_keys, order = torch.sort(keys.flatten(), stable=True)
        dtable = segment_sums(dtotal, order, sorted_keys, total)
        dtables = [dtable[b : b + size] if b >= 0 else None for b, size in zip(bases, sizes, strict=True)]
    dweight = dbias = None
    if wants_vectors:
        dweight, dbias = sum_partials(partials, weight.dtype, weight.dtype)
    return *dtables, dweight if wanted[3] else None, dbias if wanted[4] else None
