"""y = act(z), dz = dy act'(z), the same of gated halves, and the bias gradient, the sums of dz over its rows: the steps
next to cuBLAS products.

Memory-bound: the forward moves 2 M N elements, the backward 3 M N and very little for the sums. Each program sums its
rows of a strip of columns in fp32, and a second launch adds those sums in the order of the rows, without atomics.
All arithmetic is fp32; dz is summed before it is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh")


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(z):
    """z Phi(z) = (z + |z| E(|z|)) / 2 for 16 bits, E(a) = erf(a / sqrt 2) up to 5 as a times a polynomial of a^2.

    The error is at most 2e-6, a hundredth of fp16's rounding error, in 18 instructions. With the library's erf it takes
    62: longer than the product in an epilogue, and longer than the memory traffic in a separate kernel. The
    coefficients are a minimax fit (Lawson's iteration) that is 1 at a = 5, in v = 2 a^2 / 25 - 1, where no digits
    cancel.
    """
    a = tl.minimum(tl.abs(z), 5.0)
    v = 0.08 * a * a - 1.0
    q = -0.0020896653
    q = q * v + 0.0063474956
    q = q * v - 0.008015871
    q = q * v + 0.010311532
    q = q * v - 0.020126978
    q = q * v + 0.03376059
    q = q * v - 0.047323756
    q = q * v + 0.06273008
    q = q * v - 0.08077329
    q = q * v + 0.10304923
    q = q * v - 0.14059688
    q = q * v + 0.2827275
    return 0.5 * (z + tl.abs(z) * (a * q))


@triton.jit
def _gelu_slope(z):
    """Phi(z) + z Phi'(z) for 16 bits, within 8e-6: as `_gelu`, from a fit of erf(a / sqrt 2) + 2 a Phi'(a)."""
    a = tl.minimum(tl.maximum(z, -5.0), 5.0)
    v = 0.08 * a * a - 1.0
    q = 0.018309541
    q = q * v - 0.048821524
    q = q * v + 0.041513655
    q = q * v - 0.037001565
    q = q * v + 0.09657277
    q = q * v - 0.15348125
    q = q * v + 0.16416918
    q = q * v - 0.16426699
    q = q * v + 0.15982299
    q = q * v - 0.14408956
    q = q * v + 0.13320848
    q = q * v - 0.15020253
    q = q * v + 0.28426677
    return 0.5 + 0.5 * (a * q)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(z), z in fp32; None is the identity. Unless EXACT, the result has the accuracy of 16 bits."""
    if ACTIVATION is None:
        y = z
    elif ACTIVATION == "gelu":
        y = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476)) if EXACT else _gelu(z)
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_pytorch_tanh":  # (1 + tanh u) / 2 is sigmoid(2 u)
        y = z * sigmoid(z * (1.5957691216057308 + 0.07135481627159567 * z * z))
    elif ACTIVATION == "relu":
        y = tl.where(z <= 0.0, 0.0, z)  # NaN stays
    elif ACTIVATION == "silu":
        y = z * sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        # Below 1/16, 2 sigmoid(2 z) - 1 cancels too many digits; the series' next term is 3e-9 of the value.
        square = z * z
        near = z * (1.0 - square * (0.3333333333333333 - square * 0.13333333333333333))
        y = tl.where(square < 0.00390625, near, 2.0 * sigmoid(2.0 * z) - 1.0)
    return y


@triton.jit
def _sigmoid_slope(t, factor):
    """s + factor s (1 - s), s = sigmoid(t); 1 - s from exp(-|t|): a difference would lose its digits near s = 1."""
    e = tl.exp(-tl.abs(t))
    above = 1.0 / (1.0 + e)
    below = e * above
    return tl.where(t < 0.0, below, above) + factor * above * below


@triton.jit
def slope(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act'(z), z in fp32; as `activate`."""
    if ACTIVATION == "gelu":
        if EXACT:
            density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
            y = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)) + z * density
        else:
            y = _gelu_slope(z)
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_pytorch_tanh":
        # Beyond 16 the slope is 0 or 1, and z^3 may overflow.
        z = tl.where(z > 16.0, 16.0, tl.where(z < -16.0, -16.0, z))
        factor = z * (1.5957691216057308 + 0.21406444881478701 * z * z)
        y = _sigmoid_slope(z * (1.5957691216057308 + 0.07135481627159567 * z * z), factor)
    elif ACTIVATION == "relu":
        y = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        y = _sigmoid_slope(z, z)
    else:
        tanh = activate(z, ACTIVATION, EXACT)
        y = 1.0 - tanh * tanh
    return y


@triton.jit(do_not_specialize=["M"])
def _activation_fwd_kernel(
    z_ptr,  # (M, N)
    y_ptr,  # (M, N), may be z
    stride_zm,
    stride_ym,
    M,
    N,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    z = tl.load(z_ptr + offs_m[:, None] * stride_zm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = activate(z, ACTIVATION, y_ptr.dtype.element_ty == tl.float32).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["M", "rows"])
def _activation_bwd_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N), not read where ACTIVATION is None
    dz_ptr,  # (M, N), not written where ACTIVATION is None
    sums_ptr,  # (splits, N), written if HAS_SUMS
    stride_dym,
    stride_zm,
    stride_dzm,
    M,
    N,
    rows,  # per program, a multiple of BLOCK_M
    ACTIVATION: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, rows, BLOCK_M):
        offs_m = split * rows + start + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dz = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            z = tl.load(z_ptr + offs_m[:, None] * stride_zm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            dz *= slope(z, ACTIVATION, dz_ptr.dtype.element_ty == tl.float32)
            rounded = dz.to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + offs_m[:, None] * stride_dzm + offs_n[None, :], rounded, mask=mask)
        if HAS_SUMS:
            sums += dz
    if HAS_SUMS:
        total = tl.sum(sums, axis=0).to(sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + split * N + offs_n, total, mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _gate_kernel(
    z_ptr,  # (M, 2 F)
    dy_ptr,  # (M, F) or None
    out_ptr,  # (M, F), or (M, 2 F) if dy is given
    stride_zm,
    stride_dym,
    M,
    F,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M) & (columns < F)
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    a = tl.load(z_ptr + rows * stride_zm + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(z_ptr + rows * stride_zm + F + columns, mask=mask, other=0.0).to(tl.float32)
    activated = activate(a, ACTIVATION, EXACT)
    if dy_ptr is None:
        tl.store(out_ptr + rows * F + columns, (activated * b).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        dy = tl.load(dy_ptr + rows * stride_dym + columns, mask=mask, other=0.0).to(tl.float32)
        da = dy * b * slope(a, ACTIVATION, EXACT)
        tl.store(out_ptr + rows * (2 * F) + columns, da.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + rows * (2 * F) + F + columns, (dy * activated).to(out_ptr.dtype.element_ty), mask=mask)


def gate_fwd(z: Tensor, activation: str) -> Tensor:
    """act(a) b, (M, F), of the halves a and b of z (M, 2 F), columns contiguous."""
    return _gate(z, None, torch.empty((len(z), z.shape[1] // 2), dtype=z.dtype, device=z.device), activation)


def gate_bwd(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z (M, 2 F) from that of act(a) b, (M, F)."""
    return _gate(z, dy, torch.empty(z.shape, dtype=z.dtype, device=z.device), activation)


def _gate(z: Tensor, dy: Tensor | None, out: Tensor, activation: str) -> Tensor:
    M, F = len(z), z.shape[1] // 2
    if not z.numel():
        return out
    z, dy = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (z, dy))
    tile = configs.activation_forward(F)
    with architecture.on_device(z.device):
        _gate_kernel[(triton.cdiv(M, tile.block_m), triton.cdiv(F, tile.block_n))](
            z,
            dy,
            out,
            z.stride(0),
            0 if dy is None else dy.stride(0),
            M,
            F,
            ACTIVATION=activation,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
    return out


def activation_fwd(z: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """act(z) of z (M, N), columns contiguous, written to `out` if given, which may be z itself."""
    M, N = z.shape
    y = torch.empty((M, N), dtype=z.dtype, device=z.device) if out is None else out
    if not z.numel():
        return y
    tile = configs.activation_forward(N)
    with architecture.on_device(z.device):
        _activation_fwd_kernel[(triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n))](
            z,
            y,
            z.stride(0),
            y.stride(0),
            M,
            N,
            ACTIVATION=activation,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
    return y


def activation_bwd(dy: Tensor, z: Tensor, activation: str, sums: bool = True) -> tuple[Tensor, Tensor | None]:
    """dz = dy act'(z), (M, N), and if `sums` its sums over the rows (N,); columns of dy and z contiguous."""
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    return dz, _strips(dy, z, dz, activation, dy.dtype if sums else None)


def column_sum(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sums (N,) of x (M, N) over its rows, in fp32; columns contiguous. The bias gradient without activation."""
    return _strips(x, None, None, None, dtype or x.dtype)


def _strips(
    dy: Tensor, z: Tensor | None, dz: Tensor | None, activation: str | None, dtype: torch.dtype | None
) -> Tensor | None:
    """Writes dz if there is an activation; returns the sums over the rows in `dtype`, or None if `dtype` is None."""
    M, N = dy.shape
    if not dy.numel():
        return None if dtype is None else torch.zeros(N, dtype=dtype, device=dy.device)
    tile = configs.activation_bwd(M, N, architecture.multiprocessors(dy.device))
    sums = None
    if dtype is not None:
        sums = torch.empty((tile.splits, N), dtype=dtype if tile.splits == 1 else torch.float32, device=dy.device)
    with architecture.on_device(dy.device):
        _activation_bwd_kernel[(triton.cdiv(N, tile.block_n), tile.splits)](
            dy,
            dy if z is None else z,
            dy if dz is None else dz,
            dy if sums is None else sums,
            dy.stride(0),
            0 if z is None else z.stride(0),
            0 if dz is None else dz.stride(0),
            M,
            N,
            tile.rows,
            ACTIVATION=activation,
            HAS_SUMS=sums is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
    if sums is None:
        return None
    return sums[0] if tile.splits == 1 else column_sum(sums, dtype)
