"""All layers by the extension, in memory that is used again."""

from __future__ import annotations

import math
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.native import packed_weights
from fastbert.native.add_layer_norm import supports_add_layer_norm
from fastbert.native.attention import offsets_reason
from fastbert.native.extension import ACTIVATIONS, CPU_DTYPES, PRECISIONS, C, available, chosen_isa, cpu_reason, fresh
from fastbert.native.linear import supports_linear
from fastbert.native.packed_weights import extents, packed
from fastbert.native.workspace import keep, workspace

_TENSORS = 12  # the first so many fields of ops.LayerWeights


class _Known(NamedTuple):
    """What was found out about layers, and what their tensors were then; it goes with its owner."""

    owner: weakref.ref
    key: tuple
    found: Any


class _Plan(NamedTuple):
    """What C++ takes of layers: pointers into packed weights, which it holds, made when the originals had a sample."""

    words: array  # of 64 bits
    packed: list[Tensor]
    extents: tuple[list[int], list[int], list[int]]
    sample: int


_reasons: dict[int, _Known] = {}  # found: why the layers cannot be run, or None
_plans: dict[int, _Known] = {}  # found: a _Plan


def _remembered(
    memory: dict[int, _Known],
    layers: Sequence[Any],
    key: tuple,
    find: Callable[[], Any],
    holds: Callable[[Any], bool] = lambda found: True,
) -> Any:
    """find(), or what it returned for the same layers in the same state, where that still `holds`."""
    if getattr(layers, "watched", False):  # see ops.WatchedLayers
        of = layers
    else:
        of, key = layers[0].qkv_weight, (*key, *_state(layers))
    identity = id(of)
    known = memory.get(identity)
    if known is None or known.key != key or not holds(known.found):
        owner = weakref.ref(of, lambda _: memory.pop(identity, None))
        memory[identity] = known = _Known(owner, key, find())
    return known.found


def _state(layers: Sequence[Any]) -> list[Any]:
    """Changes when a layer's tensors are others, or are written to."""
    tensors = [t for w in layers for t in w[:_TENSORS]]
    known = [t for t in tensors if t is not None and not t.is_inference()]  # the others do not count
    state = [*map(id, tensors), *[(t.data_ptr(), t._version, t.shape, t.stride()) for t in known]]
    return [*state, *[constant for w in layers for constant in w[_TENSORS:]]]


def supports_encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> str | None:
    """None where `encoder` takes these arguments, else the reason why not."""
    if C is None:
        return available()
    if not layers:
        return "no layers"
    if reason := cpu_reason(x):
        return reason
    if torch.is_grad_enabled() and any(t.requires_grad for w in layers for t in (x, *w[:_TENSORS]) if t is not None):
        return "no backward of the whole; its ops have one"
    if not x.is_contiguous():
        return "x not contiguous"
    if reason := offsets_reason(cu_seqlens):
        return f"attention: {reason}"
    return _remembered(_reasons, layers, (x.dtype, x.shape[1]), lambda: _why_not(x, layers))


def _why_not(x: Tensor, layers: Sequence[Any]) -> str | None:
    """Why C++ cannot take these layers; None where it can."""
    width, heads = x.shape[1], layers[0].num_heads
    if width % (2 * heads):
        return f"width {width} with {heads} heads"
    for name in ("precision", "activation", "num_heads", "eps"):
        if any(getattr(w, name) != getattr(layers[0], name) for w in layers):
            return f"layers that differ in {name}"
    for w in layers:
        wide = fresh(x, 1, w.up_weight.shape[0])
        for (weight, bias), example in zip(_products(w), (x, x, x, wide), strict=True):
            if reason := supports_linear(example, weight, bias, activation=w.activation, precision=w.precision):
                return f"linear: {reason}"
        for weight, bias in ((w.attention_norm_weight, w.attention_norm_bias), (w.norm_weight, w.norm_bias)):
            if reason := supports_add_layer_norm(x, x, weight, bias, eps=w.eps):
                return f"add_layer_norm: {reason}"
    return None


def _products(w: Any) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """The four weights of a layer, each with its bias."""
    return (
        (w.qkv_weight, w.qkv_bias),
        (w.attention_weight, w.attention_bias),
        (w.up_weight, w.up_bias),
        (w.down_weight, w.down_bias),
    )


def _plan(layers: Sequence[Any]) -> _Plan:
    """For each layer what csrc/bindings/encoder.cpp takes of it."""
    lying = extents(t for w in layers for product in _products(w) for t in product)
    before = C.sample(*lying)
    words, held = array("Q"), []
    for w in layers:
        weights = [packed(weight, bias, w.precision) for weight, bias in _products(w)]
        norms = (w.attention_norm_weight, w.attention_norm_bias, w.norm_weight, w.norm_bias)
        words.extend([*(t.data_ptr() for t in (*weights, *norms)), w.up_weight.shape[0]])
        held += weights
    return _Plan(words, held, lying, before)


def _unwritten(plan: _Plan) -> bool:
    """Whether the originals of its weights have the sample they had: not every write is counted."""
    return C.sample(*plan.extents) == plan.sample


def release(w: Any) -> Any:
    """The layer with stand-ins for its four weights, of which only the packed form is left: see `packed_weights`."""
    names = ("qkv", "attention", "up", "down")
    released = [packed_weights.release(weight, bias, w.precision) for weight, bias in _products(w)]
    return w._replace(**{f"{name}_weight": weight for name, weight in zip(names, released, strict=True)})


def encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """All layers over packed tokens, (T, E) -> (T, E), in memory that the thread uses again and again.

    What is written into fresh memory costs a page fault every 4 KiB, up to half the time of a product.
    """
    (T, E), first, (_, isa), threads = x.shape, layers[0], chosen_isa(), torch.get_num_threads()
    # Held until the call is over: another thread may pack a weight anew meanwhile.
    plan = _remembered(_plans, layers, (isa,), lambda: _plan(layers), _unwritten)
    kind, shape = (CPU_DTYPES[x.dtype], PRECISIONS[first.precision]), (T, E, first.num_heads)
    where = len(layers), plan.words.buffer_info()[0]
    memory, (part,) = workspace((torch.uint8, (C.encoder_workspace_bytes(*kind, *shape, *where, isa, threads),)))
    y = fresh(x, T, E)
    C.encoder_cpu(
        *kind,
        ACTIVATIONS[first.activation],
        *shape,
        len(cu_seqlens) - 1,
        *where,
        cu_seqlens.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        part.data_ptr(),
        first.eps,
        (E // first.num_heads) ** -0.5 * math.log2(math.e),
        isa,
        threads,
    )
    keep(memory)
    return y
