"""Optional outputs of the encoder: hidden states around each layer, and attention probabilities."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from fastbert.model.inputs import Inputs
from fastbert.model.layer import Layer, active_dropout
from fastbert.model.layer_calls import run_layer
from fastbert.model.plan import EncoderPlan
from fastbert.packing import pack
from fastbert.reference import padded_attention


def returned(x: Tensor, inputs: Inputs, states: list[Tensor]) -> Tensor:
    """Appends packed states x to `states`, in the shape of the caller's input, and returns the next layer's input.

    If x requires a gradient, that input is the appended tensor, packed again, so that the gradient passes through it.
    """
    states.append(inputs.give_back(x))
    return inputs.take(states[-1]) if x.requires_grad else x


def encode_padded(
    plan: EncoderPlan,
    inputs: Inputs,
    states: list[Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs all columns with explicit probabilities; returns the last states (B * S, E), and L of (B, H, S, S).

    `states` receives those around each layer, in the shape of the caller's input. The probabilities of pads are zero,
    so their states are meaningless.
    """
    keys, attentions, flat = inputs.keys(), [], inputs.flat()
    computed, bias = inputs.batch.mask(), plan.bias()

    def attend(layer: Layer, qkv: Tensor) -> tuple[Tensor, Tensor]:
        dropout_p = active_dropout(layer.attention_dropout)
        qkv = layer.heads(qkv, flat.position_ids).unflatten(0, inputs.padded_shape)
        options: dict[str, Any] = {
            "queries": computed,
            "dropout_p": dropout_p,
            "bias": bias,
            "window": layer.seen.window,
        }
        context, probs = padded_attention(qkv, keys, **options)
        return context.flatten(0, 1), probs

    def given_back(x: Tensor) -> Tensor:
        if states is None:
            return x
        packed = returned(pack(x.unflatten(0, inputs.padded_shape), inputs.batch), inputs, states)
        return inputs.pad(packed).flatten(0, 1)

    x = plan.embeddings(flat)
    if not plan.modules and plan.final_norm is not None:
        x = plan.final_norm(x, None)
    x = given_back(x)
    for i in range(len(plan.modules)):
        x, probs = run_layer(plan, i, x, lambda layer: partial(attend, layer))
        if i + 1 == len(plan.modules) and plan.final_norm is not None:
            x = plan.final_norm(x, None)
        x = given_back(x)
        attentions.append(probs)
    return x, tuple(attentions)
