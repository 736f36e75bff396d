"""add_layer_norm by the extension: its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import native, reference
from fastbert.ops._autograd import differentiable_gradients, needs_gradient


class _NativeAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float
    ) -> Tensor:
        ctx.constants = {"dropout_p": dropout_p, "seed": native.draw_seed(dropout_p)}
        y, statistics = native.add_layer_norm_fwd_train(x, residual, weight, bias, eps=eps, **ctx.constants)
        ctx.save_for_backward(x, residual, weight, statistics, bias)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (*saved, bias), wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            forward, dropout_p = partial(reference.add_layer_norm, eps=ctx.eps), ctx.constants["dropout_p"]
            inputs = (*saved[:3], bias)
            found = differentiable_gradients("add_layer_norm", forward, inputs, wanted, dy, dropout_p)
            return *found, None, None
        return *native.add_layer_norm_bwd(dy, *saved, **ctx.constants, wanted=wanted), None, None


def run_native(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> Tensor:
    if residual is not None:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = (
            t if t.dtype == wide else t.to(wide, memory_format=torch.contiguous_format) for t in (x, residual)
        )
    if needs_gradient(x, residual, weight, bias):
        return _NativeAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p)
    return native.add_layer_norm(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)


def supports_native(x: Tensor, residual: Tensor | None, *args: Tensor, **kwargs: Any) -> str | None:
    if residual is not None and residual.dtype != x.dtype:  # `run_native` widens the narrower to the other's dtype
        wide = torch.promote_types(x.dtype, residual.dtype)
        if wide not in (x.dtype, residual.dtype):  # of fp16 and bf16: fp32, which the weight would not be
            return f"mixed dtypes {x.dtype} and {residual.dtype}"
        x = residual = x if wide == x.dtype else residual
    return native.supports_add_layer_norm(x, residual, *args, **kwargs)
