"""linear: y = act(x W^T + b), every matrix product of a BERT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbert import backend, native, reference
from fastbert.ops._checks import check_floating, check_precision, check_shape


def _describe(words: Callable[[str | None], str | None]) -> Callable[..., str | None]:
    return lambda *args, precision=None, **kwargs: words(precision)


backend.implement("linear", "native", native.linear, native.supports_linear, _describe(native.describe_precision))
backend.implement("linear", "reference", reference.linear, describe=_describe(reference.describe_precision))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """(T, E), (F, E), (F,) -> (T, F), with one of `reference.ACTIVATIONS` on top.

    Args:
        precision: how the operands are multiplied. None: as they are, in their dtype, sums in fp32. "high",
            "highest": in float32, which a backend may split into bf16 pieces, three or six products in place of
            one. "int8": x rounded to int8 by its rows, weight by its rows, sums in int32, without a gradient; see
            `reference.linear_int8`.

    Raises:
        ValueError: a shape or dtype that does not fit, an unknown activation or precision, a gradient of int8.
    """
    check_floating("linear", "x", x)
    check_shape("linear", "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape("linear", "x", x, (None, weight.shape[1]))
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],))
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}; known are {', '.join(reference.ACTIVATIONS)}")
    check_precision("linear", precision, x, weight, bias)
    kwargs = {"activation": activation, "precision": precision}
    if torch.compiler.is_compiling():
        # The native version keeps packed weights, which a compiled graph cannot hold; the compiler has its own.
        return reference.linear(x, weight, bias, **kwargs)
    name, run = backend.choose("linear", x.device.type, x, weight, bias, **kwargs)
    if weight.is_meta and name == "reference" and not x.is_meta:
        raise ValueError(
            "linear: weight has no memory; a model loaded with inference_only=True runs in the dtype, precision and "
            "backend that it was loaded for, and is not copied, trained or compiled"
        )
    return run(x, weight, bias, **kwargs)
