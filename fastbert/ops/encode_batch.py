"""encode_batch: a whole model over a padded batch in one call, for inference on the CPU.

It has no reference and is in no table of backends: where it does not take a call, the caller runs the other ops.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastbert import native
from fastbert.ops import dispatch
from fastbert.ops.encoder import EncoderWeights
from fastbert.weight import Weight


class BatchWeights(NamedTuple):
    """A model's weights."""

    tables: tuple[
        Tensor, Tensor | None, Tensor | None
    ]  # of words and, if there are any, token types, positions; (rows, E)
    norm: tuple[Tensor, Tensor | None]  # weight and bias (E,) of the embeddings' norm
    eps: float  # of that norm
    layers: EncoderWeights
    pooler: Weight | None  # (E, E)
    places: int  # positions are below this


def encode_batch(
    weights: BatchWeights,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    pad_id: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """Runs embeddings, layers and pooler over the real tokens, without dropout.

    The caller has checked that there is no gradient, trace, mode or compiler. What C++ takes is a form of
    `weights.layers`, so everything else must be the same whenever those are.

    Args:
        weights: of the model.
        input_ids: (B, S) int64, as are token_type_ids and position_ids.
        attention_mask: (B, S) of 0 and 1; None means no pads.
        pad_id: not negative; where it is given, masked positions of a row must hold it, and no row with tokens may
            begin with one.
        bias: as for `attention`. With it or a window, no pad may stand between two tokens of a row.

    Returns:
        The states (B, S, E), zeros at pads, and the pooled ones (B, E) or None; or None for a call that this does not
        take: an invalid one, on another device, under autocast or another demanded backend.
    """
    if not set(dispatch.demands().values()) <= {"native", "auto"}:
        return None
    if not native.supports_encode_batch(input_ids, attention_mask, token_type_ids, position_ids):
        return None
    encoder = native.batch_encoder(weights)
    if encoder is None:
        return None
    return native.encode_batch(encoder, input_ids, attention_mask, token_type_ids, position_ids, pad_id, bias)
