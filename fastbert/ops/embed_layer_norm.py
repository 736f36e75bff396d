"""embed_layer_norm: y = dropout(LN(word[id] + token_type[id] + position[id])), the bottom of a BERT."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import backend, native, reference
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import (
    check_floating,
    check_ids,
    check_integer,
    check_norm_dtypes,
    check_probability,
    check_shape,
)
from fastbert.ops._triton import reason_against, rows_in_memory

_MAX_COLUMNS = 8192  # a row in registers; more would spill


def _second(
    ctx: Any, dy: Tensor, inputs: tuple[Tensor, ...], *, dropout_p: float, padding_idx: int | None
) -> tuple[Tensor | None, ...]:
    forward = partial(reference.embed_layer_norm, eps=ctx.eps, padding_idx=padding_idx)
    needed = [False] * 3 + list(ctx.needs_input_grad[3:8])
    return *differentiable_gradients("embed_layer_norm", forward, inputs, needed, dy, dropout_p), None, None, None


class _TritonEmbedLayerNorm(torch.autograd.Function):
    """Keeps three numbers per token: the backward gathers the tables' rows again, and makes the mask again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        from fastbert.kernels.dropout import draw_seed
        from fastbert.kernels.embed_layer_norm import embed_layer_norm_fwd

        *tensors, eps, dropout_p, padding_idx = args
        ids, tables, weight, bias = tuple(tensors[:3]), tuple(tensors[3:6]), *tensors[6:]
        seed = draw_seed(weight.device) if dropout_p else None
        y, mean, rstd = embed_layer_norm_fwd(
            ids, tables, weight, bias, seed, eps=eps, dropout_p=dropout_p, training=True
        )
        ctx.save_for_backward(*ids, *tables, weight, mean, rstd, seed, bias)
        ctx.constants, ctx.eps = {"dropout_p": dropout_p, "padding_idx": padding_idx}, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from fastbert.kernels.embed_layer_norm import embed_layer_norm_bwd

        (*saved, bias), wanted = ctx.saved_tensors, ctx.needs_input_grad[3:8]
        if torch.is_grad_enabled():
            return _second(ctx, dy, (*saved[:7], bias), **ctx.constants)
        gradients = embed_layer_norm_bwd(
            rows_in_memory(dy), tuple(saved[:3]), tuple(saved[3:6]), *saved[6:], **ctx.constants, wanted=wanted
        )
        return None, None, None, *gradients, None, None, None


def _triton(*tensors: Tensor, eps: float, dropout_p: float, padding_idx: int | None) -> Tensor:
    from fastbert.kernels.dropout import draw_seed
    from fastbert.kernels.embed_layer_norm import embed_layer_norm_fwd

    tensors = (*(ids.contiguous() for ids in tensors[:3]), *tensors[3:])
    if needs_gradient(*tensors):
        return _TritonEmbedLayerNorm.apply(*tensors, eps, dropout_p, padding_idx)
    *ids_and_tables, weight, bias = tensors
    seed = draw_seed(weight.device) if dropout_p else None
    return embed_layer_norm_fwd(
        tuple(ids_and_tables[:3]), tuple(ids_and_tables[3:]), weight, bias, seed, eps=eps, dropout_p=dropout_p
    )[0]


def _supports_triton(*tensors: Tensor, eps: float, dropout_p: float, padding_idx: int | None) -> str | None:
    floating = tensors[3:]
    reason = reason_against(*floating)
    if reason is not None:
        return reason
    for ids in tensors[:3]:
        if ids.device != floating[0].device:
            return f"ids on {ids.device}, tables on {floating[0].device}; it takes one device"
    if floating[0].shape[1] > _MAX_COLUMNS:
        return f"{floating[0].shape[1]} columns; it takes {_MAX_COLUMNS} at most"
    if any(t.stride(-1) != 1 for t in floating):
        return "the last dimension is not contiguous"
    return None


class _Native(torch.autograd.Function):
    """Keeps two numbers a token: the backward gathers the tables' rows again, and asks for the mask again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.eps, ctx.dropout_p, ctx.seed, ctx.padding_idx = args
        y, statistics = native.embed_layer_norm(
            *tensors, eps=ctx.eps, dropout_p=ctx.dropout_p, seed=ctx.seed, with_statistics=True
        )
        ctx.save_for_backward(*tensors[:-1], statistics, tensors[-1])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (*saved, bias), needed = ctx.saved_tensors, ctx.needs_input_grad[3:8]
        if torch.is_grad_enabled():
            inputs = (*saved[:7], bias)
            return *_second(ctx, dy, inputs, dropout_p=ctx.dropout_p, padding_idx=ctx.padding_idx), None
        gradients = native.embed_layer_norm_backward(
            *(dy, *saved, needed), dropout_p=ctx.dropout_p, seed=ctx.seed, padding_idx=ctx.padding_idx
        )
        return None, None, None, *gradients, None, None, None, None


def _native(*tensors: Tensor, eps: float, dropout_p: float, padding_idx: int | None) -> Tensor:
    seed = native.draw_seed(dropout_p) if dropout_p else 0
    if torch.is_grad_enabled() and needs_gradient(*tensors):
        return _Native.apply(*tensors, eps, dropout_p, seed, padding_idx)
    return native.embed_layer_norm(*tensors, eps=eps, dropout_p=dropout_p, seed=seed)[0]


backend.implement("embed_layer_norm", "triton", _triton, _supports_triton)
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
    validate_ids: bool = False,
) -> Tensor:
    """Gathers three tables, adds them, normalises: (T,) ids -> (T, E).

    Args:
        input_ids, token_type_ids, position_ids: (T,) int64 or int32, within their tables.
        word, token_type, position: tables (V, E), (types, E), (P, E) of one dtype.
        weight, bias: the LayerNorm's, (E,).
        padding_idx: the row of `word` that receives no gradient.
        validate_ids: look at the ids before anything runs. On a GPU the host then waits for them, which a CUDA graph
            cannot; the models' own check of their input does the same.

    An id outside its table is never read from there. Unless `validate_ids` or the native backend raises, its token's
    row is NaN in the Triton version, which does not wait; the reference fails as torch's embedding does.

    Raises:
        ValueError: a shape, dtype or probability that does not fit; on the native backend, or with `validate_ids` on
            any, an id outside its table.
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
    if validate_ids:
        check_ids(op, "input_ids", input_ids, word.shape[0])
        check_ids(op, "token_type_ids", token_type_ids, token_type.shape[0])
        check_ids(op, "position_ids", position_ids, position.shape[0])
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (width,):
            check_shape(op, name, vector, (width,))
    if dropout_p:
        check_probability(op, "dropout_p", dropout_p)
    args = (input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias)
    kwargs: dict[str, Any] = {"eps": eps, "dropout_p": dropout_p, "padding_idx": padding_idx}
    summed = {"word": word, "token_type": token_type, "position": position}
    if torch.compiler.is_compiling():  # pointers cannot be traced; the reference can, and is the compiler's to fuse
        check_norm_dtypes(op, summed, weight, bias)
        return reference.embed_layer_norm(*args, **kwargs)
    name, run = backend.choose(op, word.device.type, *args, **kwargs)
    if name == "reference":
        check_norm_dtypes(op, summed, weight, bias)
    return run(*args, **kwargs)
