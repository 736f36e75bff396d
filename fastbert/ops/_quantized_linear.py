"""linear in int8 and fp8 by Triton: the weight quantised once and kept beside it, x as it comes."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fastbert.ops._triton import reason_against
from fastbert.precision import quantized_reason

_MOST_COLUMNS = 1 << 15  # what one program can hold of a row

# (id(weight), precision) -> (weak reference to it, what it was made from, its 8 bits and scales).
_kept: dict[tuple[int, str], tuple[weakref.ref[Tensor], tuple[int, int], tuple[Tensor, Tensor]]] = {}


def run(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, precision: str) -> Tensor:
    """act(x weight^T + bias), (M, K), (N, K), (N,) -> (M, N), as `reference.linear_int8` or `linear_fp8` defines it."""
    from fastbert.kernels.linear_quantized import linear_quantized_fwd
    from fastbert.kernels.quantize import quantize_rows_fwd

    x8 = quantize_rows_fwd(x if x.stride(1) == 1 else x.contiguous(), precision)
    bias = None if bias is None else bias.contiguous()
    return linear_quantized_fwd(*x8, *quantized(weight, precision), bias, activation, x.dtype)


def quantized(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The weight's rows in 8 bits and their scales, kept for as long as the weight tensor lives.

    Made again when its address or version counter changes. (A write through `.data` changes neither and goes unseen: to
    look at the values would be to wait for the device.)
    """
    from fastbert.kernels.quantize import quantize_rows_fwd

    identity, made_from = (id(weight), precision), (weight.data_ptr(), weight._version)
    entry = _kept.get(identity)
    if entry is not None and entry[1] == made_from:
        return entry[2]
    with torch.no_grad():
        made = quantize_rows_fwd(weight if weight.stride(1) == 1 else weight.contiguous(), precision)
    _kept[identity] = weakref.ref(weight, lambda _: _kept.pop(identity, None)), made_from, made
    return made


def quantized_bytes() -> int:
    """The memory that quantised weights take, beside the weights themselves."""
    return sum(part.nbytes for _, _, made in _kept.values() for part in made)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> str | None:
    """None where `run` takes these arguments, else the reason why not."""
    reason = reason_against(x, weight, bias) or quantized_reason(precision, x.device)
    if reason is not None:
        return reason
    if not 0 < weight.shape[1] <= _MOST_COLUMNS:
        return f"{weight.shape[1]} columns; {precision} takes 1 to {_MOST_COLUMNS}"
    if weight.is_inference():
        return "a weight made in inference mode does not say when it changes"
    return None


def describe(precision: str | None) -> str | None:
    """What `linear` by Triton makes of a precision, for `explain`."""
    if precision in ("int8", "fp8"):
        return f"{precision}: sums in {'int32' if precision == 'int8' else 'fp32'}"
    return None if precision is None else f"{precision}: in full fp32"
