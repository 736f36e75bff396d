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
from fastbert.ops.rotary import rotary
from fastbert.weight import Forms, Weight


class LayerWeights(NamedTuple):
    """One layer's weights, (out, in) as in nn.Linear, and its constants."""

    qkv: Weight  # ((H + 2G) D, E): query, key, value
    out: Weight  # (E, E)
    # Weight and bias (E,): of the norm after attention or, with `pre_norm`, before it, where there may be none.
    attention_norm: tuple[Tensor, Tensor | None] | None
    up: Weight  # (F, E), gated (2F, E)
    down: Weight  # (E, F)
    norm: tuple[Tensor, Tensor | None]  # after the feed-forward or, with `pre_norm`, before it
    num_heads: int  # H
    activation: str
    eps: float
    precision: str | None = None  # of the four products: see ops.linear
    key_heads: int = 0  # G; 0 in the constructor's call means H
    gated: bool = False  # see ops.linear
    pre_norm: bool = False
    rms: bool = False  # see ops.add_layer_norm
    rotary: Tensor | None = None  # the table of ops.rotary
    window: int | None = None  # see ops.attention

    @property
    def products(self) -> tuple[Weight, ...]:
        return self.qkv, self.out, self.up, self.down

    @property
    def tensors(self) -> list[Tensor]:
        norms = (*(self.attention_norm or ()), *self.norm)
        return [*(t for t in norms if t is not None), *(t for weight in self.products for t in weight.tensors)]


class EncoderWeights(Forms):
    """All layers of an encoder, and the forms that a backend derives from them together, as in `Weight.forms`.

    `final_norm` is that after the last layer, where norms stand before attention and feed-forward.
    """

    def __init__(self, layers: Sequence[LayerWeights], final_norm: tuple[Tensor, Tensor | None] | None = None) -> None:
        super().__init__()
        self.layers = tuple(w if w.key_heads else w._replace(key_heads=w.num_heads) for w in layers)
        self.final_norm = final_norm


def encoder(
    x: Tensor,
    weights: EncoderWeights,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    picked: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Runs all layers over packed tokens, without dropout: (T, E) -> (T, E), or (P, E) of the tokens picked.

    `cu_seqlens`, `max_seqlen`, `bias` and `checked` are as for `attention`; `positions` (T,) are those of `rotary`,
    counted within each sequence if None. Past the last attention only the tokens `picked`, (P,) int64 with
    P <= T, are computed; None means all.

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
    if bias is not None and bias.shape[1] < 2 * max_seqlen - 1:
        raise ValueError(
            f"encoder: bias has {bias.shape[1]} columns; max_seqlen is {max_seqlen}, so there must be at least "
            f"{2 * max_seqlen - 1}"
        )
    tables = [layer.rotary for layer in weights.layers if layer.rotary is not None]
    if tables:
        positions = _positions(x, positions, cu_seqlens, None if checked else min(map(len, tables)))
    if picked is not None:
        picked = _picked(x, picked, checked)
    if torch.compiler.is_compiling():  # each op handles compilation itself
        return _layers(x, weights, cu_seqlens, max_seqlen, bias, positions, picked)
    options = {"bias": bias, "positions": positions, "picked": picked}
    _, run = dispatch.choose("encoder", x.device.type, x, weights, cu_seqlens, max_seqlen, **options)
    return run(x, weights, cu_seqlens, max_seqlen, **options)


def _positions(x: Tensor, given: Tensor | None, cu_seqlens: Tensor, places: int | None) -> Tensor:
    """The positions for rotary; counted within each sequence if none are given, checked against `places`."""
    if given is None:
        lengths = cu_seqlens.diff().long()
        given = torch.arange(len(x), device=x.device) - cu_seqlens[:-1].long().repeat_interleave(lengths)
    check_shape("encoder", "positions", given, (len(x),))
    _check_indices("positions", given, x)
    if places is not None and len(given) and not (given.min() >= 0 and given.max() < places):
        raise ValueError(f"encoder: positions holds {int(given.max())}; the rotary table has {places} rows")
    return given.contiguous()


def _picked(x: Tensor, given: Tensor, checked: bool) -> Tensor:
    check_shape("encoder", "picked", given, (None,))
    _check_indices("picked", given, x)
    if len(given) > len(x):
        raise ValueError(f"encoder: picked has {len(given)} tokens; there are {len(x)}")
    if not checked and len(given) and not (given.min() >= 0 and given.max() < len(x)):
        bad = given[(given < 0) | (given >= len(x))][0]
        raise ValueError(f"encoder: picked holds {int(bad)}; there are {len(x)} tokens")
    return given.contiguous()


def _check_indices(name: str, given: Tensor, x: Tensor) -> None:
    if given.dtype != torch.int64 or given.device != x.device:
        raise ValueError(f"encoder: {name} is {given.dtype} on {given.device}; it must be int64 on {x.device}")


def release(layer: LayerWeights) -> bool:
    """Frees a layer's weights, for inference only, if its backend reads them in a form of its own.

    The weights of its products are then placeholders (meta tensors). Returns True if they were freed.
    """
    x = layer.norm[0].new_empty((1, len(layer.norm[0])))
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=x.device)
    alone = EncoderWeights([layer], layer.norm if layer.pre_norm else None)
    name, _ = dispatch.choose("encoder", x.device.type, x, alone, cu_seqlens, 1)
    if name != "native":
        return False
    for weight in layer.products:
        native.packed(weight, layer.precision, layer.gated and weight is layer.up)
        weight.release()
    return True


def _reference(
    x: Tensor,
    weights: EncoderWeights,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    picked: Tensor | None = None,
) -> Tensor:
    with shared_schedules():
        return _layers(x, weights, cu_seqlens, max_seqlen, bias, positions, picked)


def _layers(
    x: Tensor,
    weights: EncoderWeights,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None,
    positions: Tensor | None,
    picked: Tensor | None,
) -> Tensor:
    added = None  # what is still to be added to x, where norms stand before: in one op with the next norm
    for i, w in enumerate(weights.layers):
        options: dict[str, Any] = {"eps": w.eps, "rms": w.rms}
        normed = x
        if w.pre_norm and w.attention_norm is not None:
            if added is None:
                normed = add_layer_norm(x, None, *w.attention_norm, **options)
            else:
                normed, x = add_layer_norm(added, x, *w.attention_norm, **options, return_sum=True)
        qkv = linear(normed, w.qkv, precision=w.precision).unflatten(1, (w.num_heads + 2 * w.key_heads, -1))
        if w.rotary is None:
            qkv = qkv.unflatten(1, (3, w.num_heads))
        else:
            assert positions is not None
            qkv = rotary(qkv, w.rotary, positions, w.num_heads)
        context = attention(qkv, cu_seqlens, max_seqlen, bias=bias, window=w.window, checked=True).flatten(1)
        if picked is not None and i + 1 == len(weights.layers):
            context, x = context[picked], x[picked]
        y = linear(context, w.out, precision=w.precision)
        if w.pre_norm:
            normed, x = add_layer_norm(y, x, *w.norm, **options, return_sum=True)
        else:
            assert w.attention_norm is not None
            normed = x = add_layer_norm(y, x, *w.attention_norm, **options)
        y = linear(normed, w.up, activation=w.activation, precision=w.precision, gated=w.gated)
        added = linear(y, w.down, precision=w.precision)
        if not w.pre_norm:
            x, added = add_layer_norm(added, x, *w.norm, **options), None
    if added is None:
        return x
    if weights.final_norm is None:
        return x + added
    return add_layer_norm(added, x, *weights.final_norm, eps=weights.layers[-1].eps, rms=weights.layers[-1].rms)


def _describe_native(x: Tensor, weights: EncoderWeights, *given: Any, **options: Any) -> str | None:
    return native.describe_precision(weights.layers[0].precision)


dispatch.implement("encoder", "native", native.encoder, native.supports_encoder, _describe_native)
dispatch.implement("encoder", "reference", _reference)
