"""attention by the extension: its autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops._autograd import needs_gradient
from fastbert.ops.attention.reference import second_derivative


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor,
        scale: float | None,
        dropout_p: float,
        window: int | None,
    ) -> Tensor:
        seed = native.draw_seed(dropout_p)
        ctx.constants = {"scale": scale, "dropout_p": dropout_p, "seed": seed, "window": window}
        y, statistics = native.attention_fwd_train(qkv, cu_seqlens, bias=bias, **ctx.constants)
        ctx.save_for_backward(qkv, bias, cu_seqlens, y, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, cu_seqlens, y, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            dqkv, dbias = second_derivative(qkv, bias, cu_seqlens, dy, ctx.constants)
        else:
            dqkv, dbias = native.attention_bwd(dy, qkv, cu_seqlens, y, statistics, bias=bias, **ctx.constants)
            dbias = None if dbias is None else dbias.to(bias.dtype)
        return dqkv, dbias, None, None, None, None


def run_native(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None,
    dropout_p: float,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    if needs_gradient(qkv, bias):
        return _NativeAttention.apply(qkv, bias, cu_seqlens, scale, dropout_p, window)
    return native.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p, bias=bias, window=window)
