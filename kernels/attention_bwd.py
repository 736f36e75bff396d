"""dqkv of attention, by kernels that own their outputs: no atomics, a fixed order of every sum.

With P = 2^(scores - highest - log2 of the row's sum), keep = dropout mask / (1 - p), and delta = rowsum(dout * out),
which holds with dropout too (Dao et al., 2022, appendix B; Dao, 2023, algorithm 2):

    dV = (keep P)^T dout    dP = keep (dout V^T)    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

The dQ kernel owns queries and walks keys: it computes S, dP, dQ, and also delta. The dK/dV kernel owns keys and walks
queries: S^T, dP^T, dV, dK. That is 7 products of 2 L^2 D FLOPs per head instead of 5: S and dP are computed twice, so
that dQ needs no atomics. Where every sequence fits into one tile of keys, the dK/dV kernel has all terms of dQ: if
registers allow, it writes dQ too, with 5 products in one launch. P and dS are rounded to the input's dtype for their
products; all else is fp32.

A bias's gradient is the sum of dS over each diagonal. The dQ kernel, which then runs even where one launch would do,
moves each row of a tile of dS so that diagonals are columns, and adds their sums to a row of its own; another kernel
adds up those rows, tile by tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs, dropout
from fastbert.kernels.attention import (
    LOG2E,
    attention_schedule,
    describable,
    descriptor,
    held_bias,
    load_biases,
    load_rows,
    reach_of,
    seen,
    store_rows,
    within_window,
)
from fastbert.kernels.schedule import TileSchedule

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _load_statistics(ptr, apart, rows, left, dtype: tl.constexpr, MASKED: tl.constexpr):
    """The forward's statistics of rows of one head; the two numbers of a row (one in half precision) are `apart`
    elements apart. Rows beyond the sequence get values that make their probabilities 0."""
    top = tl.load(ptr + rows, mask=rows < left, other=float("inf")) if MASKED else tl.load(ptr + rows)
    log_total = top
    if dtype == tl.float32:
        log_total = tl.load(ptr + apart + rows, mask=rows < left, other=0.0)
    return top, log_total


@triton.jit
def _probabilities(scores, top, log_total, scale, dtype: tl.constexpr):
    """2^(scores - top - log_total), with statistics that broadcast to scores."""
    return tl.exp2((scores - top) * scale - log_total if dtype == tl.float32 else scores * scale - top)


@triton.jit
def _dq_step(
    q,  # (BLOCK_M, BLOCK_D)
    dout,  # (BLOCK_M, BLOCK_D)
    top,  # (BLOCK_M,)
    log_total,  # (BLOCK_M,)
    delta,  # (BLOCK_M,)
    dq,  # (BLOCK_M, BLOCK_D)
    qkv,  # descriptor of the rows, or None
    k_ptr,
    v_ptr,
    k_column,  # where the head's keys begin in a row
    v_column,
    stride,
    first,  # packed row of the block's first key
    left,  # keys from there to the sequence's end
    scale,  # in base 2
    bias_ptr,  # the head's bias at distance 0, not read unless HAS_BIAS
    distance,  # of the block's first key from the first query
    reach,
    window,  # not read unless HAS_WINDOW
    dbias_ptr,  # (BLOCK_M + BLOCK_N - 1,): sums of dS over the block's diagonals are added
    seed,
    query_keys,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    if qkv is None or MASKED:
        k = load_rows(k_ptr + first.to(tl.int64) * stride, offs_n, stride, left, D, BLOCK_D, MASKED)
        v = load_rows(v_ptr + first.to(tl.int64) * stride, offs_n, stride, left, D, BLOCK_D, MASKED)
    else:
        k = qkv.load([first, k_column])
        v = qkv.load([first, v_column])
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_BIAS:
        scores = scores * (scale / _LOG2E) + load_biases(
            bias_ptr, distance, offs_n[None, :], tl.arange(0, q.shape[0])[:, None], reach
        )
        scale = _LOG2E
    if MASKED:
        scores = tl.where(offs_n[None, :] < left, scores, float("-inf"))
    p = _probabilities(scores, top[:, None], log_total[:, None], scale, q.dtype)
    if HAS_WINDOW:
        p = tl.where(within_window(distance, offs_n[None, :], tl.arange(0, q.shape[0])[:, None], window), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = dropout.kept(query_keys[:, None], dropout.column_keys(seed, first + offs_n)[None, :], threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if HAS_BIAS:
        _add_diagonals(dbias_ptr, ds, q.shape[0], BLOCK_N)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _add_diagonals(ptr, x, M: tl.constexpr, N: tl.constexpr):
    """Adds the sums of x (M, N) over its diagonals to those at ptr: M - 1 + column - row."""
    places = tl.arange(0, 2 * M if M > N else 2 * N)
    columns = places[None, :] - (M - 1) + tl.arange(0, M)[:, None]
    inside = (columns >= 0) & (columns < N)
    moved = tl.gather(x, tl.where(inside, columns, 0), 1)
    sums = tl.sum(tl.where(inside, moved, 0.0), 0)
    there = places < M + N - 1
    tl.store(ptr + places, tl.load(ptr + places, mask=there, other=0.0) + sums, mask=there)
    tl.debug_barrier()  # the next block's diagonals overlap with these


@triton.jit(do_not_specialize=["slots", "width", "reach"])
def _dbias_kernel(
    parts_ptr,  # (slots, H, width): at BLOCK_M - 1 + key - the tile's first query, for each tile of queries
    table_ptr,  # (slots, 4) of the schedule
    dbias_ptr,  # (H, 2 reach - 1)
    slots,
    width,
    reach,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for slot in range(slots):
        rows, begins = tl.load(table_ptr + slot * 4 + 1), tl.load(table_ptr + slot * 4 + 3)
        places = columns - (reach - 1) + begins + BLOCK_M - 1
        mask = (places >= 0) & (places < width) & (rows > 0)
        part = (slot * tl.num_programs(0) + h).to(tl.int64) * width
        sums += tl.load(parts_ptr + part + places, mask=mask, other=0.0)
    tl.store(dbias_ptr + h * (2 * reach - 1) + columns, sums, mask=columns < 2 * reach - 1)


@triton.jit(do_not_specialize=["T", "reach", "window", "width"])
def _attention_bwd_dq_kernel(
    qkv_ptr,  # (T, 3, H, D)
    qkv,  # descriptor of the same in blocks of (BLOCK_N, D), or None
    out_ptr,  # (T, H, D)
    dout_ptr,  # (T, H, D)
    statistics_ptr,  # (2 or 1, H, T) fp32
    delta_ptr,  # (H, T) fp32, written
    dqkv_ptr,  # (T, 3, H, D), of which dq is written
    table_ptr,  # (slots, 4) of the schedule
    seed_ptr,  # (1,), not read unless HAS_DROPOUT
    bias_ptr,  # (H, 2 reach - 1), not read unless HAS_BIAS
    dbias_ptr,  # (slots, H, width) of zeros, written if HAS_BIAS
    stride_qt,
    stride_qc,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
    T,
    reach,
    window,  # not read unless HAS_WINDOW
    width,
    scale,
    threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    entry = table_ptr + tl.program_id(0) * 4
    start, rows, keys, begins = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    if rows == 0:
        return
    h = tl.program_id(1)
    tile = (start + begins).to(tl.int64)
    rows -= begins
    offs_m = tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + h * stride_qh
    k_ptr = q_ptr + stride_qc
    v_ptr = k_ptr + stride_qc
    k_column = h * stride_qh + stride_qc
    v_column = k_column + stride_qc
    out = load_rows(out_ptr + tile * stride_ot + h * stride_oh, offs_m, stride_ot, rows, D, BLOCK_D, True)
    dout = load_rows(dout_ptr + tile * stride_dot + h * stride_doh, offs_m, stride_dot, rows, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    head = h.to(tl.int64) * T + tile
    tl.store(delta_ptr + head + offs_m, delta, mask=offs_m < rows)
    apart = tl.num_programs(1).to(tl.int64) * T
    top, log_total = _load_statistics(statistics_ptr + head, apart, offs_m, rows, qkv_ptr.dtype.element_ty, True)
    q = load_rows(q_ptr + tile * stride_qt, offs_m, stride_qt, rows, D, BLOCK_D, True)
    seed = tile
    query_keys = offs_m
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        query_keys = dropout.row_keys(seed, tile + offs_m, h)

    if HAS_BIAS:
        bias_ptr += h * (2 * reach - 1) + reach - 1
        dbias_ptr += (tl.program_id(0) * tl.num_programs(1) + h).to(tl.int64) * width

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    low, high, end = 0, full, keys
    if HAS_WINDOW:
        low, high, end = seen(begins, BLOCK_M, window, full, keys, BLOCK_N)
    for n in range(low, high, BLOCK_N):
        dq = _dq_step(
            q, dout, top, log_total, delta, dq, qkv, k_ptr, v_ptr, k_column, v_column, stride_qt, start + n, BLOCK_N,
            scale * _LOG2E, bias_ptr, n - begins, reach, window, dbias_ptr + n, seed, query_keys, threshold, keep_scale,
            D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_WINDOW, HAS_DROPOUT, False, PRECISION,
        )  # fmt: skip
    if full < end:
        dq = _dq_step(
            q, dout, top, log_total, delta, dq, qkv, k_ptr, v_ptr, k_column, v_column, stride_qt, start + full,
            keys - full, scale * _LOG2E, bias_ptr, full - begins, reach, window, dbias_ptr + full, seed, query_keys,
            threshold, keep_scale, D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_WINDOW, HAS_DROPOUT, True, PRECISION,
        )  # fmt: skip
    store_rows(dqkv_ptr + tile * stride_dqt + h * stride_dqh, dq * scale, offs_m, stride_dqt, rows, D, BLOCK_D)


@triton.jit
def _dkdv_step(
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_D)
    dk,  # (BLOCK_N, BLOCK_D)
    dv,  # (BLOCK_N, BLOCK_D)
    qkv,  # descriptor of the rows, or None
    douts,  # descriptor of the rows of dout, or None
    q_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    q_column,  # where the head's queries begin in a row
    dout_column,
    statistics_ptr,  # the head's
    apart,  # distance between the two statistics of a row
    delta_ptr,
    stride_q,
    stride_o,
    stride_do,
    stride_dq,
    keys,  # keys of the tile within the sequence
    first,  # packed row of the block's first query
    left,  # queries from there to the sequence's end
    scale,  # in base 2
    bias_ptr,  # the head's bias at distance 0, not read unless HAS_BIAS
    distance,  # of the first key from the block's first query
    reach,
    window,  # not read unless HAS_WINDOW
    seed,
    plane,
    key_keys,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WITH_DQ: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    row = first.to(tl.int64)
    if qkv is None or MASKED:
        q = load_rows(q_ptr + row * stride_q, offs_m, stride_q, left, D, BLOCK_D, MASKED)
        dout = load_rows(dout_ptr + row * stride_do, offs_m, stride_do, left, D, BLOCK_D, MASKED)
    else:
        q = qkv.load([first, q_column])
        dout = douts.load([first, dout_column])
    top, log_total = _load_statistics(statistics_ptr + row, apart, offs_m, left, q.dtype, MASKED)
    if WITH_DQ:
        out = load_rows(out_ptr + row * stride_o, offs_m, stride_o, left, D, BLOCK_D, MASKED)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    elif MASKED:
        delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < left, other=0.0)
    else:
        delta = tl.load(delta_ptr + row + offs_m)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if HAS_BIAS:
        scores = scores * (scale / _LOG2E) + load_biases(
            bias_ptr, distance, tl.arange(0, k.shape[0])[:, None], offs_m[None, :], reach
        )
        p = _probabilities(scores, top[None, :], log_total[None, :], _LOG2E, q.dtype)
    else:
        p = _probabilities(scores, top[None, :], log_total[None, :], scale, q.dtype)
    if HAS_WINDOW:
        p = tl.where(within_window(distance, tl.arange(0, k.shape[0])[:, None], offs_m[None, :], window), p, 0.0)
    if WITH_DQ:  # a key beyond the sequence scores 0, maybe far above the others: its p may be inf, and inf * 0 NaN
        if q.dtype == tl.float32:
            p = tl.where((tl.arange(0, k.shape[0]) < keys)[:, None], p, 0.0)
        else:  # saves a register: bf16 with D = 64 spilled on sm_90
            p = tl.minimum(p, 1.0)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = dropout.kept(dropout.row_keys(seed, row + offs_m, plane)[None, :], key_keys[:, None], threshold)
        dv = tl.dot(tl.where(keep, p, 0.0).to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if WITH_DQ:
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * (scale / _LOG2E)
        store_rows(dq_ptr + row * stride_dq, dq, offs_m, stride_dq, left, D, BLOCK_D)
    return dk, dv


@triton.jit(do_not_specialize=["T", "reach", "window"])
def _attention_bwd_dkdv_kernel(
    qkv_ptr,  # (T, 3, H, D)
    qkv,  # descriptor of the same in blocks of (BLOCK_M, D), or None
    out_ptr,  # (T, H, D), not read unless WITH_DQ
    dout_ptr,  # (T, H, D)
    douts,  # descriptor of the same in blocks of (BLOCK_M, D), or None
    statistics_ptr,  # (2 or 1, H, T) fp32
    delta_ptr,  # (H, T) fp32, not read if WITH_DQ
    dqkv_ptr,  # (T, 3, H, D), of which dk and dv are written, and dq if WITH_DQ
    table_ptr,  # (slots, 4) of the schedule
    seed_ptr,  # (1,), not read unless HAS_DROPOUT
    bias_ptr,  # (H, 2 reach - 1), not read unless HAS_BIAS
    stride_qt,
    stride_qc,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqc,
    stride_dqh,
    T,
    reach,
    window,  # not read unless HAS_WINDOW
    scale,
    threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WITH_DQ: tl.constexpr,  # the tile has all keys of its sequence
    PRECISION: tl.constexpr,
):
    entry = table_ptr + tl.program_id(0) * 4
    start, rows, queries, begins = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    if rows == 0:
        return
    h = tl.program_id(1)
    tile = (start + begins).to(tl.int64)
    rows -= begins
    offs_n = tl.arange(0, BLOCK_N)
    q_ptr = qkv_ptr + h * stride_qh
    k_ptr = q_ptr + stride_qc + tile * stride_qt
    k = load_rows(k_ptr, offs_n, stride_qt, rows, D, BLOCK_D, True)
    v = load_rows(k_ptr + stride_qc, offs_n, stride_qt, rows, D, BLOCK_D, True)
    out_ptr += h * stride_oh
    dout_ptr += h * stride_doh
    dq_ptr = dqkv_ptr + h * stride_dqh
    statistics_ptr += h.to(tl.int64) * T
    apart = tl.num_programs(1).to(tl.int64) * T
    delta_ptr += h.to(tl.int64) * T
    seed, key_keys = tile, offs_n
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        key_keys = dropout.column_keys(seed, start + begins + offs_n)

    if HAS_BIAS:
        bias_ptr += h * (2 * reach - 1) + reach - 1

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    full = queries // BLOCK_M * BLOCK_M
    low, high, end = 0, full, queries
    if HAS_WINDOW:
        low, high, end = seen(begins, BLOCK_N, window, full, queries, BLOCK_M)
    for m in range(low, high, BLOCK_M):
        dk, dv = _dkdv_step(
            k, v, dk, dv, qkv, douts, q_ptr, out_ptr, dout_ptr, dq_ptr, h * stride_qh, h * stride_doh,
            statistics_ptr, apart, delta_ptr, stride_qt, stride_ot, stride_dot, stride_dqt, rows, start + m, BLOCK_M,
            scale * _LOG2E, bias_ptr, begins - m, reach, window, seed, h, key_keys, threshold, keep_scale, D, BLOCK_D,
            BLOCK_M, HAS_BIAS, HAS_WINDOW, HAS_DROPOUT, WITH_DQ, False, PRECISION,
        )  # fmt: skip
    if full < end:
        dk, dv = _dkdv_step(
            k, v, dk, dv, qkv, douts, q_ptr, out_ptr, dout_ptr, dq_ptr, h * stride_qh, h * stride_doh,
            statistics_ptr, apart, delta_ptr, stride_qt, stride_ot, stride_dot, stride_dqt, rows, start + full,
            queries - full, scale * _LOG2E, bias_ptr, begins - full, reach, window, seed, h, key_keys, threshold,
            keep_scale, D, BLOCK_D, BLOCK_M, HAS_BIAS, HAS_WINDOW, HAS_DROPOUT, WITH_DQ, True, PRECISION,
        )  # fmt: skip
    if HAS_DROPOUT:
        dv *= keep_scale
    if WITH_DQ and queries == 0:  # rows of no sequence: their dQ is zero, as dk is
        store_rows(dq_ptr + tile * stride_dqt, dk, offs_n, stride_dqt, rows, D, BLOCK_D)
    dk_ptr = dqkv_ptr + tile * stride_dqt + h * stride_dqh + stride_dqc
    store_rows(dk_ptr, dk * scale, offs_n, stride_dqt, rows, D, BLOCK_D)
    store_rows(dk_ptr + stride_dqc, dv, offs_n, stride_dqt, rows, D, BLOCK_D)


def attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    window: int | None = None,
    precision: str = "ieee",
    schedule: TileSchedule | None = None,
) -> Tensor:
    """dout (T, H, D), its last dimension contiguous, and `attention_fwd`'s inputs and outputs -> dqkv (T, 3, H, D).

    Rows of no sequence get zeros, even if `dout` has others. `dbias`, fp32 of the shape of the bias, is written.
    """
    assert dbias is None or dbias.is_contiguous()
    T, _, H, D = qkv.shape
    dqkv = torch.empty((T, 3, H, D), dtype=qkv.dtype, device=qkv.device)
    if qkv.numel() == 0:
        return dqkv
    arch = architecture.architecture(qkv.device)
    schedule = schedule or attention_schedule(qkv, cu_seqlens, max_seqlen)
    one_launch = bias is None and configs.attention_in_one_launch(arch, qkv.dtype, D, max_seqlen)
    held, reach = held_bias(bias), reach_of(bias)
    biases = statistics if held is None else held
    delta = statistics[0] if one_launch else torch.empty_like(statistics[0])
    grid, seeds = (len(schedule.table), H), qkv if seed is None else seed
    strides = *qkv.stride()[:3], *out.stride()[:2], *dout.stride()[:2]
    constants = {
        **{"T": T, "reach": reach, "scale": scale, "D": D, "HAS_BIAS": bias is not None},
        **{"window": 0 if window is None else window, "HAS_WINDOW": window is not None},
        "threshold": dropout.threshold(dropout_p),
        "keep_scale": 1 / (1 - dropout_p),
        "BLOCK_D": max(triton.next_power_of_2(D), 16),
        "HAS_DROPOUT": dropout_p > 0,
        "PRECISION": precision,
    }
    with architecture.on_device(qkv.device):
        if not one_launch:
            config = configs.attention("dq", arch, qkv.dtype, D, max_seqlen)
            # Behind the last key, for whole blocks of keys, and before the first, for the tile's last query.
            width = triton.cdiv(max_seqlen, config.step) * config.step + schedule.block - 1
            parts = statistics if dbias is None else statistics.new_zeros((*grid, width))
            _attention_bwd_dq_kernel[grid](
                qkv,
                descriptor(qkv, config.step) if config.tma and describable(qkv) else None,
                out,
                dout,
                statistics,
                delta,
                dqkv,
                schedule.table,
                seeds,
                biases,
                parts,
                *strides,
                *dqkv.stride()[::2],
                width=width,
                BLOCK_M=schedule.block,
                BLOCK_N=config.step,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **constants,
            )
            if dbias is not None:
                _dbias_kernel[(H, triton.cdiv(dbias.shape[1], 128))](
                    *(parts, schedule.table, dbias, len(schedule.table), width, reach),
                    BLOCK_M=schedule.block,
                    BLOCK=128,
                )
        config = configs.attention("dkdv", arch, qkv.dtype, D, max_seqlen)
        tma = config.tma and describable(qkv) and describable(dout)
        _attention_bwd_dkdv_kernel[grid](
            qkv,
            descriptor(qkv, config.step) if tma else None,
            out,
            dout,
            descriptor(dout, config.step) if tma else None,
            statistics,
            delta,
            dqkv,
            schedule.table,
            seeds,
            biases,
            *strides,
            *dqkv.stride()[:3],
            BLOCK_N=schedule.block,
            BLOCK_M=config.step,
            WITH_DQ=one_launch,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **constants,
        )
    return dqkv
