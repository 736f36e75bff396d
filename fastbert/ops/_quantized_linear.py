"""linear in int8 by Triton: the weight is quantised once, as a form of its Weight, x in each call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops._triton import reason_against, rows_in_memory
from fastbert.weight import Weight

_MOST_COLUMNS = 1 << 15  # of a row, that one program can hold


def run(x: Tensor, weight: Weight, activation: str | None) -> Tensor:
    """act(x weight^T + bias), (M, K), (N, K), (N,) -> (M, N), as `reference.linear_int8` defines it."""
    from fastbert.kernels.linear import linear_quantized_fwd
    from fastbert.kernels.quantize import quantize_rows_fwd

    x8 = quantize_rows_fwd(rows_in_memory(x))
    *rows, bias = weight.form("quantized", lambda: _quantized(weight))
    return linear_quantized_fwd(*x8, *rows, bias, activation, x.dtype)


@torch.no_grad()
def _quantized(weight: Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight's rows in 8 bits and their scales, and the bias."""
    from fastbert.kernels.quantize import quantize_rows_fwd

    rows, bias = weight.stacked()
    return *quantize_rows_fwd(rows_in_memory(rows)), None if bias is None else bias.detach().contiguous()


def supports(x: Tensor, weight: Weight) -> str | None:
    """None if `run` takes these arguments, else the reason why not."""
    if reason := reason_against(x, *weight.tensors):
        return reason
    if not 0 < weight.shape[1] <= _MOST_COLUMNS:
        return f"{weight.shape[1]} columns; int8 takes 1 to {_MOST_COLUMNS}"
    if any(t.is_inference() for t in weight.tensors):
        return "a weight made in inference mode does not say when it changes"
    return None


def describe(precision: str | None) -> str | None:
    """How `linear` by Triton treats a precision, for `explain`."""
    if precision == "int8":
        return "int8: sums in int32"
    return None if precision is None else f"{precision}: in full fp32"
