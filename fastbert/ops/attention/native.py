"""attention by the extension: its autograd function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops._autograd import needs_gradient

if TYPE_CHECKING:
    pass

from fastbert.ops.attention.reference import second_derivative


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        ctx.constants = {"scale": scale, "dropout_p": dropout_p, "seed": native.draw_seed(dropout_p)}
        y, statistics = native.attention_fwd_train(qkv, cu_seqlens, **ctx.constants)
        ctx.save_for_backward(qkv, cu_seqlens, y, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return second_derivative(ctx.saved_tensors[0], ctx.saved_tensors[1], dy, ctx.constants), None, None, None
        return native.attention_bwd(dy, *ctx.saved_tensors, **ctx.constants), None, None, None


def run_native(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None, dropout_p: float) -> Tensor:
    if needs_gradient(qkv):
        return _NativeAttention.apply(qkv, cu_seqlens, scale, dropout_p)
    return native.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)
