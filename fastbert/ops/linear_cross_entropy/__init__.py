"""linear_cross_entropy: mean cross entropy of x W^T + b against labels, without keeping the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.native import linear_cross_entropy as native_linear_cross_entropy
from fastbert.native import supports_linear_cross_entropy
from fastbert.ops import dispatch
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._checks import check_floating, check_integer, check_one_dtype, check_shape
from fastbert.ops.linear_cross_entropy.native import run_native
from fastbert.ops.linear_cross_entropy.triton import (
    _labelled,
    _triton_fwd,
    _triton_gradients,
    run_triton,
    supports_triton,
)
from fastbert.reference import linear_cross_entropy as reference_linear_cross_entropy

dispatch.implement("linear_cross_entropy", "triton", run_triton, supports_triton)
dispatch.implement("linear_cross_entropy", "native", run_native, supports_linear_cross_entropy)
dispatch.implement("linear_cross_entropy", "reference", reference_linear_cross_entropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """(T, E), (V, E), (V,), (T,) -> (): the mean over rows whose label is not `ignore_index`.

    If every label is ignored, the result is NaN, as in torch.

    Raises:
        ValueError: a shape or dtype that does not fit, a label outside 0..V-1 (except `ignore_index`).
    """
    op = "linear_cross_entropy"
    check_floating(op, "x", x)
    check_shape(op, "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape(op, "x", x, (None, weight.shape[1]))
    check_shape(op, "labels", labels, (x.shape[0],))
    check_integer(op, "labels", labels)
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],))
    args = (x, weight, bias, labels)
    name, run = dispatch.choose(op, x.device.type, *args, ignore_index=ignore_index)
    if name == "reference" and not torch.is_autocast_enabled(x.device.type):
        check_one_dtype(op, x=x, weight=weight, bias=bias)
    if not torch.compiler.is_compiling() or name == "reference":
        return run(*args, ignore_index=ignore_index)
    if torch.is_autocast_enabled(x.device.type):  # which casts what a compiler traces, but not our op
        return reference_linear_cross_entropy(*args, ignore_index=ignore_index)
    needed = [needs_gradient(t) for t in (x, weight, bias)]
    return torch.ops.fastbert.linear_cross_entropy(name, *args, ignore_index, needed)[0]


# The op in a compiled graph: the loss and, as in eager mode, the `needed` gradients, computed with it.


@torch.library.custom_op("fastbert::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "native":
        loss, made = native_linear_cross_entropy(x, weight, bias, labels, ignore_index=ignore_index, needed=needed)
    else:
        kept = _labelled(labels, weight.shape[0], ignore_index)
        loss, *parts = _triton_fwd(x, weight, bias, labels, kept, ignore_index, tuple(needed))
        made = list(_triton_gradients(torch.ones_like(loss), x, kept, parts))
    dx, dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in made)
    return loss.to(x.dtype), dx, dweight, dbias


@_linear_cross_entropy_op.register_fake
def _(backend: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, _, _, needed = rest
    made = (
        (t if wanted else x).new_empty(t.shape if wanted else 0)
        for t, wanted in zip((x, weight, bias), needed, strict=True)
    )
    return x.new_empty(()), *made


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needed = inputs[-1]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = (made * dloss if wanted else None for made, wanted in zip(ctx.saved_tensors, ctx.needed, strict=True))
    return None, *gradients, None, None, None


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)
