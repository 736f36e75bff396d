"""A whole model over a padded batch by the extension: packing, embeddings, layers and pooler in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.engine.memory import KEPT, keep, workspace
from fastbert.native.attention_bwd import bias_arguments, held_bias
from fastbert.native.embed_layer_norm import supports_embed_layer_norm
from fastbert.native.encoder import address, descriptors, encoder_kind, supports_encoder
from fastbert.native.extension import C, chosen_isa, fresh
from fastbert.native.linear import supports_linear
from fastbert.native.packed_weights import packed
from fastbert.native.packing import MASK_BITS

_MOST = 2**31 - 1  # limit of a batch's positions


class BatchEncoder(NamedTuple):
    """A model as C++ takes it."""

    model: Any  # C.BatchEncoder
    table: Tensor  # one of its embedding tables, (rows, E)
    has_pooler: bool
    held: list[Any]  # what it points into


def supports_encode_batch(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None
) -> bool:
    """True if `encode_batch` takes these: int64 (B, S) on the CPU, and a mask that the extension reads."""
    if C is None or torch.is_autocast_enabled("cpu"):
        return False
    shape = input_ids.shape
    for x in (input_ids, attention_mask, token_type_ids, position_ids):
        if x is None:
            continue
        if type(x) is not Tensor or not x.is_cpu or x.layout is not torch.strided or x.is_neg():
            return False
        if x.shape != shape or not x.is_contiguous():
            return False
        if x.dtype is not torch.int64 and (x is not attention_mask or x.dtype not in MASK_BITS):
            return False
    return len(shape) == 2 and 0 < input_ids.numel() <= _MOST


def batch_encoder(weights: Any) -> BatchEncoder | None:
    """The model of an ops.BatchWeights; None if the extension cannot run all of it.

    The result is a form of `weights.layers`, whose owner drops its forms after a write to any of the weights.
    """
    key, layers = ("batch", chosen_isa()[1]), weights.layers
    found = layers.forms.get(key)
    return (found or layers.form(key, lambda: (_batch_encoder(weights),)))[0]


def _batch_encoder(weights: Any) -> BatchEncoder | None:
    (word, given_types, given_position), (norm, given_bias), eps, layers, pooler, places = weights
    width = word.shape[1]
    none = torch.zeros(1, width, dtype=word.dtype, device=word.device)
    types, position, bias = (none if t is None else t for t in (given_types, given_position, given_bias))
    bias = bias.flatten()
    ids, offsets = fresh(word, 1, dtype=torch.int64), fresh(word, 2, dtype=torch.int32)
    state = fresh(word, 1, width)
    if supports_embed_layer_norm(ids, ids, ids, word, types, position, norm, bias, eps=eps):
        return None
    if supports_encoder(state, layers, offsets, 1):
        return None
    if pooler is not None and (pooler.shape != (width, width) or supports_linear(state, pooler, activation="tanh")):
        return None
    words, held = descriptors(layers)
    last = None if pooler is None else packed(pooler)
    model = C.BatchEncoder(
        encoder_kind(layers, width, word.dtype),
        len(layers.layers),
        words.buffer_info()[0],
        *((table.data_ptr(), table.shape[0], table.stride(0)) for table in (word, types, position)),
        norm.data_ptr(),
        bias.data_ptr(),
        eps,
        address(last),
        0 if given_position is not None else places,
    )
    # Another thread may drop the weights' forms during a call.
    return BatchEncoder(
        model, word, pooler is not None, [words, *held, last, word, types, position, norm, bias, layers.final_norm]
    )


def encode_batch(
    encoder: BatchEncoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    pad_id: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """The states (B, S, E), zeros at pads, and tanh(W h + b) of each row's first token, (B, E).

    With `pad_id`, masked positions of a row must hold it, and no row with tokens may begin with one.

    Returns:
        None for arguments that this does not take, among them all invalid ones, and for a batch whose workspace, of a
        size for B * S tokens, would not be kept for the next call. The caller has checked `supports_encode_batch`.
    """
    (B, S), (model, table, has_pooler, _) = input_ids.shape, encoder
    isa, threads, mask = chosen_isa()[1], torch.get_num_threads(), attention_mask
    needed = model.workspace_bytes(B, S, isa, threads)
    if needed > KEPT:
        return None
    memory, held = workspace(needed), None if bias is None else held_bias(bias)
    states, pooled = fresh(table, B, S, table.shape[1]), fresh(table, B, table.shape[1]) if has_pooler else None
    done = model.run(
        B,
        S,
        *((0, 0, 0, 0) if mask is None else (mask.element_size(), *MASK_BITS[mask.dtype], mask.data_ptr())),
        input_ids.data_ptr(),
        0 if token_type_ids is None else token_type_ids.data_ptr(),
        0 if position_ids is None else position_ids.data_ptr(),
        -1 if pad_id is None else pad_id,
        states.data_ptr(),
        0 if pooled is None else pooled.data_ptr(),
        memory.start,
        *((0, 0) if held is None else bias_arguments(held)),
        isa,
        threads,
    )
    keep(memory)
    return (states, pooled) if done else None
