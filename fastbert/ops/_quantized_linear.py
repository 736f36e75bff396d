"""linear in int8 and fp8 by Triton: the weight quantised once, as a form of its Weight, x in each call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops._triton import reason_against
from fastbert.precision import quantized_reason
from fastbert.weight import Weight

_MOST_COLUMNS = 1 << 15  # what one program can hold of a row


def run(x: Tensor, weight: Weight, activation: str | None, precision: str) -> Tensor:
    """act(x weight^T + bias), (M, K), (N, K), (N,) -> (M, N), as `reference.linear_int8` or `linear_fp8` defines it."""
    from fastbert.kernels.linear_quantized import linear_quantized_fwd
    from fastbert.kernels.quantize import quantize_rows_fwd

    x8 = quantize_rows_fwd(x if x.stride(1) == 1 else x.contiguous(), precision)
    *rows, bias = weight.form(("quantized", precision), lambda: _quantized(weight, precision))
    return linear_quantized_fwd(*x8, *rows, bias, activation, x.dtype)


@torch.no_grad()
def _quantized(weight: Weight, precision: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight's rows in 8 bits and their scales, and the bias."""
    from fastbert.kernels.quantize import quantize_rows_fwd

    rows, bias = weight.stacked()
    rows8 = quantize_rows_fwd(rows if rows.stride(1) == 1 else rows.contiguous(), precision)
    return *rows8, None if bias is None else bias.detach().contiguous()


def supports(x: Tensor, weight: Weight, precision: str) -> str | None:
    """None where `run` takes these arguments, else the reason why not."""
    reason = reason_against(x, *weight.tensors) or quantized_reason(precision, x.device)
    if reason is not None:
        return reason
    if not 0 < weight.shape[1] <= _MOST_COLUMNS:
        return f"{weight.shape[1]} columns; {precision} takes 1 to {_MOST_COLUMNS}"
    if any(t.is_inference() for t in weight.tensors):
        return "a weight made in inference mode does not say when it changes"
    return None


def describe(precision: str | None) -> str | None:
    """What `linear` by Triton makes of a precision, for `explain`."""
    if precision in ("int8", "fp8"):
        return f"{precision}: sums in {'int32' if precision == 'int8' else 'fp32'}"
    return None if precision is None else f"{precision}: in full fp32"
