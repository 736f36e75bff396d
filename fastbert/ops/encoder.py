"""encoder: every layer over the packed tokens, for inference; composed of other ops unless a backend runs it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops import dispatch
from fastbert.ops._checks import check_floating, check_offsets, check_precision, check_shape
from fastbert.ops.add_layer_norm import add_layer_norm
from fastbert.ops.attention import attention
from fastbert.ops.attention.triton import shared_schedules
from fastbert.ops.linear import linear
from fastbert.weight import Forms, Weight


class LayerWeights(NamedTuple):
    """One layer's weights, (out, in) as in nn.Linear, and its constants."""

    qkv: Weight  # (3E, E): query, key, value
    out: Weight  # (E, E)
    out_norm: tuple[Tensor, Tensor]  # weight and bias (E,)
    up: Weight  # (F, E)
    down: Weight  # (E, F)
    norm: tuple[Tensor, Tensor]  # weight and bias (E,)
    num_heads: int
    activation: str
    eps: float
    precision: str | None = None  # of the four products: see ops.linear

    @property
    def products(self) -> tuple[Weight, ...]:
        return self.qkv, self.out, self.up, self.down

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.out_norm, *self.norm, *(t for weight in self.products for t in weight.tensors)]


class EncoderWeights(Forms):
    """All layers of an encoder, and the forms that a backend derives from them together, as in `Weight.forms`."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        super().__init__()
        self.layers = tuple(layers)


def encoder(
    x: Tensor,
    weights: EncoderWeights,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    bias: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Runs all layers over packed tokens, without dropout: (T, E) -> (T, E).

    `cu_seqlens`, `max_seqlen`, `bias` and `checked` are as for `attention`.

    Raises:
        ValueError: a shape, dtype, precision or offsets that do not fit.
    """
    if not x.is_floating_point():
        check_floating("encoder", "x", x)
    if not checked:
        check_offsets("encoder", cu_seqlens, len(x), max_seqlen)
    for layer in weights.layers[:1]:  # a backend checks the others, once
        if x.dim() != 2 or x.shape[1] != layer.qkv.shape[1]:
            check_shape("encoder", "x", x, (None, layer.qkv.shape[1]))
        if layer.precision is not None:
            check_precision("encoder", layer.precision, x, *layer.tensors)
    if torch.compiler.is_compiling():  # each op handles compilation itself
        return _layers(x, weights, cu_seqlens, max_seqlen, bias)
    _, run = dispatch.choose("encoder", x.device.type, x, weights, cu_seqlens, max_seqlen, bias=bias)
    return run(x, weights, cu_seqlens, max_seqlen, bias=bias)


def release(layer: LayerWeights) -> bool:
    """Frees a layer's weights, for inference only, if its backend reads them in a form of its own.

    The weights of its products are then placeholders (meta tensors). Returns True if they were freed.
    """
    x = layer.norm[0].new_empty((1, len(layer.norm[0])))
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=x.device)
    name, _ = dispatch.choose("encoder", x.device.type, x, EncoderWeights([layer]), cu_seqlens, 1)
    if name != "native":
        return False
    for weight in layer.products:
        native.packed(weight, layer.precision)
        weight.release()
    return True


def _reference(
    x: Tensor, weights: EncoderWeights, cu_seqlens: Tensor, max_seqlen: int, *, bias: Tensor | None = None
) -> Tensor:
    with shared_schedules():
        return _layers(x, weights, cu_seqlens, max_seqlen, bias)


def _layers(x: Tensor, weights: EncoderWeights, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None) -> Tensor:
    for w in weights.layers:
        qkv = linear(x, w.qkv, precision=w.precision).unflatten(1, (3, w.num_heads, -1))
        context = attention(qkv, cu_seqlens, max_seqlen, bias=bias, checked=True).flatten(1)
        y = linear(context, w.out, precision=w.precision)
        x = add_layer_norm(y, x, *w.out_norm, eps=w.eps)
        y = linear(x, w.up, activation=w.activation, precision=w.precision)
        y = linear(y, w.down, precision=w.precision)
        x = add_layer_norm(y, x, *w.norm, eps=w.eps)
    return x


def _describe_native(x: Tensor, weights: EncoderWeights, *given: Any, **options: Any) -> str | None:
    return native.describe_precision(weights.layers[0].precision)


dispatch.implement("encoder", "native", native.encoder, native.supports_encoder, _describe_native)
dispatch.implement("encoder", "reference", _reference)
