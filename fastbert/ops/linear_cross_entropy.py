"""linear_cross_entropy: mean cross entropy of x W^T + b against labels, without keeping the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert import backend, native, reference
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import check_floating, check_integer, check_one_dtype, check_shape
from fastbert.ops._triton import reason_against


def _second(
    ctx: Any, dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> list[Tensor | None]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = torch.nn.functional.linear(x, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=ctx.ignore_index)
        return loss.to(dloss.dtype)

    inputs, needed = (x, weight, bias), ctx.needs_input_grad[:3]
    return differentiable_gradients("linear_cross_entropy", forward, inputs, needed, dloss)


class _Native(torch.autograd.Function):
    """Makes the gradients along with the loss, while the logits are there: the loss is one number, so all that its
    own gradient can do is scale them. (As Liger-Kernel does. The backward of a loss comes right after it, so the
    peak of memory is that of making them then, and one product of four is saved.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias, labels)
        ctx.ignore_index = ignore_index
        loss, ctx.gradients = _with_gradients(ctx, (x, weight, bias, labels))
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_second(ctx, dloss, *ctx.saved_tensors), None, None
        # Handed over, so that a parameter can take its gradient without a copy; a second backward over the same
        # graph makes them again.
        gradients, ctx.gradients = ctx.gradients or _with_gradients(ctx, ctx.saved_tensors)[1], None
        factor = dloss.item()
        if factor != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        return *gradients, None, None


def _with_gradients(ctx: Any, tensors: tuple[Any, ...]) -> tuple[Tensor, list[Tensor | None]]:
    return native.linear_cross_entropy(*tensors, ignore_index=ctx.ignore_index, needed=ctx.needs_input_grad[:3])


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int) -> Tensor:
    if needs_gradient(x, weight, bias):
        return _Native.apply(x, weight, bias, labels, ignore_index)
    return native.linear_cross_entropy(x, weight, bias, labels, ignore_index=ignore_index)[0]


class _TritonLinearCrossEntropy(torch.autograd.Function):
    """Likewise. What dloss is, no one asks before the backward's last kernel, which scales by it on the device."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kept: Tensor | None, ignore_index: int
    ) -> Tensor:
        tensors = x, weight, bias, labels, kept
        ctx.save_for_backward(*tensors)
        ctx.ignore_index = ignore_index
        loss, *ctx.made = _triton_forward(*tensors, ignore_index, ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_second(ctx, dloss, x, *rest), None, None, None
        if ctx.made is None:
            _, *ctx.made = _triton_forward(*(*ctx.saved_tensors, ctx.ignore_index, ctx.needs_input_grad[:3]))
        made, ctx.made = ctx.made, None  # the kernel writes over them
        return *_triton_gradients(dloss, x, kept, made), None, None, None


def _triton_gradients(
    dloss: Tensor, x: Tensor, kept: Tensor | None, made: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """dx, dweight and dbias, of what `linear_cross_entropy_fwd` made of the rows that were kept; writes over it."""
    from fastbert.kernels.linear_cross_entropy import linear_cross_entropy_bwd

    drows, dweight, dbias = linear_cross_entropy_bwd(dloss, *made, x.dtype)
    if drows is not None and kept is not None:
        drows = torch.zeros_like(x, memory_format=torch.contiguous_format).index_copy_(0, kept, drows)
    return drows, dweight, dbias


def _triton_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor | None,
    ignore_index: int,
    needed: Sequence[bool] = (False, False, False),
) -> tuple[Any, ...]:
    """What `linear_cross_entropy_fwd` makes of the rows that are kept; None is all."""
    from fastbert.kernels.linear_cross_entropy import linear_cross_entropy_fwd

    if kept is not None:
        x, labels = x.index_select(0, kept), labels.index_select(0, kept)
    return linear_cross_entropy_fwd(x, weight, bias, labels, ignore_index=ignore_index, needed=needed)


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int) -> Tensor:
    dtype = x.dtype
    if autocast_is_on(x):
        dtype = torch.float32  # of the loss, as torch.autocast has it
        x, weight, bias = cast(x, weight, bias)
    with autocast_off(x):
        kept = _labelled(labels, weight.shape[0], ignore_index)
        args = (x, weight, bias, labels, kept, ignore_index)
        if needs_gradient(x, weight, bias):
            return _TritonLinearCrossEntropy.apply(*args).to(dtype)
        return _triton_forward(*args)[0].to(dtype)


def _labelled(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor | None:
    """The rows with a label, for one wait for the device; None, all, where a CUDA graph is captured, which cannot wait.

    Of a row in seven with a label, as in pretraining, all others would be six sevenths of the products. A label outside
    the vocabulary raises, for the same wait; a captured graph's loss is NaN then.
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


def _supports_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int
) -> str | None:
    # Autocast makes x, weight and bias of one dtype, whatever they are.
    groups = [[t] for t in (x, weight, bias) if t is not None] if autocast_is_on(x) else [[x, weight, bias]]
    for group in groups:
        if reason := reason_against(*group):
            return reason
    if any(t is not None and t.device != x.device for t in (weight, bias, labels)):
        return f"x on {x.device}, labels on {labels.device}, the weight on {weight.device}; it takes one device"
    return None


backend.implement("linear_cross_entropy", "triton", _triton, _supports_triton)
backend.implement("linear_cross_entropy", "native", _native, native.supports_linear_cross_entropy)
backend.implement("linear_cross_entropy", "reference", reference.linear_cross_entropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """(T, E), (V, E), (V,), (T,) -> (): the mean over rows whose label is not `ignore_index`.

    Where every label is ignored the mean is of nothing and the result NaN, as in torch.

    Raises:
        ValueError: a shape or dtype that does not fit, a label outside 0..V-1 (but `ignore_index`).
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
    name, run = backend.choose(op, x.device.type, *args, ignore_index=ignore_index)
    if name == "reference" and not torch.is_autocast_enabled(x.device.type):
        check_one_dtype(op, x=x, weight=weight, bias=bias)
    if not torch.compiler.is_compiling() or name == "reference":
        return run(*args, ignore_index=ignore_index)
    if torch.is_autocast_enabled(x.device.type):  # which casts what a compiler traces, and no op of ours
        return reference.linear_cross_entropy(*args, ignore_index=ignore_index)
    needed = [needs_gradient(t) for t in (x, weight, bias)]
    return torch.ops.fastbert.linear_cross_entropy(name, *args, ignore_index, needed)[0]


# What a compiled graph holds: the loss and, as in eager mode, the gradients that are `needed`, made along with it.


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
        loss, made = native.linear_cross_entropy(x, weight, bias, labels, ignore_index=ignore_index, needed=needed)
    else:
        kept = _labelled(labels, weight.shape[0], ignore_index)
        loss, *parts = _triton_forward(x, weight, bias, labels, kept, ignore_index, tuple(needed))
        made = list(_triton_gradients(torch.ones_like(loss), x, kept, parts))
    dx, dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in made)
    return loss.to(x.dtype), dx, dweight, dbias


@_linear_cross_entropy_op.register_fake
def _(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = zip((x, weight, bias), needed, strict=True)
    dx, dweight, dbias = (x.new_empty(0 if t is None or not wanted else t.shape) for t, wanted in pairs)
    return x.new_empty(()), dx, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needed = inputs[-1]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = (made * dloss if wanted else None for made, wanted in zip(ctx.saved_tensors, ctx.needed, strict=True))
    return None, *gradients, None, None, None


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)
