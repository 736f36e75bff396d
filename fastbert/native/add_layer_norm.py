"""add_layer_norm by the extension: checks, then pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.add_layer_norm_gradient import add_layer_norm_training
from fastbert.native.dropout import draw_seed
from fastbert.native.extension import CPU_DTYPES, C, available, chosen_isa, cpu_reason, fresh


def supports_add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> str | None:
    """None where `add_layer_norm` takes these arguments, else the reason why not."""
    if C is None:
        return available()
    if reason := cpu_reason(x, residual, weight, bias):
        return reason
    if x.dim() != 2:
        return f"x has {x.dim()} dimensions"
    shape = x.shape
    for t, expected in ((weight, shape[1:]), (bias, shape[1:]), (residual, shape), (x, shape)):
        if t is None:
            continue
        if t.shape != expected:
            return f"shape {tuple(t.shape)} beside x {tuple(shape)}"
        if t.stride(-1) != 1 and shape[1] > 1:
            return "last dimension not contiguous"
    return None


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """LayerNorm(dropout(x) + residual) * weight + bias. x and residual (M, N), weight and bias (N,) -> (M, N).

    No autograd. One dtype for all, float32 or bfloat16; sums and statistics are float32.

    Raises:
        ValueError: arguments it does not take, with the reason of `supports_add_layer_norm`.
    """
    reason = supports_add_layer_norm(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)
    if reason is not None:
        raise ValueError(f"native.add_layer_norm: {reason}")
    if dropout_p:
        return add_layer_norm_training(
            x, residual, weight, bias, eps=eps, dropout_p=dropout_p, seed=draw_seed(dropout_p), keep=False
        )[0]
    M, N = x.shape
    y = fresh(x, M, N)
    C.add_layer_norm_cpu(
        CPU_DTYPES[x.dtype],
        M,
        N,
        x.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        N,
        eps,
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    return y
