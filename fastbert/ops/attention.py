"""attention: softmax(scale q k^T) v within each sequence of a packed row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import backend, native, reference
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._checks import check_floating, check_integer, check_probability, check_shape


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        ctx.constants = {"scale": scale, "dropout_p": dropout_p, "seed": native.draw_seed(dropout_p)}
        y, statistics = native.attention_training(qkv, cu_seqlens, **ctx.constants)
        ctx.save_for_backward(qkv, cu_seqlens, y, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return native.attention_backward(dy, *ctx.saved_tensors, **ctx.constants), None, None, None


def _native(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None, dropout_p: float) -> Tensor:
    if needs_gradient(qkv):
        return _NativeAttention.apply(qkv, cu_seqlens, scale, dropout_p)
    return native.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)


backend.implement("attention", "native", _native, native.supports_attention)
backend.implement("attention", "reference", reference.attention)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """(T, 3, H, D) -> (T, H, D); sequence b is rows cu_seqlens[b] to cu_seqlens[b+1] and sees only itself.

    Args:
        qkv: queries, keys and values of every token.
        cu_seqlens: int32 (B+1,), from 0 to T.
        max_seqlen: the longest sequence.
        scale: what the scores are multiplied by; None is D ** -0.5.
        dropout_p: the share of probabilities dropped.

    Raises:
        ValueError: a shape, dtype or probability that does not fit.
    """
    check_shape("attention", "qkv", qkv, (None, 3, None, None))
    check_floating("attention", "qkv", qkv)
    check_shape("attention", "cu_seqlens", cu_seqlens, (None,))
    check_integer("attention", "cu_seqlens", cu_seqlens)
    check_probability("attention", "dropout_p", dropout_p)
    if autocast_is_on(qkv):
        with autocast_off(qkv):
            return attention(*cast(qkv), cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)
    if torch.compiler.is_compiling():
        # The lengths are data: a compiled graph holds the op whole; or, with dropout, breaks at the reference.
        if dropout_p:
            return reference.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)
        return torch.ops.fastbert.attention(qkv, cu_seqlens, max_seqlen, scale)
    return _dispatch(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)


def _dispatch(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None, dropout_p: float) -> Tensor:
    kwargs = {"scale": scale, "dropout_p": dropout_p}
    _, run = backend.choose("attention", qkv.device.type, qkv, cu_seqlens, max_seqlen, **kwargs)
    return run(qkv, cu_seqlens, max_seqlen, **kwargs)


@torch.library.custom_op("fastbert::attention", mutates_args=())
def _attention_op(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None) -> Tensor:
    return _dispatch(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=0.0).contiguous()


@_attention_op.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None) -> Tensor:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@torch.library.custom_op("fastbert::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None
) -> Tensor:
    return reference.attention_backward(dout, qkv, cu_seqlens, max_seqlen, scale=scale).contiguous()


@_attention_backward_op.register_fake
def _(dout: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(qkv, cu_seqlens)


def _backward(ctx, dout):
    qkv, cu_seqlens = ctx.saved_tensors
    dqkv = torch.ops.fastbert.attention_backward(dout, qkv, cu_seqlens, ctx.max_seqlen, ctx.scale)
    return dqkv, None, None, None


_attention_op.register_autograd(_backward, setup_context=_save)
