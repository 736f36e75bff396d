"""linear: y = act(x W^T + b), every matrix product of a BERT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import backend, native, reference
from fastbert.ops import _quantized_linear
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import check_floating, check_one_dtype, check_precision, check_shape
from fastbert.ops._triton import reason_against
from fastbert.precision import QUANTIZED
from fastbert.weight import Weight, as_weight


class _TritonLinear(torch.autograd.Function):
    """Keeps of x and weight what a gradient reads, and z, to which the activation is applied.

    z is an output as well: saved as that, it is a function of x, weight and bias where a second derivative asks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> tuple[Tensor, Tensor | None]:
        from fastbert.kernels.linear import linear_fwd

        ctx.set_materialize_grads(False)
        y, z = linear_fwd(x, weight, bias, activation, keep_z=True)
        want_x, want_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if want_weight else None, weight if want_x else None, z)
        ctx.activation = activation
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        from fastbert.kernels.linear import linear_bwd

        (x, weight, z), wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if dz is None and dy is not None and not torch.is_grad_enabled():
            return *linear_bwd(dy, x, weight, z, ctx.activation, wanted), None
        if dy is not None and z is not None:
            dy = _through(ctx.activation, z, dy)
        dz = dy if dz is None else dz if dy is None else dy + dz
        if dz is None:
            return None, None, None, None
        products = dz @ weight if wanted[0] else None, dz.mT @ x if wanted[1] else None
        return *products, dz.sum(0) if wanted[2] else None, None


def _through(activation: str, z: Tensor, dy: Tensor) -> Tensor:
    """dy act'(z), as a function of both where grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z.view_as(z) if create_graph else z.detach().requires_grad_()
        return torch.autograd.grad(reference.ACTIVATIONS[activation](z), z, dy, create_graph=create_graph)[0]


def _triton(x: Tensor, weight: Weight, *, activation: str | None, precision: str | None) -> Tensor:
    from fastbert.kernels.linear import linear_fwd

    if precision in QUANTIZED:
        return _quantized_linear.run(x, weight, activation, precision)
    if needs_gradient(x, *weight.tensors):
        return _TritonLinear.apply(x, *weight.stacked(), activation)[0]
    stacked = weight.stacked() if len(weight.weights) == 1 else weight.form("stacked", weight.stacked)
    return linear_fwd(x, *stacked, activation)[0]


def _supports_triton(
    x: Tensor, weight: Weight, *, activation: str | None = None, precision: str | None = None
) -> str | None:
    if precision in QUANTIZED:
        return _quantized_linear.supports(x, weight, precision)
    return reason_against(x, *weight.tensors)


class _NativeLinear(torch.autograd.Function):
    """The tensors of `weight` come as arguments too, so that autograd knows of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, activation: str | None, *tensors: Tensor) -> Tensor:
        y, saved = native.linear_training(x, weight, activation)
        ctx.save_for_backward(x, saved, *tensors)
        ctx.weight, ctx.activation = weight, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, saved, *tensors), weight = ctx.saved_tensors, ctx.weight
        need_x, _, _, *needed = ctx.needs_input_grad
        rows = len(weight.weights)
        if torch.is_grad_enabled():
            forward = partial(_reference_of_parts, rows=rows, activation=ctx.activation)
            dx, *gradients = differentiable_gradients("linear", forward, (x, *tensors), (need_x, *needed), dy)
            return dx, None, None, *gradients
        wanted = need_x, any(needed[:rows]), any(needed[rows:])
        dx, *stacked = native.linear_backward(dy, x, weight, saved, ctx.activation, wanted)
        gradients = weight.split(*stacked)
        return dx, None, None, *[g if need else None for g, need in zip(gradients, needed, strict=True)]


def _reference_of_parts(x: Tensor, *tensors: Tensor, rows: int, activation: str | None) -> Tensor:
    weight = Weight(tensors[:rows], tensors[rows:] or (None,) * rows)
    return reference.linear(x, *weight.stacked(), activation=activation)


def _native(x: Tensor, weight: Weight, *, activation: str | None, precision: str | None) -> Tensor:
    # With a gradient, "high" and "highest" are in full precision.
    if torch.is_grad_enabled() and needs_gradient(x, *weight.tensors):
        return _NativeLinear.apply(x, weight, activation, *weight.tensors)
    return native.linear_fwd(x, weight, activation, precision)


def _reference(x: Tensor, weight: Weight, *, activation: str | None, precision: str | None) -> Tensor:
    if weight.is_placeholder and not x.is_meta:
        raise ValueError(
            "linear: weight has no memory; a model loaded with inference_only=True runs in the dtype, precision and "
            "backend that it was loaded for, and is not copied, trained or compiled"
        )
    _check_dtypes(x, weight, precision)
    return reference.linear(x, *weight.stacked(), activation=activation, precision=precision)


def _describe(words: Callable[[str | None], str | None]) -> Callable[..., str | None]:
    return lambda *args, precision=None, **kwargs: words(precision)


backend.implement("linear", "triton", _triton, _supports_triton, _describe(_quantized_linear.describe))
backend.implement("linear", "native", _native, native.supports_linear, _describe(native.describe_precision))
backend.implement("linear", "reference", _reference, describe=_describe(reference.describe_precision))


def linear(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """(T, E), (F, E), (F,) -> (T, F), with one of `reference.ACTIVATIONS` on top.

    Args:
        weight: a tensor with its bias, or a `Weight`, whose owner keeps the forms that a backend makes of it between
            calls; of a tensor they are made for this call alone.
        precision: how the operands are multiplied. None: as they are, in their dtype, sums in fp32. "high",
            "highest": in float32, which a backend may split into bf16 pieces, three or six products in place of
            one. "int8": x rounded to int8 by its rows, weight by its rows, sums in int32, without a gradient; see
            `reference.linear_int8`. "fp8": likewise to float8_e4m3fn, sums in fp32; see `reference.linear_fp8`.

    Raises:
        ValueError: a shape or dtype that does not fit, an unknown activation or precision, a gradient of int8 or
            fp8.
    """
    if not x.is_floating_point():
        check_floating("linear", "x", x)
    if not isinstance(weight, Weight) or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        weight = _checked(x, weight, bias)
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}; known are {', '.join(reference.ACTIVATIONS)}")
    if precision is not None:
        check_precision("linear", precision, x, *weight.tensors)
    if torch._C._is_any_autocast_enabled() and autocast_is_on(x):
        with autocast_off(x):
            if precision in QUANTIZED:  # chosen for the model, and narrower than autocast
                return linear(x, weight, activation=activation, precision=precision)
            x, *tensors = cast(x, *weight.tensors)
            rows = len(weight.weights)
            weight = Weight(tensors[:rows], tensors[rows:] or (None,) * rows)
            return linear(x, weight, activation=activation)
    kwargs: dict[str, Any] = {"activation": activation, "precision": precision}
    if torch.compiler.is_compiling():
        # The native version keeps packed weights, which a compiled graph cannot hold; the compiler has its own.
        _check_dtypes(x, weight, precision)
        return reference.linear(x, *weight.stacked(), **kwargs)
    _, run = backend.choose("linear", x.device.type, x, weight, **kwargs)
    return run(x, weight, **kwargs)


def _check_dtypes(x: Tensor, weight: Weight, precision: str | None) -> None:
    if precision not in QUANTIZED:
        biases = weight.biases or (None,) * len(weight.weights)
        for w, bias in zip(weight.weights, biases, strict=True):
            check_one_dtype("linear", x=x, weight=w, bias=bias)


def _checked(x: Tensor, weight: Tensor | Weight, bias: Tensor | None) -> Weight:
    """The operands as a Weight, its shapes held to those of x."""
    if isinstance(weight, Weight):
        check_shape("linear", "x", x, (None, weight.shape[1]))
        return weight
    check_shape("linear", "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape("linear", "x", x, (None, weight.shape[1]))
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],))
    return as_weight(weight, bias)
