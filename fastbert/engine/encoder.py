"""The arguments of all layers in one call, as csrc/bindings/bindings.h and csrc/bindings/encoder.cpp have it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastbert.engine.library import ACTIVATIONS, PRECISIONS


class LayerPlaces(NamedTuple):
    """The addresses of a layer's parts, 0 for one that it lacks, and its sizes."""

    products: Sequence[int]  # packed: queries with keys and values, out, up, down
    attention_norm: tuple[int, int]  # weight and bias
    norm: tuple[int, int]
    rotary: int  # the table
    inner: int  # width of the feed-forward
    window: int | None  # of attention

    def words(self) -> list[int]:
        """The eleven 64-bit words of a layer."""
        window = (-1 if self.window is None else self.window) % 2**64
        return [*self.products, *self.attention_norm, *self.norm, self.rotary, self.inner, window]


def scale_log2(head_size: int) -> float:
    """The scale of attention's scores, for a softmax in powers of two."""
    return head_size**-0.5 * math.log2(math.e)


def encoder_kind(
    dtype: int,
    *,
    precision: str | None,
    activation: str,
    gated: bool,
    pre_norm: bool,
    rms: bool,
    width: int,
    heads: int,
    key_heads: int,
    eps: float,
    final_norm: tuple[int, int],
) -> tuple[Any, ...]:
    """The arguments that all layers share; `final_norm` holds the addresses of the last norm, or 0."""
    return (
        *(dtype, PRECISIONS[precision], ACTIVATIONS[activation], gated, pre_norm, rms),
        *(width, heads, key_heads, eps, scale_log2(width // heads), *final_norm),
    )
