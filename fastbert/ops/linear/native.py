"""linear by the extension: its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import native, reference
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops.gate import gate
from fastbert.weight import Weight


class _NativeLinear(torch.autograd.Function):
    """The tensors of `weight` are arguments too, so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, activation: str | None, *tensors: Tensor) -> Tensor:
        y, saved = native.linear_fwd_train(x, weight, activation)
        ctx.save_for_backward(x, saved, *tensors)
        ctx.weight, ctx.activation = weight, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, saved, *tensors), weight = ctx.saved_tensors, ctx.weight
        need_x, _, _, *needed = ctx.needs_input_grad
        rows = len(weight.weights)
        if torch.is_grad_enabled():
            forward = partial(_reference_of_parts, rows=rows, activation=ctx.activation)
            dx, *gradients = differentiable_gradients("linear", forward, (x, *tensors), (need_x, *needed), dy)
            return dx, None, None, *gradients
        wanted = need_x, any(needed[:rows]), any(needed[rows:])
        dx, *stacked = native.linear_bwd(dy, x, weight, saved, ctx.activation, wanted)
        gradients = weight.split(*stacked)
        return dx, None, None, *[g if need else None for g, need in zip(gradients, needed, strict=True)]


def _reference_of_parts(x: Tensor, *tensors: Tensor, rows: int, activation: str | None) -> Tensor:
    weight = Weight(tensors[:rows], tensors[rows:] or (None,) * rows)
    return reference.linear(x, *weight.stacked(), activation=activation)


def run_native(
    x: Tensor, weight: Weight, *, activation: str | None, precision: str | None, gated: bool = False
) -> Tensor:
    # With a gradient, "high" and "highest" are in full precision.
    if torch.is_grad_enabled() and needs_gradient(x, *weight.tensors):
        if gated and activation is not None:  # the gradient needs both halves
            return gate(_NativeLinear.apply(x, weight, None, *weight.tensors), activation)
        return _NativeLinear.apply(x, weight, activation, *weight.tensors)
    return native.linear(x, weight, activation=activation, precision=precision, gated=gated)
