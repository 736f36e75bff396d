"""The encoder: embeddings and layers over packed tokens, on any module tree with transformers' names."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.model.captured import encode_padded, returned
from fastbert.model.inputs import Inputs
from fastbert.model.layer import Attend, Layer, Products, active_dropout
from fastbert.model.layer_calls import run_layer
from fastbert.model.plan import EncoderPlan, encoder_plan
from fastbert.packing import pack, unpack
from fastbert.precision import QUANTIZED, check_precision
from fastbert.reference import attention_to_keys


@dataclass
class Encoded:
    """The output of an encoder: the last states, packed, and on request the states and probabilities of layers.

    The latter are part of the autograd graph: the model computes from the same tensors that the caller gets.
    """

    last_hidden_state: Tensor  # (T, E), or (P, E) of the tokens that were picked
    plan: EncoderPlan  # of this call
    hidden_states: tuple[Tensor, ...] | None = None  # L + 1 in the shape of the caller's tokens
    attentions: tuple[Tensor, ...] | None = None  # L of (B, H, S, S), zero where either token is a pad
    is_picked: bool = False
    shared: bool = False  # whether they are of another model's encoder, equal but for its pooler


def encode(
    bert: nn.Module,
    inputs: Inputs,
    *,
    activation: str,
    precision: str | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    picked: Tensor | None = None,
    plan: EncoderPlan | None = None,
) -> Encoded:
    """Runs embeddings and layers of an encoder over the real tokens.

    With `picked`, (P,) int64, the last states are those of these tokens: past the last attention no others are computed
    unless the states of all layers or a hook show them.
    `precision` is that of ops.linear, for the four products of a layer; everything else runs in the weights' dtype.
    `plan` is the plan of this call, if the caller has it already.
    """
    plan = plan or encoder_plan(bert, Products(activation, precision))
    if precision is not None:
        _check_products(bert, plan, inputs, precision)
    batch = inputs.batch
    states: list[Tensor] = []
    if output_attentions:
        x, attentions = encode_padded(plan, inputs, states if output_hidden_states else None)
        x = inputs.take(states[-1]) if output_hidden_states else pack(x.unflatten(0, inputs.padded_shape), batch)
        return Encoded(pick(x, picked), plan, tuple(states) or None, attentions, picked is not None)

    x, bias = plan.embeddings(inputs), plan.bias()
    by_layer = output_hidden_states or inputs.key_mask is not None
    # More are picked than there are tokens where texts have none. A part that is called as a module sees all tokens.
    is_early = picked is not None and 0 < len(picked) <= len(x) and plan.whole is not None and len(plan.modules) > 0
    early, late = (picked, None) if is_early and not output_hidden_states else (None, picked)
    if plan.whole is not None and not by_layer and _runs_whole(plan, x):
        start = 0.0 if plan.checksums is None else time.perf_counter()
        options = {"bias": bias, "positions": inputs.position_ids, "picked": early}
        x = ops.encoder(x, plan.whole, batch.cu_seqlens, batch.max_seqlen, **options, checked=True)
        if plan.checksums is not None:
            plan.checksums.seconds = time.perf_counter() - start  # limits how many values the next call compares
        return Encoded(pick(x, late), plan, is_picked=picked is not None)
    if not plan.modules and plan.final_norm is not None:
        x = plan.final_norm(x, None)
    x = returned(x, inputs, states) if output_hidden_states else x
    with nullcontext() if torch.compiler.is_compiling() else ops.shared_schedules():
        for i in range(len(plan.modules)):
            is_last = i + 1 == len(plan.modules)
            x = run_layer(plan, i, x, lambda layer: _packed_attend(layer, inputs, bias), early if is_last else None)
            if is_last and plan.final_norm is not None:
                x = plan.final_norm(x, None)
            x = returned(x, inputs, states) if output_hidden_states else x
    return Encoded(pick(x, late), plan, tuple(states) or None, is_picked=picked is not None)


def pick(x: Tensor, picked: Tensor | None) -> Tensor:
    """The rows of x that are picked, or all; zeros where x has none."""
    if picked is None:
        return x
    return x.index_select(0, picked) if len(x) or not len(picked) else x.new_zeros(len(picked), x.shape[1])


def runs_by_pointers() -> bool:
    """True if a call needs no gradient, and no trace, compiler, mode or transform must see its operations."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and ops.pointer_reason() is None


def encode_at_once(
    plan: EncoderPlan,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    pad_id: int | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """The states of a padded batch, (B, S, E), and the pooled ones, (B, E), in one call: see ops.encode_batch.

    None where that op does not take the call, or a part of the model is not plain: `run_bert` runs those. The caller
    has checked `runs_by_pointers`.
    """
    if plan.batch is None or _drops(plan):
        return None
    if active_dropout(plan.embeddings.dropout):
        return None
    start = time.perf_counter()
    bias = plan.bias()
    found = ops.encode_batch(plan.batch, input_ids, attention_mask, token_type_ids, position_ids, pad_id, bias)
    if found is not None and plan.checksums is not None:
        plan.checksums.seconds = time.perf_counter() - start  # limits how many values the next call compares
    return found


def _drops(plan: EncoderPlan) -> bool:
    """True if a dropout of a layer is active."""
    return any([attributes[name] for attributes, name in plan.drops if attributes["training"]])


def _runs_whole(plan: EncoderPlan, x: Tensor) -> bool:
    """True if no gradient is needed and no dropout is active, which layers in one op have not."""
    if _drops(plan):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or any(p.requires_grad for layer in plan.modules for p in layer.parameters()))


def _packed_attend(layer: Layer, inputs: Inputs, bias: Tensor | None) -> Attend:
    batch = inputs.batch
    options: dict[str, Any] = {
        "dropout_p": active_dropout(layer.attention_dropout),
        "bias": bias,
        "window": layer.seen.window,
    }

    def attend(qkv: Tensor) -> Tensor:
        qkv = layer.heads(qkv, inputs.position_ids)
        if inputs.key_mask is not None:  # of all packed tokens to the keys among them
            return pack(attention_to_keys(unpack(qkv, batch), inputs.keys(), **options), batch)
        return ops.attention(qkv, batch.cu_seqlens, batch.max_seqlen, **options, checked=True)

    return attend


def _check_products(bert: nn.Module, plan: EncoderPlan, inputs: Inputs, precision: str) -> None:
    """Raises before anything runs if `precision` is unsupported: the model may have moved since it was set."""
    first = next(bert.parameters())
    check_precision(precision, first.dtype, first.device)
    if precision in QUANTIZED and torch.is_grad_enabled():
        tensors: list[Tensor] = [*bert.parameters(), *([] if inputs.embeds is None else [inputs.embeds])]
        if any(t.requires_grad for t in tensors):
            raise ValueError(
                f"quantize is {precision!r}, which has no gradient, and one is wanted: run the model under "
                "torch.inference_mode() or torch.no_grad(), or train without quantize"
            )
