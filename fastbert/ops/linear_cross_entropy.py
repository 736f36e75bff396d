"""linear_cross_entropy: mean cross entropy of x W^T + b against labels, without keeping the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import backend, native, reference
from fastbert.ops._checks import check_floating, check_integer, check_shape


class _Native(torch.autograd.Function):
    """Makes the gradients along with the loss, while the logits are there: the loss is one number, so all that its
    own gradient can do is scale them. (As Liger-Kernel does. The backward of a loss comes right after it, so the
    peak of memory is that of making them then, and one product of four is saved.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias, labels)
        ctx.ignore_index = ignore_index
        loss, ctx.gradients = _with_gradients(ctx, (x, weight, bias, labels))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, so that a parameter can take its gradient without a copy; a second backward over the same
        # graph makes them again.
        gradients, ctx.gradients = ctx.gradients or _with_gradients(ctx, ctx.saved_tensors)[1], None
        factor = dloss.item()
        if factor != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        return *gradients, None, None


def _with_gradients(ctx: Any, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, list[Tensor | None]]:
    return native.linear_cross_entropy(*tensors, ignore_index=ctx.ignore_index, needed=ctx.needs_input_grad[:3])


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Native.apply(x, weight, bias, labels, ignore_index)
    return native.linear_cross_entropy(x, weight, bias, labels, ignore_index=ignore_index)[0]


backend.implement("linear_cross_entropy", "native", _native, native.supports_linear_cross_entropy)
backend.implement("linear_cross_entropy", "reference", reference.linear_cross_entropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """(T, E), (V, E), (V,), (T,) -> (): the mean over rows whose label is not `ignore_index`.

    Where every label is ignored the mean is of nothing and the result NaN, as in torch.

    Raises:
        ValueError: a shape or dtype that does not fit, a label outside 0..V-1 (but `ignore_index`).
    """
    op = "linear_cross_entropy"
    check_floating(op, "x", x)
    check_shape(op, "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape(op, "x", x, (None, weight.shape[1]))
    check_shape(op, "labels", labels, (x.shape[0],))
    check_integer(op, "labels", labels)
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],))
    args = (x, weight, bias, labels)
    if torch.compiler.is_compiling():
        return reference.linear_cross_entropy(*args, ignore_index=ignore_index)
    _, run = backend.choose(op, x.device.type, *args, ignore_index=ignore_index)
    return run(*args, ignore_index=ignore_index)
