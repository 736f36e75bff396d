"""add_layer_norm by the extension: checks, then pointers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.native.add_layer_norm_bwd import add_layer_norm_fwd_train, add_layer_norm_inputs
from fastbert.native.dropout import draw_seed
from fastbert.native.extension import C, chosen_isa, cpu_reason, fresh


def supports_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    rms: bool = False,
    return_sum: bool = False,
) -> str | None:
    """None if `add_layer_norm` takes these arguments, else the reason why not."""
    if reason := cpu_reason(x, residual, weight, bias):
        return reason
    if x.dim() != 2:
        return f"x has {x.dim()} dimensions"
    shape = x.shape
    for t, expected in ((weight, shape[1:]), (bias, shape[1:]), (residual, shape), (x, shape)):
        if t is None:
            continue
        if t.shape != expected:
            return f"shape {tuple(t.shape)} next to x {tuple(shape)}"
        if t.stride(-1) != 1 and shape[1] > 1:
            return "last dimension not contiguous"
    return None


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
    """LayerNorm(dropout(x) + residual) * weight + bias. x and residual (M, N), weight and bias (N,) -> (M, N).

    With `rms`, RMSNorm; with `return_sum`, also dropout(x) + residual. No autograd. One dtype for all, float32 or
    bfloat16; statistics are float32. The caller has checked `supports_add_layer_norm`.
    """
    if dropout_p:
        options: dict[str, Any] = {"seed": draw_seed(dropout_p), "keep": False, "rms": rms, "return_sum": return_sum}
        found = add_layer_norm_fwd_train(x, residual, weight, bias, eps=eps, dropout_p=dropout_p, **options)
        return (found[0], found[2]) if found[2] is not None else found[0]
    y = fresh(x, *x.shape)
    total = fresh(x, *x.shape) if return_sum else None
    C.add_layer_norm_cpu(
        *add_layer_norm_inputs(x, residual, weight, rms),
        *(0 if bias is None else bias.data_ptr(), y.data_ptr(), x.shape[1], 0 if total is None else total.data_ptr()),
        *(eps, chosen_isa()[1], torch.get_num_threads()),
    )
    return y if total is None else (y, total)
