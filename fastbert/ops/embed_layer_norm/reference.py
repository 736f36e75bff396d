"""embed_layer_norm by plain PyTorch, and the second derivatives of all backends."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from fastbert import reference
from fastbert.ops._autograd import differentiable_gradients


def second_derivative(
    ctx: Any, dy: Tensor, inputs: tuple[Tensor, ...], *, dropout_p: float, padding_idx: int | None
) -> tuple[Tensor | None, ...]:
    forward = partial(reference.embed_layer_norm, eps=ctx.eps, padding_idx=padding_idx)
    needed = [False] * 3 + list(ctx.needs_input_grad[3:8])
    return *differentiable_gradients("embed_layer_norm", forward, inputs, needed, dy, dropout_p), None, None, None
