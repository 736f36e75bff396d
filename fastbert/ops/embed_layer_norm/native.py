"""embed_layer_norm by the extension: its autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops._autograd import needs_gradient
from fastbert.ops.embed_layer_norm.reference import second_derivative


class _Native(torch.autograd.Function):
    """Saves two statistics per token: the backward gathers the tables' rows and generates the mask again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.eps, ctx.dropout_p, ctx.seed, ctx.padding_idx = args
        y, statistics = native.embed_layer_norm(
            *tensors, eps=ctx.eps, dropout_p=ctx.dropout_p, seed=ctx.seed, with_statistics=True
        )
        ctx.save_for_backward(*tensors[:-1], statistics, tensors[-1])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (*saved, bias), needed = ctx.saved_tensors, ctx.needs_input_grad[3:8]
        if torch.is_grad_enabled():
            inputs = (*saved[:7], bias)
            return *second_derivative(ctx, dy, inputs, dropout_p=ctx.dropout_p, padding_idx=ctx.padding_idx), None
        gradients = native.embed_layer_norm_bwd(
            *(dy, *saved, needed), dropout_p=ctx.dropout_p, seed=ctx.seed, padding_idx=ctx.padding_idx
        )
        return None, None, None, *gradients, None, None, None, None


def run_native(*tensors: Tensor, eps: float, dropout_p: float, padding_idx: int | None) -> Tensor:
    seed = native.draw_seed(dropout_p) if dropout_p else 0
    if torch.is_grad_enabled() and needs_gradient(*tensors):
        return _Native.apply(*tensors, eps, dropout_p, seed, padding_idx)
    return native.embed_layer_norm(*tensors, eps=eps, dropout_p=dropout_p, seed=seed)[0]
