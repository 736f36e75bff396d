"""add_layer_norm: y = LN(dropout(x) + residual), what follows each half of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import backend, native, reference
from fastbert.ops._autocast import autocast_is_on, autocast_off
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import check_floating, check_norm_dtypes, check_probability, check_shape
from fastbert.ops._triton import reason_against, rows_in_memory

_MAX_COLUMNS = 8192  # a row in registers; more would spill


class _TritonAddLayerNorm(torch.autograd.Function):
    """Keeps the sum dropout(x) + residual, so that both can be freed, and three numbers per row.

    The sum is an output as well: saved as that, it is a function of x and residual where a second derivative asks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        from fastbert.kernels.add_layer_norm import add_layer_norm_fwd
        from fastbert.kernels.dropout import draw_seed

        ctx.set_materialize_grads(False)
        seed = draw_seed(x.device) if dropout_p else None
        y, total, mean, rstd = add_layer_norm_fwd(
            x, residual, weight, bias, seed, eps=eps, dropout_p=dropout_p, training=True
        )
        ctx.save_for_backward(total, weight, mean, rstd, seed, bias)
        dtypes = (x.dtype, None if residual is None else residual.dtype, bias.dtype)
        ctx.constants, ctx.eps = {"dropout_p": dropout_p, "dtypes": dtypes}, eps
        return y, None if total is x else total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        from fastbert.kernels.add_layer_norm import add_layer_norm_bwd

        (*saved, bias), wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if dy is None:
            found: Sequence[Tensor | None] = [None] * 4
        elif torch.is_grad_enabled():
            forward, inputs = partial(reference.layer_norm, eps=ctx.eps), (saved[0], saved[1], bias)
            needed = (any(wanted[:2]), *wanted[2:])
            dropout_p = ctx.constants["dropout_p"]
            dx, *of_weights = differentiable_gradients("add_layer_norm", forward, inputs, needed, dy, dropout_p)
            found = [dx, dx, *of_weights]
        else:
            found = add_layer_norm_bwd(rows_in_memory(dy), *saved, **ctx.constants, wanted=wanted)
        inner = (_sum_in(dtype, d, dtotal) for dtype, d in zip(ctx.constants["dtypes"], found[:2], strict=False))
        made = (*inner, *found[2:])
        return *(d if want else None for d, want in zip(made, wanted, strict=True)), None, None


def _sum_in(dtype: torch.dtype | None, *parts: Tensor | None) -> Tensor | None:
    """The sum of those that are there, in `dtype`."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]).to(dtype) if there and dtype is not None else None


def _triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> Tensor:
    from fastbert.kernels.add_layer_norm import add_layer_norm_fwd
    from fastbert.kernels.dropout import draw_seed

    if needs_gradient(x, residual, weight, bias):
        return _TritonAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p)[0]
    seed = draw_seed(x.device) if dropout_p else None
    return add_layer_norm_fwd(x, residual, weight, bias, seed, eps=eps, dropout_p=dropout_p)[0]


def _supports_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> str | None:
    reason = reason_against(x, residual, weight, bias, one_dtype=False)
    if reason is not None:
        return reason
    if weight.shape[0] > _MAX_COLUMNS:
        return f"{weight.shape[0]} columns; it takes {_MAX_COLUMNS} at most"
    if any(t is not None and t.stride(-1) != 1 for t in (x, residual, weight, bias)):
        return "the last dimension is not contiguous"
    return None


class _NativeAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float
    ) -> Tensor:
        ctx.constants = {"dropout_p": dropout_p, "seed": native.draw_seed(dropout_p)}
        y, statistics = native.add_layer_norm_training(x, residual, weight, bias, eps=eps, **ctx.constants)
        ctx.save_for_backward(x, residual, weight, statistics, bias)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (*saved, bias), wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            forward, dropout_p = partial(reference.add_layer_norm, eps=ctx.eps), ctx.constants["dropout_p"]
            inputs = (*saved[:3], bias)
            found = differentiable_gradients("add_layer_norm", forward, inputs, wanted, dy, dropout_p)
            return *found, None, None
        return *native.add_layer_norm_backward(dy, *saved, **ctx.constants, wanted=wanted), None, None


def _native(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> Tensor:
    if residual is not None:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = (
            t if t.dtype == wide else t.to(wide, memory_format=torch.contiguous_format) for t in (x, residual)
        )
    if needs_gradient(x, residual, weight, bias):  # on a CPU: supports_add_layer_norm says so
        return _NativeAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p)
    return native.add_layer_norm(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)


backend.implement("add_layer_norm", "triton", _triton, _supports_triton)


def _supports_native(x: Tensor, residual: Tensor | None, *args: Tensor, **kwargs: Any) -> str | None:
    if residual is not None and residual.dtype != x.dtype:  # `_native` widens the narrower to the other's dtype
        wide = torch.promote_types(x.dtype, residual.dtype)
        if wide not in (x.dtype, residual.dtype):  # of fp16 and bf16: fp32, which the weight would not be
            return f"mixed dtypes {x.dtype} and {residual.dtype}"
        x = residual = x if wide == x.dtype else residual
    return native.supports_add_layer_norm(x, residual, *args, **kwargs)


backend.implement("add_layer_norm", "native", _native, _supports_native)
backend.implement("add_layer_norm", "reference", reference.add_layer_norm)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """LN(dropout(x) + residual) over the last dimension, (T, E); without a residual, a plain LayerNorm.

    Mean and variance are taken in fp32 at least (Ba et al., 2016). Where dtypes differ, as under autocast, the result
    has the wider one of x and residual; weight and bias may be in any that is not float64, or in float64 if x or
    residual is.

    Raises:
        ValueError: a shape, dtype or probability that does not fit.
    """
    check_floating("add_layer_norm", "x", x)
    check_shape("add_layer_norm", "weight", weight, (None,))
    check_shape("add_layer_norm", "x", x, (None, weight.shape[0]))
    if residual is not None:
        check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    check_shape("add_layer_norm", "bias", bias, tuple(weight.shape))
    check_probability("add_layer_norm", "dropout_p", dropout_p)
    kwargs = {"eps": eps, "dropout_p": dropout_p}
    if autocast_is_on(x):  # x comes from a product in the lower precision, the residual from a norm in fp32
        with autocast_off(x):
            return add_layer_norm(x, residual, weight, bias, **kwargs)
    name, run = backend.choose("add_layer_norm", x.device.type, x, residual, weight, bias, **kwargs)
    if name == "reference":
        check_norm_dtypes("add_layer_norm", {"x": x, "residual": residual}, weight, bias)
    elif torch.compiler.is_compiling():
        # Pointers cannot be traced; the reference can, and is then left to the compiler to fuse.
        if dropout_p or needs_gradient(x, residual, weight, bias):
            return reference.add_layer_norm(x, residual, weight, bias, **kwargs)
        return torch.ops.fastbert.add_layer_norm(x, residual, weight, bias, eps)
    return run(x, residual, weight, bias, **kwargs)


@torch.library.custom_op("fastbert::add_layer_norm", mutates_args=())
def _add_layer_norm_op(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _, run = backend.choose("add_layer_norm", x.device.type, x, residual, weight, bias, eps=eps, dropout_p=0.0)
    return run(x, residual, weight, bias, eps=eps, dropout_p=0.0)


@_add_layer_norm_op.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
