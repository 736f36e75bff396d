"""Helpers of the ops' autograd functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """True if autograd must record a call with these arguments."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable_gradients(
    op: str,
    forward: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    dy: Tensor,
    dropout_p: float = 0.0,
) -> list[Tensor | None]:
    """The gradients of forward(*inputs), where `needed`, as functions of the inputs and of dy.

    For a backward that runs with grad mode on (create_graph=True): kernels have no second derivative, and their result
    would be a constant, whose derivative is zero. `inputs` come from ctx.saved_tensors, with their graph.

    Raises:
        RuntimeError: with dropout, whose mask only the kernels know.
    """
    if dropout_p:
        raise RuntimeError(
            f"{op}: a derivative of its gradient is asked for (create_graph=True) and dropout_p is {dropout_p}; "
            "it must be 0, as in model.eval()"
        )
    with torch.enable_grad():
        # Views, each a node of its own: before this op, one input may have been computed from another.
        inputs = [x if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(forward(*inputs), wanted, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
