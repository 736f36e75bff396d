"""out = dropout(softmax(scale q k^T + bias)) v within each sequence of a packed row; flash attention, forward.

A program owns one tile of queries of one head of one sequence and walks that sequence's keys (Dao, 2023, algorithm
1): 4 L^2 D FLOPs per head; K and V are read L / BLOCK_M times, mostly from L2. Scores, their running maximum and sum,
and the output's accumulator are fp32; operands of products have the input's dtype. Logarithms and exponentials are base
2 throughout.

`statistics` of the softmax are saved for backward. In half precision they are one number per row, log2 of the sum of
2^score. Its absolute precision is that of the highest score: at scores of 1e4, probabilities would be off by 3e-4. So
fp32 has two numbers per row, the highest score and log2 of the sum of 2^(score - highest), and the highest score is
subtracted before scores are scaled to base 2. With a bias, scores are scaled to base e and have it before that.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert.kernels import architecture, configs, dropout
from fastbert.kernels.schedule import TileSchedule, tile_schedule

LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def load_rows(ptr, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """(len(rows), BLOCK_D) from row 0 at `ptr`, zeros beyond column D and, if MASKED, from row `limit` on.

    `rows` are int32 and count from the tile's first row, which `ptr` points at.
    """
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * stride + offs_d[None, :]
    if MASKED and D < BLOCK_D:
        x = tl.load(ptrs, mask=(rows[:, None] < limit) & (offs_d[None, :] < D), other=0.0)
    elif MASKED:
        x = tl.load(ptrs, mask=rows[:, None] < limit, other=0.0)
    elif D < BLOCK_D:
        x = tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def store_rows(ptr, x, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes x to the rows that `load_rows` with MASKED reads."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < limit
    if D < BLOCK_D:
        mask &= offs_d[None, :] < D
    tl.store(ptr + rows[:, None] * stride + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_biases(ptr, distance, keys, queries, reach):
    """The biases of distance + keys - queries, which broadcast; `ptr` points at that of 0.

    Beyond a sequence's end, that of the farthest.
    """
    distances = distance + keys - queries
    return tl.load(ptr + tl.minimum(tl.maximum(distances, 1 - reach), reach - 1))


@triton.jit
def seen(begins, rows, window, full, keys, BLOCK: tl.constexpr):
    """The keys within `window` of the rows from `begins` on, of `keys` of which `full` are in whole blocks.

    The first whole block's first key, the end of the whole blocks, and the end.
    """
    end = tl.minimum(begins + rows + window, keys)
    low = tl.maximum(begins - window, 0) // BLOCK * BLOCK
    return low, tl.minimum(tl.cdiv(end, BLOCK) * BLOCK, full), end


@triton.jit
def within_window(distance, keys, queries, window):
    """True where distance + keys - queries, which broadcast, is at most `window` either way."""
    apart = distance + keys - queries
    return (apart <= window) & (apart >= -window)


@triton.jit
def _attention_step(
    q,  # (BLOCK_M, BLOCK_D)
    top,  # (BLOCK_M,) highest score so far; scaled to base 2 except in fp32
    total,  # (BLOCK_M,) sum of 2^(score - top)
    acc,  # (BLOCK_M, BLOCK_D)
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
    seed,
    query_keys,
    threshold,
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
    else:
        k = qkv.load([first, k_column])
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_BIAS:
        scores = scores * (scale / _LOG2E) + load_biases(
            bias_ptr, distance, offs_n[None, :], tl.arange(0, q.shape[0])[:, None], reach
        )
        scale = _LOG2E
    if HAS_WINDOW:
        # A finite number: a query may see no key of a block before its first, and what it sums there the correction
        # makes 0.
        near = within_window(distance, offs_n[None, :], tl.arange(0, q.shape[0])[:, None], window)
        scores = tl.where(near & (offs_n[None, :] < left) if MASKED else near, scores, -1e30)
    elif MASKED:
        scores = tl.where(offs_n[None, :] < left, scores, float("-inf"))
    if q.dtype == tl.float32:
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2((scores - new_top[:, None]) * scale)
        correction = tl.exp2((top - new_top) * scale)
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])  # one fused multiply-add and one exponential per score
        correction = tl.exp2(top - new_top)
    total = total * correction + tl.sum(p, 1)
    if HAS_DROPOUT:
        keep = dropout.kept(query_keys[:, None], dropout.column_keys(seed, first + offs_n)[None, :], threshold)
        p = tl.where(keep, p, 0.0)
    if qkv is None or MASKED:
        v = load_rows(v_ptr + first.to(tl.int64) * stride, offs_n, stride, left, D, BLOCK_D, MASKED)
    else:
        v = qkv.load([first, v_column])
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["T", "reach", "window"])
def _attention_fwd_kernel(
    qkv_ptr,  # (T, 3, H, D)
    qkv,  # descriptor of the same in blocks of (BLOCK_N, D), or None
    out_ptr,  # (T, H, D)
    statistics_ptr,  # (2 or 1, H, T) fp32
    table_ptr,  # (slots, 4) of the schedule
    seed_ptr,  # (1,), not read unless HAS_DROPOUT
    bias_ptr,  # (H, 2 reach - 1), not read unless HAS_BIAS
    stride_qt,
    stride_qc,
    stride_qh,
    stride_ot,
    stride_oh,
    T,
    reach,
    window,  # keys farther than this from a query are left out; not read unless HAS_WINDOW
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
    offs_m = tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + h * stride_qh
    k_ptr = q_ptr + stride_qc
    v_ptr = k_ptr + stride_qc
    k_column = h * stride_qh + stride_qc
    v_column = k_column + stride_qc
    q = load_rows(q_ptr + tile * stride_qt, offs_m, stride_qt, rows - begins, D, BLOCK_D, True)
    seed = tile
    query_keys = offs_m
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        query_keys = dropout.row_keys(seed, tile + offs_m, h)

    if HAS_BIAS:
        bias_ptr += h * (2 * reach - 1) + reach - 1

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    low, high, end = 0, full, keys
    if HAS_WINDOW:
        low, high, end = seen(begins, BLOCK_M, window, full, keys, BLOCK_N)
    for n in range(low, high, BLOCK_N):
        top, total, acc = _attention_step(
            q, top, total, acc, qkv, k_ptr, v_ptr, k_column, v_column, stride_qt, start + n, BLOCK_N,
            scale * _LOG2E, bias_ptr, n - begins, reach, window, seed, query_keys, threshold, D, BLOCK_D, BLOCK_N,
            HAS_BIAS, HAS_WINDOW, HAS_DROPOUT, False, PRECISION,
        )  # fmt: skip
    if full < end:
        top, total, acc = _attention_step(
            q, top, total, acc, qkv, k_ptr, v_ptr, k_column, v_column, stride_qt, start + full, keys - full,
            scale * _LOG2E, bias_ptr, full - begins, reach, window, seed, query_keys, threshold, D, BLOCK_D, BLOCK_N,
            HAS_BIAS, HAS_WINDOW, HAS_DROPOUT, True, PRECISION,
        )  # fmt: skip

    # For a row without keys: zeros, and a highest score of infinity, which makes its probabilities 0 in the backward.
    some = total > 0
    out = acc * (keep_scale / tl.where(some, total, 1.0))[:, None]
    store_rows(out_ptr + tile * stride_ot + h * stride_oh, out, offs_m, stride_ot, rows - begins, D, BLOCK_D)
    top_ptr = statistics_ptr + h.to(tl.int64) * T + tile + offs_m
    log_total = tl.log2(tl.where(some, total, 1.0))
    if qkv_ptr.dtype.element_ty == tl.float32:
        log_total_ptr = top_ptr + tl.num_programs(1).to(tl.int64) * T
        tl.store(log_total_ptr, log_total, mask=offs_m < rows - begins)
    else:
        top += log_total
    tl.store(top_ptr, tl.where(some, top, float("inf")), mask=offs_m < rows - begins)


def attention_fwd(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    precision: str = "ieee",
    schedule: TileSchedule | None = None,
) -> tuple[Tensor, Tensor]:
    """qkv (T, 3, H, D) -> out (T, H, D), statistics (2 or 1, H, T) in fp32; rows of no sequence get zeros.

    Args:
        qkv: D at most 128 and contiguous; other strides are free.
        cu_seqlens: (B+1,) int32 or int64, from 0 to at most T.
        max_seqlen: at least the longest sequence; affects only the choice of tiles.
        scale: above 0.
        dropout_p: the share of probabilities dropped, as `seed` (1,) int64 decides.
        bias: (H, 2 reach - 1): column reach - 1 + key - query is added to the scaled score; reach at least the longest
            sequence.
        window: keys farther than this from a query are left out, and blocks without others skipped.
        precision: of fp32 products: `ieee` or `tf32`.
        schedule: `attention_schedule` of these sequences, if already computed.
    """
    T, _, H, D = qkv.shape
    out = torch.empty((T, H, D), dtype=qkv.dtype, device=qkv.device)
    statistics = torch.empty((statistics_per_row(qkv.dtype), H, T), dtype=torch.float32, device=qkv.device)
    if qkv.numel() == 0:
        return out, statistics
    arch = architecture.architecture(qkv.device)
    config = configs.attention(
        "fwd", arch, qkv.dtype, D, max_seqlen, plain=not dropout_p and bias is None and window is None
    )
    schedule = schedule or attention_schedule(qkv, cu_seqlens, max_seqlen)
    held = held_bias(bias)
    with architecture.on_device(qkv.device):
        _attention_fwd_kernel[(len(schedule.table), H)](
            qkv,
            descriptor(qkv, config.step) if config.tma and describable(qkv) else None,
            out,
            statistics,
            schedule.table,
            qkv if seed is None else seed,
            statistics if held is None else held,
            *qkv.stride()[:3],
            *out.stride()[:2],
            T,
            reach_of(held),
            0 if window is None else window,
            scale,
            dropout.threshold(dropout_p),
            1 / (1 - dropout_p),
            D=D,
            BLOCK_D=max(triton.next_power_of_2(D), 16),
            BLOCK_M=schedule.block,
            BLOCK_N=config.step,
            HAS_BIAS=bias is not None,
            HAS_WINDOW=window is not None,
            HAS_DROPOUT=dropout_p > 0,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, statistics


def held_bias(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernels read it."""
    return None if bias is None else bias.detach().float().contiguous()


def reach_of(bias: Tensor | None) -> int:
    return 0 if bias is None else (bias.shape[1] + 1) // 2


def statistics_per_row(dtype: torch.dtype) -> int:
    """The number of statistics per row that are saved for backward."""
    return 2 if dtype == torch.float32 else 1


def describable(x: Tensor) -> bool:
    """True if the tensor memory accelerator can read rows of x: it requires alignment to 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of x (T, ..., D), with which the tensor memory accelerator reads blocks of `rows` rows x D columns."""
    columns = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], [rows, x.shape[-1]])


def attention_schedule(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> TileSchedule:
    """The schedule of `attention_fwd` and `attention_bwd` for these sequences, the same for each layer."""
    T, _, _, D = qkv.shape
    arch = architecture.architecture(qkv.device)
    return tile_schedule(cu_seqlens, T, configs.attention_block(arch, qkv.dtype, D, max_seqlen))
