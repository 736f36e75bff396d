"""add_layer_norm by the extension: its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import native, reference
from fastbert.ops._autograd import differentiable_gradients, needs_gradient


class _NativeAddLayerNorm(torch.autograd.Function):
    """Returns the norm and, with `return_sum`, the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dropout_p: float,
        rms: bool,
        return_sum: bool,
    ) -> Any:
        ctx.set_materialize_grads(False)
        seed = native.draw_seed(dropout_p)
        ctx.constants = {"dropout_p": dropout_p, "seed": seed, "rms": rms, "return_sum": return_sum}
        y, statistics, total = native.add_layer_norm_fwd_train(x, residual, weight, bias, eps=eps, **ctx.constants)
        ctx.save_for_backward(x, residual, weight, statistics, bias)
        ctx.eps = eps
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (*saved, bias), wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if dy is None and dsum is None:
            return (None,) * 8
        dy = torch.zeros_like(saved[0]) if dy is None else dy
        if torch.is_grad_enabled():
            rms, dropout_p = ctx.constants["rms"], ctx.constants["dropout_p"]
            forward = partial(_weighted, dy, dsum, eps=ctx.eps, rms=rms)
            inputs = (*saved[:3], bias)
            found = differentiable_gradients("add_layer_norm", forward, inputs, wanted, dy.new_ones(()), dropout_p)
            return *found, None, None, None, None
        return *native.add_layer_norm_bwd(dy, *saved, **ctx.constants, wanted=wanted, dsum=dsum), *(None,) * 4


def _weighted(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """The outputs times their gradients: its gradients are theirs."""
    y, total = reference.add_layer_norm(x, residual, weight, bias, return_sum=True, **options)
    found = (y * dy).sum()
    return found if dsum is None else found + (total * dsum).sum()


def run_native(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float,
    rms: bool = False,
    return_sum: bool = False,
) -> Any:
    if residual is not None:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = (
            t if t.dtype == wide else t.to(wide, memory_format=torch.contiguous_format) for t in (x, residual)
        )
    if needs_gradient(x, residual, weight, bias):
        return _NativeAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, rms, return_sum)
    options: dict[str, Any] = {"dropout_p": dropout_p, "rms": rms, "return_sum": return_sum}
    return native.add_layer_norm(x, residual, weight, bias, eps=eps, **options)


def supports_native(x: Tensor, residual: Tensor | None, *args: Any, **kwargs: Any) -> str | None:
    if residual is not None and residual.dtype != x.dtype:  # `run_native` widens the narrower to the other's dtype
        wide = torch.promote_types(x.dtype, residual.dtype)
        if wide not in (x.dtype, residual.dtype):  # of fp16 and bf16: fp32, which the weight would not be
            return f"mixed dtypes {x.dtype} and {residual.dtype}"
        x = residual = x if wide == x.dtype else residual
    return native.supports_add_layer_norm(x, residual, *args, **kwargs)
