"""linear_cross_entropy by Triton: its autograd function, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._triton import reason_against
from fastbert.ops.linear_cross_entropy.reference import second_derivative


class _TritonLinearCrossEntropy(torch.autograd.Function):
    """As the native one, but the host never reads dloss: the backward's last kernel scales by it on the device."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kept: Tensor | None, ignore_index: int
    ) -> Tensor:
        tensors = x, weight, bias, labels, kept
        ctx.save_for_backward(*tensors)
        ctx.ignore_index = ignore_index
        loss, *ctx.made = _triton_fwd(*tensors, ignore_index, ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *second_derivative(ctx, dloss, x, *rest), None, None, None
        if ctx.made is None:
            _, *ctx.made = _triton_fwd(*(*ctx.saved_tensors, ctx.ignore_index, ctx.needs_input_grad[:3]))
        made, ctx.made = ctx.made, None  # the kernel overwrites them
        return *_triton_gradients(dloss, x, kept, made), None, None, None


def _triton_gradients(
    dloss: Tensor, x: Tensor, kept: Tensor | None, made: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """dx, dweight and dbias from `made`, the output of `linear_cross_entropy_fwd`, which it overwrites."""
    from fastbert.kernels.linear_cross_entropy import linear_cross_entropy_bwd

    drows, dweight, dbias = linear_cross_entropy_bwd(dloss, *made, x.dtype)
    if drows is not None and kept is not None:
        drows = torch.zeros_like(x, memory_format=torch.contiguous_format).index_copy_(0, kept, drows)
    return drows, dweight, dbias


def _triton_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor | None,
    ignore_index: int,
    needed: Sequence[bool] = (False, False, False),
) -> tuple[Any, ...]:
    """`linear_cross_entropy_fwd` of the `kept` rows; None means all."""
    from fastbert.kernels.linear_cross_entropy import linear_cross_entropy_fwd

    if kept is not None:
        x, labels = x.index_select(0, kept), labels.index_select(0, kept)
    return linear_cross_entropy_fwd(x, weight, bias, labels, ignore_index=ignore_index, needed=needed)


def run_triton(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int) -> Tensor:
    dtype = x.dtype
    if autocast_is_on(x):
        dtype = torch.float32  # of the loss, as under torch.autocast
        x, weight, bias = cast(x, weight, bias)
    with autocast_off(x):
        kept = _labelled(labels, weight.shape[0], ignore_index)
        args = (x, weight, bias, labels, kept, ignore_index)
        if needs_gradient(x, weight, bias):
            return _TritonLinearCrossEntropy.apply(*args).to(dtype)
        return _triton_fwd(*args)[0].to(dtype)


def _labelled(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor | None:
    """The indices of rows with a label, after one wait for the device; None, all rows, in CUDA graph capture.

    In pretraining one row in seven has a label: without this, six sevenths of the products would be wasted. After the
    same wait, a label outside the vocabulary raises; in a captured graph, which cannot wait, the loss is NaN.
    """
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if not len(labels):
        return None
    kept = labels != ignore_index
    inside = torch.where(kept, labels, 0)
    count, low, high = torch.stack([kept.sum(), *inside.aminmax()]).tolist()
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_cross_entropy: labels holds {low if low < 0 else high}; the weight has {vocabulary} rows, so 0 "
            f"to {vocabulary - 1} are valid"
        )
    return None if count == len(labels) else kept.nonzero_static(size=count).squeeze(1)


def supports_triton(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int) -> str | None:
    # Autocast casts x, weight and bias to one dtype.
    groups = [[t] for t in (x, weight, bias) if t is not None] if autocast_is_on(x) else [[x, weight, bias]]
    for group in groups:
        if reason := reason_against(*group):
            return reason
    if any(t is not None and t.device != x.device for t in (weight, bias, labels)):
        return f"x on {x.device}, labels on {labels.device}, the weight on {weight.device}; it takes one device"
    return None
