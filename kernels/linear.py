"""y = act(x W^T + b), forward and backward: cuBLAS and an activation kernel, or one fused kernel.

2 M N K FLOPs for (M K + N K + M N) elements, and M N more if z = x W^T + b is saved for backward. With cuBLAS, 2 M N
more elements are moved, which at K = 768 takes over 40 % of the product's time on an H200; the fused kernel executes
about 20 instructions per element after a tile's last step. Which is faster depends on the shape: see `linear_table`.
Sums are fp32. fp32 products, and the backward, always use cuBLAS, with the precision of torch.backends.cuda.matmul.

int8 is the same kernel on 8-bit operands with a scale per row: sums in int32, to which scales, bias and activation are
applied in registers. With torch._int_mm, int32 sums would cross the memory bus twice, 8 M N bytes where y has 2 M N,
which at K = 1024 takes longer than the product. An H200's tensor cores do 1,979 TOPS. The tiles are those of 16 bits
with twice as many columns per step, which are the same bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert.kernels import architecture, configs, linear_table
from fastbert.kernels.activation import activate, activation_bwd, activation_fwd, column_sum

GROUP_M = 8  # rows of tiles computed together, so that their x stays in the L2 cache


@triton.jit
def corner(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of tile number `tile`: down GROUP_M rows, then one column to the right."""
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _finish(
    sums,  # (BLOCK_M, BLOCK_N / PARTS), from row first_m and column first_n
    first_m,
    first_n,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    y,
    z,
    stride_ym,
    M,
    N,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
):
    """The epilogue: applies scales, bias and activation, and stores."""
    dtype: tl.constexpr = y.dtype if TMA else y.dtype.element_ty
    offs_n = first_n + tl.arange(0, sums.shape[1])
    if x_scale_ptr is not None:
        offs_m = first_m + tl.arange(0, sums.shape[0])
        sums = sums.to(tl.float32) * tl.load(x_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
        sums *= tl.load(weight_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if z is not None:  # y is computed from the rounded z, as the backward reads it
        rounded = sums.to(dtype)
        store(rounded, z, stride_ym, first_m, first_n, M, N, TMA)
        sums = rounded.to(tl.float32)
    store(activate(sums, ACTIVATION, dtype == tl.float32).to(dtype), y, stride_ym, first_m, first_n, M, N, TMA)


@triton.jit
def store(block, y, stride_ym, first_m, first_n, M, N, TMA: tl.constexpr):
    if TMA:
        y.store([first_m, first_n], block)
    else:
        offs_m = first_m.to(tl.int64) + tl.arange(0, block.shape[0])
        offs_n = first_n + tl.arange(0, block.shape[1])
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(y + offs_m[:, None] * stride_ym + offs_n[None, :], block, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _linear_fwd_kernel(
    x,  # (M, K): a pointer, or a descriptor of (BLOCK_M, BLOCK_K) if TMA
    weight,  # (N, K): a pointer, or a descriptor of (BLOCK_N, BLOCK_K) if TMA
    x_scale_ptr,  # (M,) fp32 for x and weight in int8, else None
    weight_scale_ptr,  # (N,) fp32
    bias_ptr,  # (N,), or None
    y,  # (M, N): as above, of (BLOCK_M, BLOCK_N / PARTS)
    z,  # (M, N): as above, or None
    stride_xm,
    stride_wn,
    stride_ym,  # of z too
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Flattened, so that the next tile's first loads are in flight while this one is stored.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=TMA):
        tile_m, tile_n = corner(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        dtype: tl.constexpr = tl.float32 if x_scale_ptr is None else tl.int32
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
        if TMA:
            for step in range(tl.cdiv(K, BLOCK_K)):
                a = x.load([first_m, step * BLOCK_K])
                b = weight.load([first_n, step * BLOCK_K])
                sums = tl.dot(a, b.T, sums, input_precision="ieee", out_dtype=dtype)
        else:
            offs_k = tl.arange(0, BLOCK_K)
            # Rows past the end load the last row, and are not stored.
            rows_x = tl.minimum(first_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
            rows_w = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            a_ptrs = x + rows_x[:, None] * stride_xm + offs_k[None, :]
            b_ptrs = weight + rows_w[None, :] * stride_wn + offs_k[:, None]
            for step in range(tl.cdiv(K, BLOCK_K)):
                if EVEN_K:
                    a, b = tl.load(a_ptrs), tl.load(b_ptrs)
                else:
                    left = offs_k < K - step * BLOCK_K
                    a = tl.load(a_ptrs, mask=left[None, :], other=0.0)
                    b = tl.load(b_ptrs, mask=left[:, None], other=0.0)
                sums = tl.dot(a, b, sums, input_precision="ieee", out_dtype=dtype)
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K

        scales = x_scale_ptr, weight_scale_ptr
        if PARTS == 1:
            _finish(sums, first_m, first_n, *scales, bias_ptr, y, z, stride_ym, M, N, ACTIVATION, TMA)
        else:  # in halves: a whole tile would not fit in the registers
            left, right = tl.split(sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            _finish(left, first_m, first_n, *scales, bias_ptr, y, z, stride_ym, M, N, ACTIVATION, TMA)
            first_n += BLOCK_N // 2
            _finish(right, first_m, first_n, *scales, bias_ptr, y, z, stride_ym, M, N, ACTIVATION, TMA)


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """act(x weight^T + bias) of x (M, K), weight (N, K), bias (N,), and if `keep_z` the activation's input z (M, N).

    z is None without an activation.
    """
    keep_z = keep_z and activation is not None
    tile = _choice(x, weight, activation, keep_z)
    if tile is not None:
        return linear_fused_fwd(x, weight, bias, activation, keep_z, tile=tile)
    z = F.linear(x, weight, bias)
    if activation is None:
        return z, None
    return activation_fwd(z, activation, None if keep_z else z), z if keep_z else None


def _choice(x: Tensor, weight: Tensor, activation: str | None, keep_z: bool) -> configs.LinearTile | None:
    """The tile of the fused kernel, or None for cuBLAS."""
    if activation is None or x.dtype == torch.float32 or not x.numel():
        return None
    (M, K), N = x.shape, weight.shape[0]
    if not (_on_16_bytes(x) and _on_16_bytes(weight)) or N % 8:  # per-element pointers leave no registers for sums
        return None
    arch = architecture.architecture(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    row = linear_table.find(arch, dtype, M, N, K, activation, keep_z)
    if row is not None:
        return row.tile
    if M > linear_table.FUSED_ROWS:
        return None
    return configs.linear(M, N, arch, architecture.multiprocessors(x.device))


def linear_fused_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    keep_z: bool = False,
    *,
    tile: configs.LinearTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`linear_fwd` by the fused kernel, without the table; columns of x and weight contiguous."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if keep_z else None
    _launch(x, weight, (None, None), bias, y, z, activation, tile)
    return y, z


def linear_quantized_fwd(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    *,
    tile: configs.LinearTile | None = None,
) -> Tensor:
    """act(x weight^T x_scale weight_scale^T + bias), (M, N) in `dtype`, of operands from `quantize_rows_fwd`.

    x (M, P), weight (N, P) int8, x_scale (M,) and weight_scale (N,) fp32, bias (N,) of any type.
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    _launch(x, weight, (x_scale, weight_scale), bias, y, None, activation, tile)
    return y


def _launch(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    activation: str | None,
    tile: configs.LinearTile | None,
) -> None:
    """Fills y, and z unless it is None."""
    if not y.numel():
        return
    (M, N), K = y.shape, x.shape[1]
    arch, multiprocessors = architecture.architecture(x.device), architecture.multiprocessors(x.device)
    tile = tile or configs.linear(M, N, arch, multiprocessors)
    block_k = tile.block_k if scales[0] is None else configs.quantized_columns(tile)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    operands = [x, weight, y, z]
    tma = arch == "sm_90" and all(_on_16_bytes(t) for t in operands if t is not None)
    if tma:
        stored = [tile.block_m, tile.block_n // tile.parts]
        blocks = ([tile.block_m, block_k], [tile.block_n, block_k], stored, stored)
        operands = [
            t if t is None else TensorDescriptor.from_tensor(t, block)
            for t, block in zip(operands, blocks, strict=True)
        ]
    with architecture.on_device(x.device):
        _linear_fwd_kernel[(min(tiles, tile.resident * multiprocessors) if tma else tiles,)](
            *operands[:2],
            *scales,
            None if bias is None else bias.contiguous(),
            *operands[2:],
            x.stride(0),
            weight.stride(0),
            y.stride(0),
            M,
            N,
            K,
            ACTIVATION=activation,
            TMA=tma,
            EVEN_K=K % block_k == 0,
            GROUP_M=GROUP_M,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=block_k,
            PARTS=tile.parts,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _on_16_bytes(t: Tensor) -> bool:
    """True if rows of t are contiguous and aligned to 16 bytes, as vector loads and descriptors require."""
    return t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(0) > 0


def linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    z: Tensor | None,
    activation: str | None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x (M, K), weight (N, K) and bias (N,), None where not `wanted`; z as returned by `linear_fwd`.

    x is read for dweight only, weight for dx only. With dz = dy act'(z), dx = dz W and dW = dz^T x use cuBLAS; the
    kernel that computes dz also sums it in fp32 for the bias.
    """
    want_x, want_weight, want_bias = wanted
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    if activation is None:
        dz, dbias = dy, column_sum(dy) if want_bias else None
    else:
        dz, dbias = activation_bwd(dy, z, activation, sums=want_bias)
    dx = torch.mm(dz, weight) if want_x else None
    dweight = torch.mm(dz.T, x) if want_weight else None
    return dx, dweight, dbias
