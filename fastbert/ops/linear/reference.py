"""linear by plain PyTorch, with the checks that the kernels make themselves."""

from __future__ import annotations

from torch import Tensor

from fastbert import reference
from fastbert.ops._checks import check_one_dtype
from fastbert.precision import QUANTIZED
from fastbert.weight import Weight


def run_reference(
    x: Tensor, weight: Weight, *, activation: str | None, precision: str | None, gated: bool = False
) -> Tensor:
    if weight.is_placeholder and not x.is_meta:
        raise ValueError(
            "linear: weight has no memory; a model loaded with inference_only=True runs in the dtype, precision and "
            "backend that it was loaded for, and is not copied, trained or compiled"
        )
    check_dtypes(x, weight, precision)
    return reference.linear(x, *weight.stacked(), activation=activation, precision=precision, gated=gated)


def check_dtypes(x: Tensor, weight: Weight, precision: str | None) -> None:
    if precision not in QUANTIZED:
        biases = weight.biases or (None,) * len(weight.weights)
        for w, bias in zip(weight.weights, biases, strict=True):
            check_one_dtype("linear", x=x, weight=w, bias=bias)
