"""encoder: every layer over the packed tokens, for inference; made of the other ops unless a backend takes it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert import backend, native
from fastbert.ops._checks import check_floating, check_offsets, check_precision, check_shape
from fastbert.ops.add_layer_norm import add_layer_norm
from fastbert.ops.attention import attention, shared_schedules
from fastbert.ops.linear import linear


class LayerWeights(NamedTuple):
    """One layer's weights, (out, in) as in nn.Linear, and its constants."""

    qkv_weight: Tensor  # (3E, E): query, key, value
    qkv_bias: Tensor  # (3E,)
    attention_weight: Tensor  # (E, E)
    attention_bias: Tensor  # (E,)
    attention_norm_weight: Tensor  # (E,)
    attention_norm_bias: Tensor  # (E,)
    up_weight: Tensor  # (F, E)
    up_bias: Tensor  # (F,)
    down_weight: Tensor  # (E, F)
    down_bias: Tensor  # (E,)
    norm_weight: Tensor  # (E,)
    norm_bias: Tensor  # (E,)
    num_heads: int
    activation: str
    eps: float
    precision: str | None = None  # of the four products: see ops.linear


class WatchedLayers(list[LayerWeights]):
    """Layers that somebody watches, who makes another list when one of their tensors is another or has been written to.

    So what was found out about them holds for as long as the list does, and is not found out again at each call. What
    no version counter sees, a write through `.data`, he need not see either.
    """

    watched = True  # by which backends know


def encoder(
    x: Tensor, layers: Sequence[LayerWeights], cu_seqlens: Tensor, max_seqlen: int, *, checked: bool = False
) -> Tensor:
    """Runs all layers over packed tokens, without dropout: (T, E) -> (T, E).

    `cu_seqlens`, `max_seqlen` and `checked` are as of `attention`.

    Raises:
        ValueError: a shape, dtype or precision that does not fit, or offsets.
    """
    check_floating("encoder", "x", x)
    if not checked:
        check_offsets("encoder", cu_seqlens, len(x), max_seqlen)
    for weights in layers[:1] if isinstance(layers, WatchedLayers) else layers:  # a backend asks the rest
        check_shape("encoder", "x", x, (None, weights.qkv_weight.shape[1]))
        check_precision("encoder", weights.precision, x, *weights[:12])
    if torch.compiler.is_compiling():  # each op knows what a compiled graph can hold
        return _layers(x, layers, cu_seqlens, max_seqlen)
    _, run = backend.choose("encoder", x.device.type, x, layers, cu_seqlens, max_seqlen)
    return run(x, layers, cu_seqlens, max_seqlen)


def release(w: LayerWeights) -> LayerWeights:
    """`w` for inference alone: where its backend reads weights in a form of its own, they give up their memory.

    In their place come tensors on the meta device, by which the backend finds that form; elsewhere it is `w`.
    """
    x = w.norm_weight.new_empty((1, len(w.norm_weight)))
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=x.device)
    name, _ = backend.choose("encoder", x.device.type, x, [w], cu_seqlens, 1)
    return native.release(w) if name == "native" else w


def _reference(x: Tensor, layers: Sequence[LayerWeights], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    with shared_schedules():
        return _layers(x, layers, cu_seqlens, max_seqlen)


def _layers(x: Tensor, layers: Sequence[LayerWeights], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    for w in layers:
        qkv = linear(x, w.qkv_weight, w.qkv_bias, precision=w.precision).unflatten(1, (3, w.num_heads, -1))
        context = attention(qkv, cu_seqlens, max_seqlen, checked=True).flatten(1)
        y = linear(context, w.attention_weight, w.attention_bias, precision=w.precision)
        x = add_layer_norm(y, x, w.attention_norm_weight, w.attention_norm_bias, eps=w.eps)
        y = linear(x, w.up_weight, w.up_bias, activation=w.activation, precision=w.precision)
        y = linear(y, w.down_weight, w.down_bias, precision=w.precision)
        x = add_layer_norm(y, x, w.norm_weight, w.norm_bias, eps=w.eps)
    return x


def _describe_native(x: Tensor, layers: Sequence[LayerWeights], cu_seqlens: Tensor, max_seqlen: int) -> str | None:
    return native.describe_precision(layers[0].precision)


backend.implement("encoder", "native", native.encoder, native.supports_encoder, _describe_native)
backend.implement("encoder", "reference", _reference)
