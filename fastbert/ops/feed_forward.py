"""feed_forward: linear with activation, then linear; the tensor in between is saved for the backward or recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import native
from fastbert.ops import dispatch
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import check_floating, check_one_dtype, check_precision, check_shape
from fastbert.ops.gate import gate_gradient, run_gate
from fastbert.ops.linear import linear
from fastbert.precision import QUANTIZED
from fastbert.reference import ACTIVATIONS, activated, is_transformed
from fastbert.weight import Weight, as_weight

Wanted = tuple[bool, bool, bool]
_NAMES = ("x", "up_weight", "up_bias", "down_weight", "down_bias")


class _Parts(NamedTuple):
    """The functions of a backend's linear in training.

    `forward(x, weight, activation)` returns y and the tensor saved in place of y, `activate` recomputes y from it, and
    `backward(dy, x, weight, saved, activation, wanted)` returns the gradients of x, weight and bias.
    """

    forward: Callable[[Tensor, Weight, str | None], tuple[Tensor, Tensor | None]]
    activate: Callable[[Tensor, str], Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


class _Recomputed(torch.autograd.Function):
    """Saves x, (T, E), and what `up` saves, (T, F), but not the activation's output, (T, F)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        activation: str,
        weights: tuple[Weight, Weight],
        parts: tuple[_Parts, _Parts],
        gated: bool,
    ) -> Tensor:
        (up, down), (up_parts, down_parts) = weights, parts
        inner, saved = up_parts.forward(x, up, activation)
        y, _ = down_parts.forward(inner, down, None)
        ctx.save_for_backward(x, up_weight, saved, down_weight, up_bias, down_bias)
        ctx.constants, ctx.gated = (activation, weights, parts), gated
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up_weight, saved, down_weight, up_bias, down_bias = ctx.saved_tensors
        activation, (up, down), (up_parts, down_parts) = ctx.constants
        if torch.is_grad_enabled():
            inputs = x, up_weight, up_bias, down_weight, down_bias
            forward = partial(_formula, activation=activation, gated=ctx.gated)
            found = differentiable_gradients("feed_forward", forward, inputs, ctx.needs_input_grad[:5], dy)
            return *found, None, None, None, None
        wanted_up, wanted_down = ctx.needs_input_grad[:3], (any(ctx.needs_input_grad[:3]), *ctx.needs_input_grad[3:5])
        inner = up_parts.activate(saved, activation)
        dinner, *of_down = down_parts.backward(dy, inner, down, None, None, wanted_down)
        del inner
        of_up = (None, None, None)
        if dinner is not None:
            of_up = up_parts.backward(dinner, x, up, saved, activation, wanted_up)
        return *of_up, *of_down, None, None, None, None


def _formula(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str, gated: bool
) -> Tensor:
    return F.linear(activated(F.linear(x, up, up_bias), activation, gated), down, down_bias)


def _parts(x: Tensor, weight: Weight, activation: str | None, precision: str | None, gated: bool = False) -> _Parts:
    """The parts of the backend that runs this product."""
    name, _ = dispatch.choose("linear", x.device.type, x, weight, activation=activation, precision=precision)
    plain = _parts_of(name)
    return _gated(plain, name) if gated else plain


def _gated(plain: _Parts, backend: str) -> _Parts:
    """The parts of a gated product, from those of the plain one."""

    def forward(x: Tensor, weight: Weight, activation: str | None) -> tuple[Tensor, Tensor]:
        z, _ = plain.forward(x, weight, None)
        return run_gate(z, str(activation), backend), z

    def backward(dy: Tensor, x: Tensor, weight: Weight, z: Tensor, activation: str, wanted: Wanted) -> Any:
        return plain.backward(gate_gradient(dy, z, activation, backend), x, weight, None, None, wanted)

    return _Parts(forward, partial(run_gate, backend=backend), backward)


def _parts_of(name: str) -> _Parts:
    if name == "triton":
        from fastbert.kernels.activation import activation_fwd

        return _Parts(_triton_fwd, activation_fwd, _triton_bwd)
    if name == "native":
        return _Parts(native.linear_fwd_train, native.activate, native.linear_bwd)
    return _Parts(_reference_fwd, _reference_activate, _reference_bwd)


def _triton_fwd(x: Tensor, weight: Weight, activation: str | None) -> tuple[Tensor, Tensor | None]:
    from fastbert.kernels.linear import linear_fwd

    return linear_fwd(x, *weight.stacked(), activation, keep_z=True)


def _triton_bwd(
    dy: Tensor, x: Tensor, weight: Weight, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from fastbert.kernels.linear import linear_bwd

    return linear_bwd(dy, x, weight.stacked()[0], *rest)


def _reference_fwd(x: Tensor, weight: Weight, activation: str | None) -> tuple[Tensor, Tensor]:
    z = F.linear(x, *weight.stacked())
    return (z if activation is None else ACTIVATIONS[activation](z)), z


def _reference_activate(z: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](z)


def _reference_bwd(
    dy: Tensor, x: Tensor, weight: Weight, z: Tensor | None, activation: str | None, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if activation is not None and z is not None:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (dy,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, dy)
    want_x, want_weight, want_bias = wanted
    return (
        dy @ weight.stacked()[0] if want_x else None,
        dy.T @ x if want_weight else None,
        dy.sum(0) if want_bias else None,
    )


def feed_forward(
    x: Tensor,
    up_weight: Tensor | Weight,
    up_bias: Tensor | None,
    down_weight: Tensor | Weight,
    down_bias: Tensor | None,
    *,
    activation: str,
    precision: str | None = None,
    recompute: bool = False,
    gated: bool = False,
) -> Tensor:
    """linear(linear(x, up, activation), down): (T, E), (F, E), (F,), (E, F), (E,) -> (T, E).

    A `Weight` includes its bias, as for `linear`: the bias argument next to it is None.

    Args:
        precision: as for `linear`.
        recompute: save one tensor of (T, F) for the backward instead of two, and apply the activation again there.
            Under torch.compile, the compiler decides what is recomputed.
        gated: as for `linear`; then up is (2F, E).

    Raises:
        ValueError: as `linear`.
    """
    if not (isinstance(up_weight, Weight) or isinstance(down_weight, Weight)):
        _check(x, up_weight, up_bias, down_weight, down_bias, activation, precision, gated)
    up, down = as_weight(up_weight, up_bias), as_weight(down_weight, down_bias)
    # A quantised product has no gradient, and linear rejects it; torch.func does not support this autograd function.
    plain = torch.compiler.is_compiling() or precision in QUANTIZED or is_transformed()
    if not recompute or plain or not needs_gradient(x, *up.tensors, *down.tensors):
        inner = linear(x, up, activation=activation, precision=precision, gated=gated)
        return linear(inner, down, precision=precision)
    tensors = (x, *up.stacked(), *down.stacked())
    _check(*tensors, activation, precision, gated)
    if autocast_is_on(x):
        with autocast_off(x):
            return feed_forward(*cast(*tensors), activation=activation, recompute=True, gated=gated)
    check_one_dtype("feed_forward", **dict(zip(_NAMES, tensors, strict=True)))
    inner = x.new_empty((0, down.shape[1]))  # an example of the second product's input
    parts = _parts(x, up, activation, precision, gated), _parts(inner, down, None, precision)
    return _Recomputed.apply(*tensors, activation, (up, down), parts, gated)


def _check(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    precision: str | None,
    gated: bool,
) -> None:
    check_floating("feed_forward", "x", x)
    check_shape("feed_forward", "up_weight", up_weight, (None, None))
    check_shape("feed_forward", "x", x, (None, up_weight.shape[1]))
    width = up_weight.shape[0] // 2 if gated else up_weight.shape[0]
    check_shape("feed_forward", "down_weight", down_weight, (None, width))
    for name, bias, weight in (("up_bias", up_bias, up_weight), ("down_bias", down_bias, down_weight)):
        if bias is not None:
            check_shape("feed_forward", name, bias, (weight.shape[0],))
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward: activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    check_precision("feed_forward", precision, x, up_weight, up_bias, down_weight, down_bias)
