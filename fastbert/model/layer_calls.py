"""Calls a layer over its parts, or through its own module where hooks or FSDP must see the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.model.layer import Attend, Layer, is_hooked, sharded
from fastbert.model.modules import EncoderLayer
from fastbert.model.plan import EncoderPlan


def run_layer(
    plan: EncoderPlan, i: int, x: Tensor, attend: Callable[[Layer], Attend], picked: Tensor | None = None
) -> Any:
    """Runs layer i, through its module where hooks or FSDP must see the call: (T, E) -> (T, E).

    With `picked`, (P,), which those do not allow: (P, E).
    """
    module, layer = plan.modules[i], plan.layers[i]
    if layer is None:
        inner = sharded(module) or module

        def gathered(x: Tensor) -> Any:
            found = plan.layer_of(i, inner)
            return found(x, plan.products, attend(found))

        run = partial(_recomputed, inner, gathered)
        return _call_through(module, inner, run, x)
    run = partial(_recomputed, module, lambda x: layer(x, plan.products, attend(layer), picked))
    return module(x, run) if isinstance(module, EncoderLayer) and is_hooked(module) else run(x)


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
