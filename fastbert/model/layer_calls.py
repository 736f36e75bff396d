"""Calls a layer over its parts, or through its own module where hooks or FSDP must see the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.model.layer import Attend, Layer, Products, is_hooked, sharded
from fastbert.model.modules import EncoderLayer
from fastbert.model.plan import EncoderPlan


def run_layer(plan: EncoderPlan, i: int, x: Tensor, attend: Callable[[Layer], Attend]) -> Any:
    """Runs layer i, through its module where hooks or FSDP must see the call."""
    module, layer = plan.modules[i], plan.layers[i]
    if layer is None:
        inner = sharded(module) or module
        run = partial(_recomputed, inner, lambda x: _called(plan.layer_of(i, inner), x, plan.products, attend))
        return _call_through(module, inner, run, x)
    run = partial(_recomputed, module, lambda x: _called(layer, x, plan.products, attend))
    return module(x, run) if isinstance(module, EncoderLayer) and is_hooked(module) else run(x)


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
