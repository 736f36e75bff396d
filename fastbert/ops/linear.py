"""linear: y = act(x W^T + b), every matrix product of a BERT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import backend, native, reference
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._checks import check_floating, check_shape


class _NativeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        y, saved = native.linear_training(x, weight, bias, activation)
        ctx.save_for_backward(x, weight, saved)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *native.linear_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.needs_input_grad[:3]), None


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None) -> Tensor:
    if needs_gradient(x, weight, bias):
        return _NativeLinear.apply(x, weight, bias, activation)
    return native.linear(x, weight, bias, activation=activation)


backend.implement("linear", "native", _native, native.supports_linear)
backend.implement("linear", "reference", reference.linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """(T, E), (F, E), (F,) -> (T, F), with one of `reference.ACTIVATIONS` on top.

    Raises:
        ValueError: a shape or dtype that does not fit, an unknown activation.
    """
    check_floating("linear", "x", x)
    check_shape("linear", "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape("linear", "x", x, (None, weight.shape[1]))
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],))
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}; known are {', '.join(reference.ACTIVATIONS)}")
    if autocast_is_on(x):
        with autocast_off(x):
            return linear(*cast(x, weight, bias), activation=activation)
    if torch.compiler.is_compiling():
        # The native version keeps packed weights, which a compiled graph cannot hold; the compiler has its own.
        return reference.linear(x, weight, bias, activation=activation)
    _, run = backend.choose("linear", x.device.type, x, weight, bias, activation=activation)
    return run(x, weight, bias, activation=activation)
