"""All layers by the extension, in reused memory."""

from __future__ import annotations

import math
from array import array
from typing import Any

import torch
from torch import Tensor

from fastbert.native.add_layer_norm import supports_add_layer_norm
from fastbert.native.attention import offsets_reason
from fastbert.native.attention_bwd import bias_arguments, held_bias
from fastbert.native.extension import (
    ACTIVATIONS,
    CPU_DTYPES,
    PRECISIONS,
    C,
    chosen_isa,
    cpu_reason,
    fresh,
    keep,
    workspace,
)
from fastbert.native.linear import supports_linear
from fastbert.native.packed_weights import packed


def supports_encoder(
    x: Tensor, weights: Any, cu_seqlens: Tensor, max_seqlen: int, *, bias: Tensor | None = None
) -> str | None:
    """None if `encoder` takes these arguments, else the reason why not."""
    if not weights.layers:
        return "no layers"
    if reason := cpu_reason(x):
        return reason
    if torch.is_grad_enabled() and any(t.requires_grad for w in weights.layers for t in (x, *w.tensors)):
        return "no backward of the whole; its ops have one"
    if not x.is_contiguous():
        return "x not contiguous"
    if reason := offsets_reason(cu_seqlens):
        return f"attention: {reason}"
    if bias is not None and (not bias.is_cpu or (torch.is_grad_enabled() and bias.requires_grad)):
        return "a bias that needs a gradient, or is not on the CPU"
    key = "reason", x.dtype, x.shape[1]
    found = weights.forms.get(key)
    return (found or weights.form(key, lambda: (_why_not(x, weights.layers),)))[0]


def _why_not(x: Tensor, layers: Any) -> str | None:
    """Why C++ cannot take these layers; None if it can."""
    width, heads = x.shape[1], layers[0].num_heads
    if width % (2 * heads):
        return f"width {width} with {heads} heads"
    for name in ("precision", "activation", "num_heads", "eps"):
        if any(getattr(w, name) != getattr(layers[0], name) for w in layers):
            return f"layers that differ in {name}"
    for w in layers:
        wide = fresh(x, 1, w.up.shape[0])
        for weight, example in zip(w.products, (x, x, x, wide), strict=True):
            if reason := supports_linear(example, weight, activation=w.activation, precision=w.precision):
                return f"linear: {reason}"
        for weight, bias in (w.out_norm, w.norm):
            if reason := supports_add_layer_norm(x, x, weight, bias, eps=w.eps):
                return f"add_layer_norm: {reason}"
    return None


def descriptors(weights: Any) -> tuple[array, list[Tensor]]:
    """The 64-bit words per layer that csrc/bindings/encoder.cpp takes, and the packed weights they point into."""
    key = "descriptors", chosen_isa()[1]
    found = weights.forms.get(key)
    return weights.form(key, lambda: _descriptors(weights.layers)) if found is None else found


def _descriptors(layers: Any) -> tuple[array, list[Tensor]]:
    words, held = array("Q"), []
    for w in layers:
        weights = [packed(weight, w.precision) for weight in w.products]
        words.extend([*(t.data_ptr() for t in (*weights, *w.out_norm, *w.norm)), w.up.shape[0]])
        held += weights
    return words, held


def scale_log2(head_size: int) -> float:
    """The scale of attention's scores, for a softmax in powers of two."""
    return head_size**-0.5 * math.log2(math.e)


def encoder(x: Tensor, weights: Any, cu_seqlens: Tensor, max_seqlen: int, *, bias: Tensor | None = None) -> Tensor:
    """All layers over packed tokens, (T, E) -> (T, E), in a workspace that the thread reuses.

    Writing to fresh memory costs a page fault every 4 KiB, up to half the time of a product.
    """
    (T, E), first, (_, isa), threads = x.shape, weights.layers[0], chosen_isa(), torch.get_num_threads()
    # Referenced until the call is over: another thread may drop a weight's forms meanwhile.
    words, _held = descriptors(weights)
    kind, shape = (CPU_DTYPES[x.dtype], PRECISIONS[first.precision]), (T, E, first.num_heads)
    where = len(weights.layers), words.buffer_info()[0]
    memory, address = workspace(C.encoder_workspace_bytes(*kind, *shape, *where, isa, threads))
    y, held = fresh(x, T, E), held_bias(bias)
    C.encoder_cpu(
        *kind,
        ACTIVATIONS[first.activation],
        *shape,
        len(cu_seqlens) - 1,
        *where,
        cu_seqlens.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        address,
        first.eps,
        scale_log2(E // first.num_heads),
        *bias_arguments(held),
        isa,
        threads,
    )
    keep(memory)
    return y
