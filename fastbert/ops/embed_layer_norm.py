"""embed_layer_norm: y = dropout(LN(word[id] + token_type[id] + position[id])), the bottom of a BERT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import backend, native, reference
from fastbert.ops._checks import check_integer, check_probability, check_shape


class _Native(torch.autograd.Function):
    """Keeps two numbers a token: the backward gathers the tables' rows again, and asks for the mask again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, eps, ctx.dropout_p, ctx.seed, ctx.padding_idx = args
        y, statistics = native.embed_layer_norm(
            *tensors, eps=eps, dropout_p=ctx.dropout_p, seed=ctx.seed, with_statistics=True
        )
        ctx.save_for_backward(*tensors[:-1], statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:8]
        gradients = native.embed_layer_norm_backward(
            dy, *ctx.saved_tensors, needed, dropout_p=ctx.dropout_p, seed=ctx.seed, padding_idx=ctx.padding_idx
        )
        return None, None, None, *gradients, None, None, None, None


def _native(*tensors: Tensor, eps: float, dropout_p: float, padding_idx: int | None) -> Tensor:
    seed = native.draw_seed(dropout_p)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Native.apply(*tensors, eps, dropout_p, seed, padding_idx)
    return native.embed_layer_norm(*tensors, eps=eps, dropout_p=dropout_p, seed=seed)[0]


backend.implement("embed_layer_norm", "native", _native, native.supports_embed_layer_norm)
backend.implement("embed_layer_norm", "reference", reference.embed_layer_norm)


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

    Raises:
        ValueError: a shape, dtype or probability that does not fit; on the native backend, an id outside its table.
    """
    op, width = "embed_layer_norm", word.shape[-1]
    check_shape(op, "input_ids", input_ids, (None,))
    for name, ids in (
        ("input_ids", input_ids),
        ("token_type_ids", token_type_ids),
        ("position_ids", position_ids),
    ):
        check_shape(op, name, ids, (input_ids.shape[0],))
        check_integer(op, name, ids)
    for name, table in (("word", word), ("token_type", token_type), ("position", position)):
        check_shape(op, name, table, (None, width))
    check_shape(op, "weight", weight, (width,))
    check_shape(op, "bias", bias, (width,))
    check_probability(op, "dropout_p", dropout_p)
    args = (input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias)
    kwargs = {"eps": eps, "dropout_p": dropout_p, "padding_idx": padding_idx}
    if torch.compiler.is_compiling():  # pointers cannot be traced; the reference can, and is the compiler's to fuse
        return reference.embed_layer_norm(*args, **kwargs)
    _, run = backend.choose(op, word.device.type, *args, **kwargs)
    return run(*args, **kwargs)
