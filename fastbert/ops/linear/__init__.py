"""linear: y = act(x W^T + b), every matrix product of a BERT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert.native import describe_precision as native_describe_precision
from fastbert.native import supports_linear
from fastbert.ops import _quantized_linear, dispatch
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._checks import check_floating, check_precision, check_shape
from fastbert.ops.linear.native import run_native
from fastbert.ops.linear.reference import check_dtypes, run_reference
from fastbert.ops.linear.triton import run_triton, supports_triton
from fastbert.precision import QUANTIZED
from fastbert.reference import ACTIVATIONS
from fastbert.reference import describe_precision as reference_describe_precision
from fastbert.reference import linear as reference_linear
from fastbert.weight import Weight, as_weight


def _describe(words: Callable[[str | None], str | None]) -> Callable[..., str | None]:
    return lambda *args, precision=None, **kwargs: words(precision)


dispatch.implement("linear", "triton", run_triton, supports_triton, _describe(_quantized_linear.describe))
dispatch.implement("linear", "native", run_native, supports_linear, _describe(native_describe_precision))
dispatch.implement("linear", "reference", run_reference, describe=_describe(reference_describe_precision))


def linear(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
    gated: bool = False,
) -> Tensor:
    """x W^T + b: (T, E), (F, E), (F,) -> (T, F), followed by one of `ACTIVATIONS`, if any.

    Args:
        weight: a tensor, with its bias in `bias`; or a `Weight`, which caches the forms that a backend derives from it.
            For a tensor they are made in every call.
        precision: None: the operands are multiplied in their dtype, with sums in fp32. "high", "highest": in float32,
            which a backend may split into bf16 terms, with three or six products instead of one. "int8": x and weight
            are rounded to int8 with a scale per row, with sums in int32 and no gradient; see `reference.linear_int8`.
        gated: act(a) b, (T, F / 2), of the halves a and b of the columns; with an activation (Shazeer, 2020).

    Raises:
        ValueError: a shape or dtype that does not fit, an unknown activation or precision, a gradient with int8.
    """
    if not x.is_floating_point():
        check_floating("linear", "x", x)
    if not isinstance(weight, Weight) or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        weight = _checked(x, weight, bias)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    if gated and (activation is None or weight.shape[0] % 2):
        raise ValueError(
            f"linear: gated with activation {activation!r} and {weight.shape[0]} columns; it must be an activation and "
            "an even number"
        )
    if precision is not None:
        check_precision("linear", precision, x, *weight.tensors)
    if torch._C._is_any_autocast_enabled() and autocast_is_on(x):
        with autocast_off(x):
            if precision in QUANTIZED:  # set for the model, and narrower than autocast's dtype
                return linear(x, weight, activation=activation, precision=precision, gated=gated)
            x, *tensors = cast(x, *weight.tensors)
            rows = len(weight.weights)
            weight = Weight(tensors[:rows], tensors[rows:] or (None,) * rows)
            return linear(x, weight, activation=activation, gated=gated)
    kwargs: dict[str, Any] = {"activation": activation, "precision": precision}
    if gated:
        kwargs["gated"] = True
    if torch.compiler.is_compiling():
        # The native version keeps packed weights, which a compiled graph cannot hold; the compiler has its own.
        check_dtypes(x, weight, precision)
        return reference_linear(x, *weight.stacked(), **kwargs)
    _, run = dispatch.choose("linear", x.device.type, x, weight, **kwargs)
    return run(x, weight, **kwargs)


def _checked(x: Tensor, weight: Tensor | Weight, bias: Tensor | None) -> Weight:
    """The operands as a Weight, its shapes checked against x."""
    if isinstance(weight, Weight):
        check_shape("linear", "x", x, (None, weight.shape[1]))
        return weight
    check_shape("linear", "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape("linear", "x", x, (None, weight.shape[1]))
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],))
    return as_weight(weight, bias)
