"""add_layer_norm: y = LN(dropout(x) + residual), after attention and feed-forward."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastbert.ops import dispatch
from fastbert.ops._autocast import autocast_is_on, autocast_off
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._checks import check_floating, check_norm_dtypes, check_probability, check_shape
from fastbert.ops.add_layer_norm.native import run_native, supports_native
from fastbert.ops.add_layer_norm.triton import run_triton, supports_triton
from fastbert.reference import add_layer_norm as reference_add_layer_norm

dispatch.implement("add_layer_norm", "triton", run_triton, supports_triton)
dispatch.implement("add_layer_norm", "native", run_native, supports_native)
dispatch.implement("add_layer_norm", "reference", reference_add_layer_norm)


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    rms: bool = False,
    return_sum: Literal[False] = False,
) -> Tensor: ...


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    rms: bool = False,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    rms: bool = False,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LN(dropout(x) + residual) over the last dimension, (T, E); without a residual, a plain LayerNorm.

    Mean and variance are taken in fp32 at least (Ba et al., 2016). If dtypes differ, as under autocast, the result
    has the wider one of x and residual. weight and bias may have any dtype, but float64 only if x or residual has it.

    Args:
        bias: None where the norm has none.
        rms: RMSNorm (Zhang & Sennrich, 2019): without the mean; it has no bias.
        return_sum: also return dropout(x) + residual, the residual stream where norms stand before attention and
            feed-forward.

    Raises:
        ValueError: a shape, dtype or probability that does not fit.
    """
    check_floating("add_layer_norm", "x", x)
    check_shape("add_layer_norm", "weight", weight, (None,))
    check_shape("add_layer_norm", "x", x, (None, weight.shape[0]))
    if residual is not None:
        check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    if bias is not None:
        check_shape("add_layer_norm", "bias", bias, tuple(weight.shape))
        if rms:
            raise ValueError("add_layer_norm: bias is given with rms; RMSNorm has none")
    check_probability("add_layer_norm", "dropout_p", dropout_p)
    kwargs: dict[str, Any] = {"eps": eps, "dropout_p": dropout_p}
    if rms or return_sum:
        kwargs |= {"rms": rms, "return_sum": return_sum}
    if autocast_is_on(x):  # x comes from a product in the lower precision, the residual from a norm in fp32
        with autocast_off(x):
            return add_layer_norm(x, residual, weight, bias, **kwargs)
    name, run = dispatch.choose("add_layer_norm", x.device.type, x, residual, weight, bias, **kwargs)
    if name == "reference":
        check_norm_dtypes("add_layer_norm", {"x": x, "residual": residual}, weight, bias)
    elif torch.compiler.is_compiling():
        # Pointers cannot be traced; the reference can, and the compiler fuses it.
        if dropout_p or rms or return_sum or bias is None or needs_gradient(x, residual, weight, bias):
            return reference_add_layer_norm(x, residual, weight, bias, **kwargs)
        return torch.ops.fastbert.add_layer_norm(x, residual, weight, bias, eps)
    return run(x, residual, weight, bias, **kwargs)


@torch.library.custom_op("fastbert::add_layer_norm", mutates_args=())
def _add_layer_norm_op(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _, run = dispatch.choose("add_layer_norm", x.device.type, x, residual, weight, bias, eps=eps, dropout_p=0.0)
    return run(x, residual, weight, bias, eps=eps, dropout_p=0.0)


@_add_layer_norm_op.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
