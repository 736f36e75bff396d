"""The encoder: embeddings and layers over packed tokens, on any module tree with transformers' names."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.model.inputs import Inputs
from fastbert.model.layer import Attend, Layer, Products, active_dropout, is_hooked, sharded
from fastbert.model.modules import BertLayer
from fastbert.model.plan import EncoderPlan, encoder_plan
from fastbert.packing import pack, unpack
from fastbert.precision import QUANTIZED, check_precision
from fastbert.reference import attention_to_keys, padded_attention


@dataclass
class Encoded:
    """The states of an encoder, packed (T, E); by request the states around each layer and the probabilities.

    What is returned by request is part of the graph: the next layer reads the very tensors that the caller gets.
    """

    last_hidden_state: Tensor
    plan: EncoderPlan  # of this call
    hidden_states: tuple[Tensor, ...] | None = None  # L + 1 in the shape of the caller's tokens
    attentions: tuple[Tensor, ...] | None = None  # L of (B, H, S, S), zero where either token is a pad


def encode(
    bert: nn.Module,
    inputs: Inputs,
    *,
    activation: str,
    precision: str | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    plan: EncoderPlan | None = None,
) -> Encoded:
    """Runs embeddings and layers of `bert` (anything with .embeddings and .encoder.layer) over the real tokens.

    `precision` is that of ops.linear, for the four products of a layer; all else runs in the weights' dtype.
    `plan` is the one that a caller has of this call already.
    """
    if precision is not None:
        _check_products(bert, inputs, precision)
    plan, batch = plan or encoder_plan(bert, Products(activation, precision)), inputs.batch
    states: list[Tensor] = []
    if output_attentions:
        x, attentions = _encode_padded(plan, inputs, states if output_hidden_states else None)
        x = inputs.take(states[-1]) if output_hidden_states else pack(x.unflatten(0, inputs.padded_shape), batch)
        return Encoded(x, plan, tuple(states) or None, attentions)

    x = plan.embeddings(inputs)
    by_layer = output_hidden_states or inputs.key_mask is not None
    if plan.whole is not None and not by_layer and _runs_whole(plan, bert, x):
        start = 0.0 if plan.checksums is None else time.perf_counter()
        x = ops.encoder(x, plan.whole, batch.cu_seqlens, batch.max_seqlen, checked=True)
        if plan.checksums is not None:
            plan.checksums.seconds = time.perf_counter() - start  # bounds the next call's look at values
        return Encoded(x, plan)
    x = _returned(x, inputs, states) if output_hidden_states else x
    with nullcontext() if torch.compiler.is_compiling() else ops.shared_schedules():
        for i in range(len(plan.modules)):
            x = _run_layer(plan, i, x, lambda layer: _packed_attend(layer, inputs))
            x = _returned(x, inputs, states) if output_hidden_states else x
    return Encoded(x, plan, tuple(states) or None)


def _runs_whole(plan: EncoderPlan, bert: nn.Module, x: Tensor) -> bool:
    """Whether all layers can be one call: no gradient, no active dropout, no part that has to be called."""
    if plan.drops_out():
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or any(p.requires_grad for p in bert.encoder.parameters()))


def _returned(x: Tensor, inputs: Inputs, states: list[Tensor]) -> Tensor:
    """Appends packed states to those that the caller gets, in the shape of the caller's tokens.

    Returns what the next layer takes: where there is a gradient, the caller's tensor packed again, so that the
    gradient passes through it.
    """
    states.append(inputs.give_back(x))
    return inputs.take(states[-1]) if x.requires_grad else x


def _encode_padded(
    plan: EncoderPlan,
    inputs: Inputs,
    states: list[Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Every column through every layer, with explicit probabilities: the last states (B * S, E), and L of (B, H, S, S).

    `states` is filled with those around each layer, in the shape of the caller's tokens. The probabilities of pads are
    zero, which makes their states meaningless.
    """
    keys, attentions = inputs.keys(), []
    computed = inputs.batch.mask()

    def attend(layer: Layer, qkv: Tensor) -> tuple[Tensor, Tensor]:
        dropout_p = active_dropout(layer.attention.dropout)
        qkv = qkv.unflatten(0, inputs.padded_shape)
        context, probs = padded_attention(qkv, keys, queries=computed, dropout_p=dropout_p)
        return context.flatten(0, 1), probs

    def returned(x: Tensor) -> Tensor:
        if states is None:
            return x
        packed = _returned(pack(x.unflatten(0, inputs.padded_shape), inputs.batch), inputs, states)
        return inputs.pad(packed).flatten(0, 1)

    x = returned(plan.embeddings(inputs.flat()))
    for i in range(len(plan.modules)):
        x, probs = _run_layer(plan, i, x, lambda layer: partial(attend, layer))
        x = returned(x)
        attentions.append(probs)
    return x, tuple(attentions)


def _packed_attend(layer: Layer, inputs: Inputs) -> Attend:
    dropout_p = active_dropout(layer.attention.dropout)
    if inputs.key_mask is not None:
        return partial(_attend_to_keys, inputs=inputs, dropout_p=dropout_p)
    batch = inputs.batch
    return partial(
        ops.attention, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, checked=True, dropout_p=dropout_p
    )


def _attend_to_keys(qkv: Tensor, *, inputs: Inputs, dropout_p: float) -> Tensor:
    """Attention of all packed tokens to those of them that are keys: (T, 3, H, D) -> (T, H, D)."""
    context = attention_to_keys(unpack(qkv, inputs.batch), inputs.keys(), dropout_p=dropout_p)
    return pack(context, inputs.batch)


def _run_layer(plan: EncoderPlan, i: int, x: Tensor, attend: Callable[[Layer], Attend]) -> Any:
    """Layer i; where hooks or FSDP have to see the call, through the module's own."""
    module, layer = plan.modules[i], plan.layers[i]
    if layer is None:
        inner = sharded(module) or module
        run = partial(_recomputed, inner, lambda x: _called(Layer(inner), x, plan.products, attend))
        return _call_through(module, inner, run, x)
    run = partial(_recomputed, module, lambda x: _called(layer, x, plan.products, attend))
    return module(x, run) if isinstance(module, BertLayer) and is_hooked(module) else run(x)


def _called(layer: Layer, x: Tensor, products: Products, attend: Callable[[Layer], Attend]) -> Any:
    return layer(x, products, attend(layer))


def _call_through(layer: nn.Module, inner: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Calls `layer`, whose hooks gather the parameters of `inner`, with `run` in place of the forward of `inner`."""
    inner.forward = run
    try:
        return layer(x)
    finally:
        del inner.forward


def _recomputed(module: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> Any:
    """run(x), recomputed in the backward where gradient checkpointing is on."""
    if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
        return module._gradient_checkpointing_func(run, x)
    return run(x)


def _check_products(bert: nn.Module, inputs: Inputs, precision: str) -> None:
    """Says what does not go with `precision` before anything runs: the model may have moved since it was chosen."""
    table = bert.embeddings.token_type_embeddings.weight
    check_precision(precision, table.dtype, table.device)
    if precision in QUANTIZED and torch.is_grad_enabled():
        tensors = [*bert.embeddings.parameters(), *bert.encoder.parameters()]
        tensors += [] if inputs.embeds is None else [inputs.embeds]
        if any(t.requires_grad for t in tensors):
            raise ValueError(
                f"quantize is {precision!r}, which has no gradient, and one is wanted: run the model under "
                "torch.inference_mode() or torch.no_grad(), or train without quantize"
            )
