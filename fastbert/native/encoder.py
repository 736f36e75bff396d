"""All layers by the extension, in memory that is used again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.native.add_layer_norm import add_layer_norm_into, supports_add_layer_norm
from fastbert.native.attention import attention_into, supports_attention
from fastbert.native.extension import C, available
from fastbert.native.linear import linear_into, supports_linear


def supports_encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> str | None:
    """None where `encoder` takes these arguments, else the reason why not."""
    if C is None:
        return available()
    if not layers:
        return "no layers"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *_tensors(layers))):
        return "no backward of the whole; its ops have one"
    if x.device.type != "cpu":
        return f"device {x.device.type}"
    w = layers[0]
    width = x.shape[1]
    if not x.is_contiguous() or width % (2 * w.num_heads) or w.up_weight.shape[0] < width:
        return f"width {width} with {w.num_heads} heads and {w.up_weight.shape[0]} between"
    qkv = x.new_empty((1, 3, w.num_heads, width // w.num_heads))
    if reason := supports_attention(qkv, cu_seqlens, max_seqlen):
        return f"attention: {reason}"
    for w in layers:
        wide = x.new_empty((1, w.up_weight.shape[0]))
        for weight, bias, example in (
            (w.qkv_weight, w.qkv_bias, x),
            (w.attention_weight, w.attention_bias, x),
            (w.up_weight, w.up_bias, x),
            (w.down_weight, w.down_bias, wide),
        ):
            if reason := supports_linear(example, weight, bias, activation=w.activation):
                return f"linear: {reason}"
        for weight, bias in ((w.attention_norm_weight, w.attention_norm_bias), (w.norm_weight, w.norm_bias)):
            if reason := supports_add_layer_norm(x, x, weight, bias, eps=w.eps):
                return f"add_layer_norm: {reason}"
    return None


def _tensors(layers: Sequence[Any]) -> list[Tensor]:
    return [t for layer in layers for t in layer if isinstance(t, Tensor)]


def encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """All layers over packed tokens, (T, E) -> (T, E): the ops above, in memory that is used again and again.

    What an op writes into fresh memory costs a page fault every 4 KiB, up to half the time of a product.
    """
    T, E = x.shape
    heads = layers[0].num_heads
    between = max(w.up_weight.shape[0] for w in layers)
    qkv, up, a, b, c = _arena(x.dtype, *((T, n) for n in (3 * E, between, E, E, E)))
    context = up.view(-1)[: T * E].view(T, E)  # dead before `up` is written
    y = torch.empty_like(x)
    for w in layers:
        out = y if w is layers[-1] else c
        linear_into(qkv, x, w.qkv_weight, w.qkv_bias, None)
        split = qkv.view(T, 3, heads, E // heads)
        attention_into(context, split, cu_seqlens, (E // heads) ** -0.5)
        linear_into(a, context, w.attention_weight, w.attention_bias, None)
        add_layer_norm_into(b, a, x, w.attention_norm_weight, w.attention_norm_bias, w.eps)
        middle = up.view(-1)[: T * w.up_weight.shape[0]].view(T, w.up_weight.shape[0])
        linear_into(middle, b, w.up_weight, w.up_bias, w.activation)
        linear_into(a, middle, w.down_weight, w.down_bias, None)
        add_layer_norm_into(out, a, b, w.norm_weight, w.norm_bias, w.eps)
        x = out
    return y


_ARENA_KEPT = 64 << 20  # bytes of workspace that a thread keeps between calls
_arenas = threading.local()


def _arena(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """Uninitialised tensors out of one allocation, which the thread keeps for its next call unless it is large."""
    sizes = [-(-rows * columns * dtype.itemsize // 64) * 64 for rows, columns in shapes]
    memory = getattr(_arenas, "memory", None)
    if memory is None or memory.numel() < sum(sizes):
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        _arenas.memory = memory if sum(sizes) <= _ARENA_KEPT else None
    parts = memory[: sum(sizes)].split(sizes)
    return [
        part[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
        for part, (rows, columns) in zip(parts, shapes, strict=True)
    ]
