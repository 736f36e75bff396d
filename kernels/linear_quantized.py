"""y = act((A B^T) a b^T + bias) of int8 A and B with a scale a, b for each row; sums in int32.

2 M N K operations for (M + N) K bytes of operands and M N elements of y. Scales, bias and activation are applied to the
sums in registers: through torch._int_mm, int32 sums would cross the memory bus twice, 8 M N bytes beside 2 M N of y,
which at K = 1024 takes longer than the product. An H200's tensor cores do 1,979 Tera-operations a second; the tiles
are those of 16 bits with twice as many columns a step, the same bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert.kernels import architecture, configs
from fastbert.kernels.activation import activate
from fastbert.kernels.linear import GROUP_M, corner, store


@triton.jit
def _finish(
    sums,  # (BLOCK_M, a part of BLOCK_N), whose first row and column are first_m and first_n
    first_m,
    first_n,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    y,
    stride_ym,
    M,
    N,
    DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Scales, bias, activation, store."""
    offs_m, offs_n = first_m + tl.arange(0, sums.shape[0]), first_n + tl.arange(0, sums.shape[1])
    EXACT: tl.constexpr = DTYPE.primitive_bitwidth == 32
    z = sums.to(tl.float32) * tl.load(a_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    z *= tl.load(b_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    store(activate(z, ACTIVATION, EXACT).to(DTYPE), y, stride_ym, first_m, first_n, M, N, TMA)


@triton.jit(do_not_specialize=["M"])
def _linear_quantized_fwd_kernel(
    a,  # (M, P): a pointer, or a descriptor of (BLOCK_M, BLOCK_K) if TMA
    b,  # (N, P): a pointer, or a descriptor of (BLOCK_N, BLOCK_K) if TMA
    a_scale_ptr,  # (M,)
    b_scale_ptr,  # (N,)
    bias_ptr,  # (N,), read if HAS_BIAS
    y,  # (M, N): likewise, of (BLOCK_M, BLOCK_N / PARTS)
    stride_ym,
    M,
    N,
    P,  # a multiple of BLOCK_K
    DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Flattened, the loads of the next tile's first steps are in flight while this one is stored.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=TMA):
        tile_m, tile_n = corner(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        if TMA:
            for step in range(P // BLOCK_K):
                left, right = a.load([first_m, step * BLOCK_K]), b.load([first_n, step * BLOCK_K])
                sums = tl.dot(left, right.T, sums, out_dtype=tl.int32)
        else:
            offs_k = tl.arange(0, BLOCK_K)
            # Rows past the end read the last one, and are not stored.
            rows_a = tl.minimum(first_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
            rows_b = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            a_ptrs = a + rows_a[:, None] * P + offs_k[None, :]
            b_ptrs = b + rows_b[None, :] * P + offs_k[:, None]
            for _ in range(P // BLOCK_K):
                sums = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), sums, out_dtype=tl.int32)
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K

        scales = a_scale_ptr, b_scale_ptr
        if PARTS == 1:
            _finish(sums, first_m, first_n, *scales, bias_ptr, y, stride_ym, M, N, DTYPE, ACTIVATION, HAS_BIAS, TMA)
        else:  # in halves, as whole it would not fit in the registers
            left, right = tl.split(sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            _finish(left, first_m, first_n, *scales, bias_ptr, y, stride_ym, M, N, DTYPE, ACTIVATION, HAS_BIAS, TMA)
            first_n += BLOCK_N // 2
            _finish(right, first_m, first_n, *scales, bias_ptr, y, stride_ym, M, N, DTYPE, ACTIVATION, HAS_BIAS, TMA)


_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def linear_quantized_fwd(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    *,
    tile: configs.LinearTile | None = None,
) -> Tensor:
    """act(a b^T a_scale b_scale^T + bias) in `dtype`: (M, N) of what `quantize_rows_fwd` made of x and the weight.

    a (M, P), b (N, P) int8, a_scale (M,) and b_scale (N,) fp32, bias (N,) of any type.
    """
    (M, P), N = a.shape, b.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    if not y.numel():
        return y
    arch, multiprocessors = architecture.architecture(a.device), architecture.multiprocessors(a.device)
    tile = tile or configs.linear(M, N, arch, 2, multiprocessors)
    block_k = configs.quantized_columns(tile)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    operands = (a, b, y)
    tma = arch == "sm_90" and N * y.element_size() % 16 == 0
    if tma:
        blocks = ((tile.block_m, block_k), (tile.block_n, block_k), (tile.block_m, tile.block_n // tile.parts))
        operands = [TensorDescriptor.from_tensor(t, list(block)) for t, block in zip(operands, blocks, strict=True)]
    with architecture.on_device(a.device):
        _linear_quantized_fwd_kernel[(min(tiles, tile.resident * multiprocessors) if tma else tiles,)](
            *operands[:2],
            a_scale,
            b_scale,
            b_scale if bias is None else bias,
            operands[2],
            N,
            M,
            N,
            P,
            DTYPE=_DTYPES[dtype],
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            TMA=tma,
            GROUP_M=GROUP_M,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=block_k,
            PARTS=tile.parts,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y
