"""attention by plain PyTorch, and the second derivatives of all backends."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.ops._autograd import differentiable_gradients, needs_gradient


def second_derivative(
    qkv: Tensor, bias: Tensor | None, cu_seqlens: Tensor, dy: Tensor, constants: dict[str, Any]
) -> list[Tensor | None]:
    """The gradients of qkv and of the bias, as functions of both and of dy."""
    forward = partial(_formula, cu_seqlens=cu_seqlens, scale=constants["scale"], window=constants.get("window"))
    needed = True, bias is not None
    return differentiable_gradients("attention", forward, (qkv, bias), needed, dy, constants["dropout_p"])


def _formula(
    qkv: Tensor, bias: Tensor | None, *, cu_seqlens: Tensor, scale: float | None, window: int | None
) -> Tensor:
    return reference.attention_formula(qkv, cu_seqlens, scale, bias, window=window)


class _DifferentiableTwice(torch.autograd.Function):
    """Returns `out`, torch's fused attention of qkv, whose gradient torch cannot differentiate again.

    For a second derivative the gradient comes from the formula, and none flows through `out`. The same holds in fp32
    on a CPU: there torch's fused backward loses digits to large scores, as it saves only the logarithm of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        out: Tensor,
        cu_seqlens: Tensor,
        scale: float | None,
        dropout_p: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens)
        ctx.constants = {"scale": scale, "dropout_p": dropout_p, "window": window}
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            qkv, cu_seqlens = ctx.saved_tensors
            return second_derivative(qkv, None, cu_seqlens, dout, ctx.constants)[0], None, None, None, None, None
        if dout.is_cpu and dout.dtype == torch.float32 and not ctx.constants["dropout_p"]:
            qkv, cu_seqlens = ctx.saved_tensors
            scale, window = ctx.constants["scale"], ctx.constants["window"]
            dqkv = reference.attention_bwd(dout, qkv, cu_seqlens, len(qkv), scale=scale, window=window)
            return dqkv, None, None, None, None, None
        return None, dout, None, None, None, None


def run_reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None,
    dropout_p: float,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    if bias is not None:
        return reference.attention_formula(qkv, cu_seqlens, scale, bias, dropout_p, window)
    out = reference.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p, window=window)
    if not needs_gradient(qkv) or torch.compiler.is_compiling() or torch.jit.is_tracing() or reference.is_transformed():
        return out
    return _DifferentiableTwice.apply(qkv, out, cu_seqlens, scale, dropout_p, window)
