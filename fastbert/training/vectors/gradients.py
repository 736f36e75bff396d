"""Exact gradients of a loss over many vectors, with the memory of a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def backward_in_parts(
    parts: Sequence[Part], forward: Callable[[Part], Tensor], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Adds the gradients of loss(vectors) to those of the parameters, part by part; returns the loss, ().

    The vectors of all parts but the last are first computed without a graph; then the loss gives each vector's
    gradient; then each part is forwarded again, with its graph. So `forward` must give a part the same vectors twice,
    dropout included (`ops.mask_rows`).

    Args:
        forward: from a part to its vectors, (n, E).
        loss: from the vectors of all parts, (N, E), to a number.

    Source: Gao et al. (2021), "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
    """
    with torch.no_grad():
        before = [forward(part) for part in parts[:-1]]
    last = forward(parts[-1])
    vectors = torch.cat([*before, last.detach()]).requires_grad_()
    value = loss(vectors)
    (gradients,) = torch.autograd.grad(value, vectors)
    *others, own = gradients.split([*map(len, before), len(last)])
    last.backward(own)
    for part, gradient in zip(parts[:-1], others, strict=True):
        forward(part).backward(gradient)
    return value.detach()
