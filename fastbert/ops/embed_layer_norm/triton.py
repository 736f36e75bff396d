"""embed_layer_norm by Triton: its autograd function, and what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops._autograd import needs_gradient
from fastbert.ops._triton import draw_seed, reason_against, rows_in_memory
from fastbert.ops.embed_layer_norm.reference import second_derivative

_MAX_COLUMNS = 8192  # a row in registers; more would spill


class _TritonEmbedLayerNorm(torch.autograd.Function):
    """Saves mean, in two parts, and rstd per token: the backward gathers the tables' rows and draws the mask again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
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
            return second_derivative(ctx, dy, (*saved[:7], bias), **ctx.constants)
        gradients = embed_layer_norm_bwd(
            rows_in_memory(dy), tuple(saved[:3]), tuple(saved[3:6]), *saved[6:], **ctx.constants, wanted=wanted
        )
        return None, None, None, *gradients, None, None, None


def run_triton(*tensors: Tensor, eps: float, dropout_p: float, padding_idx: int | None) -> Tensor:
    from fastbert.kernels.embed_layer_norm import embed_layer_norm_fwd

    tensors = (*(ids.contiguous() for ids in tensors[:3]), *tensors[3:])
    if needs_gradient(*tensors):
        return _TritonEmbedLayerNorm.apply(*tensors, eps, dropout_p, padding_idx)
    *ids_and_tables, weight, bias = tensors
    seed = draw_seed(weight.device) if dropout_p else None
    return embed_layer_norm_fwd(
        tuple(ids_and_tables[:3]), tuple(ids_and_tables[3:]), weight, bias, seed, eps=eps, dropout_p=dropout_p
    )[0]


def supports_triton(*tensors: Tensor, eps: float, dropout_p: float, padding_idx: int | None) -> str | None:
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
