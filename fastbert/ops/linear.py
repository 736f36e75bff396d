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


def _second(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    forward = partial(reference.linear, activation=ctx.activation)
    return differentiable_gradients("linear", forward, (x, weight, bias), ctx.needs_input_grad[:3], dy)


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


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None, precision: str | None) -> Tensor:
    from fastbert.kernels.linear import linear_fwd

    if precision in QUANTIZED:
        return _quantized_linear.run(x, weight, bias, activation, precision)
    if needs_gradient(x, weight, bias):
        return _TritonLinear.apply(x, weight, bias, activation)[0]
    return linear_fwd(x, weight, bias, activation)[0]


def _supports_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
) -> str | None:
    if precision in QUANTIZED:
        return _quantized_linear.supports(x, weight, bias, precision)
    return reason_against(x, weight, bias)


class _NativeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        y, saved = native.linear_training(x, weight, bias, activation)
        ctx.save_for_backward(x, weight, saved, bias)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_second(ctx, dy, *saved[:2], bias), None
        return *native.linear_backward(dy, *saved, ctx.activation, ctx.needs_input_grad[:3]), None


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None, precision: str | None) -> Tensor:
    if needs_gradient(x, weight, bias):  # in full precision, which "high" and "highest" allow
        return _NativeLinear.apply(x, weight, bias, activation)
    return native.linear(x, weight, bias, activation=activation, precision=precision)


def _describe(words: Callable[[str | None], str | None]) -> Callable[..., str | None]:
    return lambda *args, precision=None, **kwargs: words(precision)


backend.implement("linear", "triton", _triton, _supports_triton, _describe(_quantized_linear.describe))
backend.implement("linear", "native", _native, native.supports_linear, _describe(native.describe_precision))
backend.implement("linear", "reference", reference.linear, describe=_describe(reference.describe_precision))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """(T, E), (F, E), (F,) -> (T, F), with one of `reference.ACTIVATIONS` on top.

    Args:
        precision: how the operands are multiplied. None: as they are, in their dtype, sums in fp32. "high",
            "highest": in float32, which a backend may split into bf16 pieces, three or six products in place of
            one. "int8": x rounded to int8 by its rows, weight by its rows, sums in int32, without a gradient; see
            `reference.linear_int8`. "fp8": likewise to float8_e4m3fn, sums in fp32; see `reference.linear_fp8`.

    Raises:
        ValueError: a shape or dtype that does not fit, an unknown activation or precision, a gradient of int8 or
            fp8.
    """
    check_floating("linear", "x", x)
    check_shape("linear", "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape("linear", "x", x, (None, weight.shape[1]))
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],))
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}; known are {', '.join(reference.ACTIVATIONS)}")
    check_precision("linear", precision, x, weight, bias)
    if autocast_is_on(x):
        with autocast_off(x):
            if precision in QUANTIZED:  # chosen for the model, and narrower than autocast
                return linear(x, weight, bias, activation=activation, precision=precision)
            return linear(*cast(x, weight, bias), activation=activation)
    kwargs = {"activation": activation, "precision": precision}
    if torch.compiler.is_compiling():
        # The native version keeps packed weights, which a compiled graph cannot hold; the compiler has its own.
        _check_dtypes(x, weight, bias, precision)
        return reference.linear(x, weight, bias, **kwargs)
    name, run = backend.choose("linear", x.device.type, x, weight, bias, **kwargs)
    if name == "reference":
        _check_dtypes(x, weight, bias, precision)
    if weight.is_meta and name == "reference" and not x.is_meta:
        raise ValueError(
            "linear: weight has no memory; a model loaded with inference_only=True runs in the dtype, precision and "
            "backend that it was loaded for, and is not copied, trained or compiled"
        )
    return run(x, weight, bias, **kwargs)


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str | None) -> None:
    if precision not in QUANTIZED:
        check_one_dtype("linear", x=x, weight=weight, bias=bias)
