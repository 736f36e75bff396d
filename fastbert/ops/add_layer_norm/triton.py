"""add_layer_norm by Triton: its autograd function, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._triton import reason_against, rows_in_memory
from fastbert.ops.add_layer_norm.common import sum_in

_MAX_COLUMNS = 8192  # a row in registers; more would spill


class _TritonAddLayerNorm(torch.autograd.Function):
    """Saves the sum dropout(x) + residual, so that both can be freed; per row the mean, in two parts, and rstd.

    The sum is also an output: as a saved output it stays a function of x and residual for a second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        from fastbert.kernels.add_layer_norm import add_layer_norm_fwd
        from fastbert.kernels.dropout import draw_seed

        ctx.set_materialize_grads(False)
        seed = draw_seed(x.device) if dropout_p else None
        y, total, mean, rstd = add_layer_norm_fwd(
            x, residual, weight, bias, seed, eps=eps, dropout_p=dropout_p, training=True
        )
        ctx.save_for_backward(total, weight, mean, rstd, seed, bias)
        dtypes = (x.dtype, None if residual is None else residual.dtype, bias.dtype)
        ctx.constants, ctx.eps = {"dropout_p": dropout_p, "dtypes": dtypes}, eps
        return y, None if total is x else total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        from fastbert.kernels.add_layer_norm import add_layer_norm_bwd

        (*saved, bias), wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if dy is None:
            found: Sequence[Tensor | None] = [None] * 4
        elif torch.is_grad_enabled():
            forward, inputs = partial(reference.layer_norm, eps=ctx.eps), (saved[0], saved[1], bias)
            needed = (any(wanted[:2]), *wanted[2:])
            dropout_p = ctx.constants["dropout_p"]
            dx, *of_weights = differentiable_gradients("add_layer_norm", forward, inputs, needed, dy, dropout_p)
            found = [dx, dx, *of_weights]
        else:
            found = add_layer_norm_bwd(rows_in_memory(dy), *saved, **ctx.constants, wanted=wanted)
        inner = (sum_in(dtype, d, dtotal) for dtype, d in zip(ctx.constants["dtypes"], found[:2], strict=False))
        made = (*inner, *found[2:])
        return *(d if want else None for d, want in zip(made, wanted, strict=True)), None, None


def run_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> Tensor:
    from fastbert.kernels.add_layer_norm import add_layer_norm_fwd
    from fastbert.kernels.dropout import draw_seed

    if needs_gradient(x, residual, weight, bias):
        return _TritonAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p)[0]
    seed = draw_seed(x.device) if dropout_p else None
    return add_layer_norm_fwd(x, residual, weight, bias, seed, eps=eps, dropout_p=dropout_p)[0]


def supports_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> str | None:
    reason = reason_against(x, residual, weight, bias, one_dtype=False)
    if reason is not None:
        return reason
    if weight.shape[0] > _MAX_COLUMNS:
        return f"{weight.shape[0]} columns; it takes {_MAX_COLUMNS} at most"
    if any(t is not None and t.stride(-1) != 1 for t in (x, residual, weight, bias)):
        return "the last dimension is not contiguous"
    return None
