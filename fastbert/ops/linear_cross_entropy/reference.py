"""linear_cross_entropy by plain PyTorch, and the second derivatives of all backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops._autograd import differentiable_gradients


def second_derivative(
    ctx: Any, dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> list[Tensor | None]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = torch.nn.functional.linear(x, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=ctx.ignore_index)
        return loss.to(dloss.dtype)

    inputs, needed = (x, weight, bias), ctx.needs_input_grad[:3]
    return differentiable_gradients("linear_cross_entropy", forward, inputs, needed, dloss)
