"""linear by the extension: checks, then pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.extension import ACTIVATIONS, CPU_DTYPES, PRECISIONS, C, available, chosen_isa, cpu_reason, fresh
from fastbert.native.packed_weights import has_packed, packed
from fastbert.weight import Weight, as_weight


def supports_linear(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
    gated: bool = False,
) -> str | None:
    """None if `linear` takes these arguments, else the reason why not."""
    if not isinstance(weight, Weight):
        weight = as_weight(weight, bias)
    if C is None:
        return available()
    if activation not in ACTIVATIONS:
        return f"activation {activation}"
    if precision not in PRECISIONS:
        return f"precision {precision}"
    if precision in ("high", "highest") and x.dtype != torch.float32:
        return f"precision {precision} is for float32, not {x.dtype}"
    held = not weight.weights[0].is_meta or not has_packed(weight, precision, gated)
    if reason := cpu_reason(x, *(weight.tensors if held else weight.biases)):
        return reason
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)}"
    for t in (x, *weight.weights) if held else (x,):
        if t.stride(1) != 1 and t.shape[1] > 1:
            return "last dimension not contiguous"
        if t.dtype == torch.bfloat16 and precision is None and (t.shape[1] % 2 or t.stride(0) % 2 or t.data_ptr() % 4):
            return "odd width or row stride in bf16"
    for w, bias in zip(weight.weights, weight.biases, strict=False):
        if bias.shape != w.shape[:1] or not bias.is_contiguous():
            return f"bias of shape {tuple(bias.shape)}"
    for t in weight.tensors:
        if t.is_inference():
            return "a weight made in inference mode does not say when it changes"
    return None


def linear(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
    gated: bool = False,
) -> Tensor:
    """act(x weight^T + bias): x (M, K), weight (N, K), bias (N,) -> (M, N); sums in fp32, those of int8 in int32.

    `gated`: act(a) b, (M, N / 2), of the halves a and b of the product's columns. No autograd. The caller has checked
    `supports_linear`.
    """
    if not isinstance(weight, Weight):
        weight = as_weight(weight, bias)
    y = fresh(x, x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])
    buffer = packed(weight, precision, gated)  # a reference: another thread may drop the form meanwhile
    C.linear_cpu(
        CPU_DTYPES[x.dtype],
        PRECISIONS[precision],
        *x.shape[:1],
        *weight.shape,
        x.data_ptr(),
        x.stride(0),
        buffer.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        ACTIVATIONS[activation],
        gated,
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    return y
