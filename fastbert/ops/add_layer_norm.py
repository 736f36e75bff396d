"""add_layer_norm: y = LN(dropout(x) + residual), what follows each half of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import backend, native, reference
from fastbert.ops._autocast import autocast_is_on, autocast_off
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._checks import check_floating, check_probability, check_shape


def _triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> Tensor:
    from fastbert.kernels.add_layer_norm import add_layer_norm_fwd

    return add_layer_norm_fwd(x, residual, weight, bias, eps=eps)[0]


def _supports_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> str | None:
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    from torch.utils._triton import has_triton

    if not has_triton():
        return "triton is not installed, or knows no GPU here"
    if dropout_p:
        return "no dropout yet"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "no backward yet"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or any(t.dtype != x.dtype for t in tensors):
        return f"dtypes {', '.join(str(t.dtype) for t in tensors)}; it takes one of float32, float16, bfloat16"
    if any(t.stride(-1) != 1 for t in tensors):
        return "the last dimension is not contiguous"
    return None


class _NativeAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float
    ) -> Tensor:
        ctx.constants = {"dropout_p": dropout_p, "seed": native.draw_seed(dropout_p)}
        y, statistics = native.add_layer_norm_training(x, residual, weight, bias, eps=eps, **ctx.constants)
        ctx.save_for_backward(x, residual, weight, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        return *native.add_layer_norm_backward(dy, *ctx.saved_tensors, **ctx.constants, wanted=wanted), None, None


def _native(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float
) -> Tensor:
    if needs_gradient(x, residual, weight, bias):  # on a CPU: supports_add_layer_norm says so
        return _NativeAddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p)
    return native.add_layer_norm(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)


backend.implement("add_layer_norm", "triton", _triton, _supports_triton)
backend.implement("add_layer_norm", "native", _native, native.supports_add_layer_norm)
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

    Mean and variance are taken in fp32 at least (Ba et al., 2016).

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
        wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        with autocast_off(x):
            x, residual = x.to(wide), None if residual is None else residual.to(wide)
            return add_layer_norm(x, residual, weight, bias, **kwargs)
    name, run = backend.choose("add_layer_norm", x.device.type, x, residual, weight, bias, **kwargs)
    if torch.compiler.is_compiling() and name != "reference":
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
    return torch.empty_like(x, memory_format=torch.contiguous_format)
