"""All layers by the extension, in reused memory."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from fastbert.engine import encoder as engine
from fastbert.engine.memory import keep, workspace
from fastbert.native.add_layer_norm import supports_add_layer_norm
from fastbert.native.attention import offsets_reason
from fastbert.native.attention_bwd import bias_arguments, held_bias
from fastbert.native.extension import CPU_DTYPES, C, chosen_isa, cpu_reason, fresh
from fastbert.native.linear import supports_linear
from fastbert.native.packed_weights import packed
from fastbert.native.rotary import supports_rotary


def supports_encoder(
    x: Tensor,
    weights: Any,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    picked: Tensor | None = None,
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
    return (found or weights.form(key, lambda: (_why_not(x, weights),)))[0]


def _why_not(x: Tensor, weights: Any) -> str | None:
    """Why C++ cannot take these layers; None if it can."""
    layers, width = weights.layers, x.shape[1]
    first = layers[0]
    if width % (2 * first.num_heads):
        return f"width {width} with {first.num_heads} heads"
    for name in ("precision", "activation", "num_heads", "key_heads", "eps", "gated", "pre_norm", "rms"):
        if any(getattr(w, name) != getattr(first, name) for w in layers):
            return f"layers that differ in {name}"
    if first.pre_norm != (weights.final_norm is not None) or (
        first.key_heads != first.num_heads and first.rotary is None
    ):
        return "norms before without one at the end, or grouped heads without rotary positions"
    for i, w in enumerate(layers):
        wide = fresh(x, 1, w.down.shape[1])
        for weight, example in zip(w.products, (x, x, x, wide), strict=True):
            gated = w.gated and weight is w.up
            if reason := supports_linear(example, weight, activation=w.activation, precision=w.precision, gated=gated):
                return f"linear: {reason}"
        if w.attention_norm is None and (i or not w.pre_norm):
            return "no norm at attention"
        for norm in filter(None, (w.attention_norm, w.norm, weights.final_norm)):
            if reason := supports_add_layer_norm(x, x, *norm, eps=w.eps):
                return f"add_layer_norm: {reason}"
        example = fresh(x, 1, w.num_heads + 2 * w.key_heads, width // w.num_heads)
        where = fresh(x, 1, dtype=torch.int64)
        if w.rotary is not None and (reason := supports_rotary(example, w.rotary, where, w.num_heads)):
            return f"rotary: {reason}"
    return None


def descriptors(weights: Any) -> tuple[array, list[Tensor]]:
    """The 64-bit words per layer that csrc/bindings/encoder.cpp takes, and the packed weights they point into."""
    key = "descriptors", chosen_isa()[1]
    found = weights.forms.get(key)
    return weights.form(key, lambda: _descriptors(weights.layers)) if found is None else found


def _descriptors(layers: Any) -> tuple[array, list[Tensor]]:
    words, held = array("Q"), []
    for w in layers:
        weights = [packed(weight, w.precision, w.gated and weight is w.up) for weight in w.products]
        norms = (*(w.attention_norm or (None, None)), *w.norm, w.rotary)
        places = [*map(address, norms)]
        layer = engine.LayerPlaces(
            [*map(address, weights)],
            *((places[0], places[1]), (places[2], places[3]), places[4]),
            *(w.down.shape[1], w.window),
        )
        words.extend(layer.words())
        held += [*weights, *(t for t in norms if t is not None)]
    return words, held


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def encoder_kind(weights: Any, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of all layers, as C++ takes them."""
    w = weights.layers[0]
    weight, bias = map(address, weights.final_norm or (None, None))
    return engine.encoder_kind(
        CPU_DTYPES[dtype],
        precision=w.precision,
        activation=w.activation,
        gated=w.gated,
        pre_norm=w.pre_norm,
        rms=w.rms,
        width=width,
        heads=w.num_heads,
        key_heads=w.key_heads,
        eps=w.eps,
        final_norm=(weight, bias),
    )


def encoder(
    x: Tensor,
    weights: Any,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    picked: Tensor | None = None,
) -> Tensor:
    """All layers over packed tokens, (T, E) -> (T, E) or (P, E), in a workspace that the thread reuses.

    Writing to fresh memory costs a page fault every 4 KiB, up to half the time of a product.
    """
    (T, E), (_, isa), threads = x.shape, chosen_isa(), torch.get_num_threads()
    # Referenced until the call is over: another thread may drop a weight's forms meanwhile.
    words, _held = descriptors(weights)
    what = encoder_kind(weights, E, x.dtype), len(weights.layers), words.buffer_info()[0], T
    P = 0 if picked is None else len(picked)
    memory = workspace(C.encoder_workspace_bytes(*what, P, isa, threads))
    y, held = fresh(x, T, E), held_bias(bias)
    C.encoder_cpu(
        *what,
        len(cu_seqlens) - 1,
        *map(address, (cu_seqlens, x, y)),
        memory.start,
        *bias_arguments(held),
        address(positions),
        address(picked),
        P,
        isa,
        threads,
    )
    keep(memory)
    return y if picked is None else y[:P]
