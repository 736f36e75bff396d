"""add_layer_norm by Triton: its autograd function, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._triton import draw_seed, reason_against, rows_in_memory
from fastbert.ops.add_layer_norm.common import sum_in

_MAX_COLUMNS = 8192  # a row in registers; more would spill


class _TritonAddLayerNorm(torch.autograd.Function):
    """Saves the sum dropout(x) + residual, so that both can be freed; per row the mean, in two parts, and rstd.

    The sum is also an output: as a saved output it stays a function of x and residual for a second derivative.
    """

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
    ) -> tuple[Tensor, Tensor | None]:
        from fastbert.kernels.add_layer_norm import add_layer_norm_fwd

        ctx.set_materialize_grads(False)
        seed = draw_seed(x.device) if dropout_p else None
        y, total, mean, rstd = add_layer_norm_fwd(
            x, residual, weight, bias, seed, eps=eps, dropout_p=dropout_p, training=True, rms=rms
        )
        ctx.save_for_backward(total, weight, mean, rstd, seed, bias)
        dtypes = (x.dtype, None if residual is None else residual.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.constants, ctx.eps = {"dropout_p": dropout_p, "dtypes": dtypes, "rms": rms}, eps
        return y, None if total is x else total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        from fastbert.kernels.add_layer_norm import add_layer_norm_bwd

        (*saved, bias), wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        rms, dropout_p = ctx.constants["rms"], ctx.constants["dropout_p"]
        if dy is None and dtotal is not None and not torch.is_grad_enabled():
            dy = torch.zeros_like(saved[0])
        if dy is None:
            found: Sequence[Tensor | None] = [None] * 4
        elif torch.is_grad_enabled():
            forward = partial(_norm, eps=ctx.eps, rms=rms)
            inputs, needed = (saved[0], saved[1], bias), (any(wanted[:2]), *wanted[2:])
            dx, *of_weights = differentiable_gradients("add_layer_norm", forward, inputs, needed, dy, dropout_p)
            found = [dx, dx, *of_weights]
        else:
            dsum = None if dtotal is None else rows_in_memory(dtotal)
            found = add_layer_norm_bwd(rows_in_memory(dy), *saved, **ctx.constants, wanted=wanted, dsum=dsum)
            dtotal = None
        inner = (sum_in(dtype, d, dtotal) for dtype, d in zip(ctx.constants["dtypes"], found[:2], strict=False))
        made = (*inner, *found[2:])
        return *(d if want else None for d, want in zip(made, wanted, strict=True)), None, None, None


def _norm(total: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, rms: bool) -> Tensor:
    return reference.rms_norm(total, weight, eps) if rms else reference.layer_norm(total, weight, bias, eps)


def run_triton(
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
    from fastbert.kernels.add_layer_norm import add_layer_norm_fwd

    if needs_gradient(x, residual, weight, bias):
        y, total = _TritonAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, rms)
    else:
        seed = draw_seed(x.device) if dropout_p else None
        options = {"dropout_p": dropout_p, "rms": rms, "return_sum": return_sum}
        y, total, _, _ = add_layer_norm_fwd(x, residual, weight, bias, seed, eps=eps, **options)
    return (y, x if total is None else total) if return_sum else y


def supports_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float,
    rms: bool = False,
    return_sum: bool = False,
) -> str | None:
    reason = reason_against(x, residual, weight, bias, one_dtype=False)
    if reason is not None:
        return reason
    if weight.shape[0] > _MAX_COLUMNS:
        return f"{weight.shape[0]} columns; it takes {_MAX_COLUMNS} at most"
    if any(t is not None and t.stride(-1) != 1 for t in (x, residual, weight, bias)):
        return "the last dimension is not contiguous"
    return None
