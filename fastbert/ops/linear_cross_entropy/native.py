"""linear_cross_entropy by the extension: its autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops._autograd import needs_gradient
from fastbert.ops.linear_cross_entropy.reference import second_derivative


class _Native(torch.autograd.Function):
    """Computes the gradients with the loss, while the logits are in memory, as Liger-Kernel does.

    The loss is one number, so its own gradient only scales them. The backward of a loss comes right after it, so the
    peak memory is the same as when computing them there, and one product of four is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias, labels)
        ctx.ignore_index = ignore_index
        loss, ctx.gradients = _with_gradients(ctx, (x, weight, bias, labels))
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *second_derivative(ctx, dloss, *ctx.saved_tensors), None, None
        # No reference is kept, so that a parameter can take its gradient without a copy; a second backward over the
        # same graph recomputes them.
        gradients, ctx.gradients = ctx.gradients or _with_gradients(ctx, ctx.saved_tensors)[1], None
        factor = dloss.item()
        if factor != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        return *gradients, None, None


def _with_gradients(ctx: Any, tensors: tuple[Any, ...]) -> tuple[Tensor, list[Tensor | None]]:
    return native.linear_cross_entropy(*tensors, ignore_index=ctx.ignore_index, needed=ctx.needs_input_grad[:3])


def run_native(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int) -> Tensor:
    if needs_gradient(x, weight, bias):
        return _Native.apply(x, weight, bias, labels, ignore_index)
    return native.linear_cross_entropy(x, weight, bias, labels, ignore_index=ignore_index)[0]
