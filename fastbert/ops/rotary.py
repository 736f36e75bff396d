"""rotary: turns queries and keys by the positions of their tokens, before attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import native, reference
from fastbert.ops import dispatch
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import check_floating, check_shape
from fastbert.ops._triton import reason_against
from fastbert.reference import rotary as reference_rotary


class _Rotary(torch.autograd.Function):
    """Saves no activation: the gradient turns back. `backend` is native or triton."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int, backend: str) -> Tensor:
        ctx.save_for_backward(table, positions)
        ctx.groups, ctx.num_heads, ctx.backend = (qkv.shape[1] - num_heads) // 2, num_heads, backend
        return _turned(qkv, table, positions, num_heads, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        table, positions = ctx.saved_tensors
        if torch.is_grad_enabled():  # linear in qkv: any value has the same gradient
            example = dy.new_zeros(len(dy), ctx.num_heads + 2 * ctx.groups, dy.shape[-1]).requires_grad_()
            forward = partial(reference.rotary, table=table, positions=positions, num_heads=ctx.num_heads)
            return differentiable_gradients("rotary", forward, (example,), (True,), dy)[0], None, None, None, None
        if ctx.backend == "native":
            dqkv = native.rotary_bwd(dy.contiguous(), table, positions, ctx.groups)
        else:
            from fastbert.kernels.rotary import rotary_bwd

            dqkv = rotary_bwd(dy.contiguous(), table, positions, ctx.groups)
        return dqkv, None, None, None, None


def _turned(qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int, backend: str) -> Tensor:
    if backend == "native":
        return native.rotary(qkv, table, positions, num_heads)
    from fastbert.kernels.rotary import rotary_fwd

    return rotary_fwd(qkv, table, positions, num_heads)


def rotary(qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    """Rotary positions (Su et al., 2021): (T, H + 2G, D) -> (T, 3, H, D).

    Columns i and i + D / 2 of each head of queries and keys turn by the i-th angle of the token's position.

    Args:
        qkv: H heads of queries, then G of keys and G of values, which are repeated for H heads.
        table: (P, D) fp32: of each position, the cosines of D / 2 angles, then their sines.
        positions: (T,) int64, below P. On a GPU they are not checked, which would wait for it.
        num_heads: H, a multiple of G.

    Raises:
        ValueError: a shape or dtype that does not fit; on a CPU, a position outside the table.
    """
    check_floating("rotary", "qkv", qkv)
    check_shape("rotary", "qkv", qkv, (None, None, None))
    tokens, heads, width = qkv.shape
    groups = (heads - num_heads) // 2
    if groups < 1 or (heads - num_heads) % 2 or num_heads % groups or width % 2:
        raise ValueError(
            f"rotary: qkv has shape {tuple(qkv.shape)}; with num_heads {num_heads} it must be (*, {num_heads} and "
            "twice a divisor of it, an even number)"
        )
    check_shape("rotary", "table", table, (None, width))
    check_shape("rotary", "positions", positions, (tokens,))
    if torch.compiler.is_compiling():
        return reference_rotary(qkv, table, positions, num_heads)
    _, run = dispatch.choose("rotary", qkv.device.type, qkv, table, positions, num_heads)
    return run(qkv, table, positions, num_heads)


def _run(backend: str, qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    if needs_gradient(qkv):
        return _Rotary.apply(qkv, table, positions, num_heads, backend)
    return _turned(qkv, table, positions, num_heads, backend)


def _supports_triton(qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int) -> str | None:
    if reason := reason_against(qkv):
        return reason
    if not qkv.is_contiguous():
        return "qkv is not contiguous"
    return "table or positions on another device" if {table.device, positions.device} != {qkv.device} else None


dispatch.implement("rotary", "triton", partial(_run, "triton"), _supports_triton)
dispatch.implement("rotary", "native", partial(_run, "native"), native.supports_rotary)
dispatch.implement("rotary", "reference", reference_rotary)
