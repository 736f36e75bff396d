"""embed_layer_norm: y = dropout(LN(word[id] + token_type[id] + position[id])), the embedding layer of a BERT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.native import supports_embed_layer_norm
from fastbert.ops import dispatch
from fastbert.ops._checks import (
    check_floating,
    check_integer,
    check_norm_dtypes,
    check_probability,
    check_shape,
)
from fastbert.ops.embed_layer_norm.native import run_native
from fastbert.ops.embed_layer_norm.triton import run_triton, supports_triton
from fastbert.reference import embed_layer_norm as reference_embed_layer_norm

dispatch.implement("embed_layer_norm", "triton", run_triton, supports_triton)
dispatch.implement("embed_layer_norm", "native", run_native, supports_embed_layer_norm)
dispatch.implement("embed_layer_norm", "reference", reference_embed_layer_norm)


def embed_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
) -> Tensor:
    """Gathers three tables, adds them, normalises: (T,) ids -> (T, E).

    Args:
        input_ids, token_type_ids, position_ids: (T,) int64 or int32, within their tables.
        word, token_type, position: tables (V, E), (types, E), (P, E) of one dtype.
        weight, bias: the LayerNorm's, (E,).
        padding_idx: the row of `word` that receives no gradient.

    An id outside its table is never read. In the Triton version, which does not wait for the device, its token's row
    is NaN; the reference fails like torch's embedding. The models check their input first.

    Raises:
        ValueError: a shape, dtype or probability that does not fit; on the native backend, an id outside its table.
    """
    op, width = "embed_layer_norm", word.shape[-1]
    if input_ids.dim() != 1:
        check_shape(op, "input_ids", input_ids, (None,))
    for name, ids in (("input_ids", input_ids), ("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids.shape != input_ids.shape:
            check_shape(op, name, ids, (input_ids.shape[0],))
        if ids.dtype != torch.int64:
            check_integer(op, name, ids)
    for name, table in (("word", word), ("token_type", token_type), ("position", position)):
        if not table.is_floating_point():
            check_floating(op, name, table)
        if table.dim() != 2 or table.shape[1] != width:
            check_shape(op, name, table, (None, width))
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (width,):
            check_shape(op, name, vector, (width,))
    if dropout_p:
        check_probability(op, "dropout_p", dropout_p)
    args = (input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias)
    kwargs: dict[str, Any] = {"eps": eps, "dropout_p": dropout_p, "padding_idx": padding_idx}
    summed = {"word": word, "token_type": token_type, "position": position}
    if torch.compiler.is_compiling():  # pointers cannot be traced; the reference can, and the compiler fuses it
        check_norm_dtypes(op, summed, weight, bias)
        return reference_embed_layer_norm(*args, **kwargs)
    name, run = dispatch.choose(op, word.device.type, *args, **kwargs)
    if name == "reference":
        check_norm_dtypes(op, summed, weight, bias)
    return run(*args, **kwargs)
