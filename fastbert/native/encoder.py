"""All layers by the extension, in memory that is used again."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.native.add_layer_norm import supports_add_layer_norm
from fastbert.native.attention import supports_attention
from fastbert.native.extension import ACTIVATIONS, CPU_DTYPES, PRECISIONS, C, available, chosen_isa
from fastbert.native.linear import supports_linear
from fastbert.native.packed_weights import packed


def supports_encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> str | None:
    """None where `encoder` takes these arguments, else the reason why not."""
    if C is None:
        return available()
    if not layers:
        return "no layers"
    if x.device.type != "cpu":
        return f"device {x.device.type}"
    w = layers[0]
    width = x.shape[1]
    if not x.is_contiguous() or width % (2 * w.num_heads):
        return f"width {width} with {w.num_heads} heads"
    for name in ("precision", "activation", "num_heads", "eps"):
        if any(getattr(other, name) != getattr(w, name) for other in layers):
            return f"layers that differ in {name}"
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
            if reason := supports_linear(example, weight, bias, activation=w.activation, precision=w.precision):
                return f"linear: {reason}"
        for weight, bias in ((w.attention_norm_weight, w.attention_norm_bias), (w.norm_weight, w.norm_bias)):
            if reason := supports_add_layer_norm(x, x, weight, bias, eps=w.eps):
                return f"add_layer_norm: {reason}"
    return None


def encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """All layers over packed tokens, (T, E) -> (T, E), in memory that the thread uses again and again.

    What is written into fresh memory costs a page fault every 4 KiB, up to half the time of a product.
    """
    (T, E), first, (_, isa), threads = x.shape, layers[0], chosen_isa(), torch.get_num_threads()
    precision = first.precision
    # Held until the call is over: another thread may pack a weight anew meanwhile.
    held, words = [], []
    for w in layers:
        weights = [
            packed(weight, bias, precision)
            for weight, bias in (
                (w.qkv_weight, w.qkv_bias),
                (w.attention_weight, w.attention_bias),
                (w.up_weight, w.up_bias),
                (w.down_weight, w.down_bias),
            )
        ]
        held += weights
        norms = (w.attention_norm_weight, w.attention_norm_bias, w.norm_weight, w.norm_bias)
        words += [t.data_ptr() for t in (*weights, *norms)]
        words.append(w.up_weight.shape[0])
    kind, shape = (CPU_DTYPES[x.dtype], PRECISIONS[precision]), (T, E, first.num_heads)
    workspace = _arena(C.encoder_workspace_bytes(*kind, *shape, words, isa, threads))
    y = torch.empty_like(x)
    C.encoder_cpu(
        *kind,
        ACTIVATIONS[first.activation],
        *shape,
        len(cu_seqlens) - 1,
        words,
        cu_seqlens.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        workspace.data_ptr(),
        first.eps,
        (E // first.num_heads) ** -0.5 * math.log2(math.e),
        isa,
        threads,
    )
    return y


_ARENA_KEPT = 64 << 20  # bytes of workspace that a thread keeps between calls
_arenas = threading.local()


def _arena(size: int) -> Tensor:
    """So many bytes without values, aligned to 64, which the thread keeps for its next call unless they are many."""
    memory = getattr(_arenas, "memory", None)
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
        _arenas.memory = memory if size <= _ARENA_KEPT else None
    return memory
