"""gate: act(a) b of the two halves of a row's columns, between the products of a gated feed-forward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert import native, reference
from fastbert.native.extension import cpu_reason
from fastbert.ops import dispatch
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import check_floating
from fastbert.ops._triton import reason_against


class _Gate(torch.autograd.Function):
    """Saves z. `backend` is native or triton."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, activation: str, backend: str) -> Tensor:
        ctx.save_for_backward(z)
        ctx.constants = activation, backend
        return run_gate(z, activation, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        (z,), (activation, backend) = ctx.saved_tensors, ctx.constants
        if torch.is_grad_enabled():
            forward = partial(reference.activated, activation=activation, gated=True)
            return differentiable_gradients("gate", forward, (z,), (True,), dy)[0], None, None
        return gate_gradient(dy, z, activation, backend), None, None


def run_gate(z: Tensor, activation: str, backend: str) -> Tensor:
    if backend == "native":
        return native.gate(z, activation)
    if backend == "triton":
        from fastbert.kernels.activation import gate_fwd

        return gate_fwd(z, activation)
    return reference.activated(z, activation, gated=True)


def gate_gradient(dy: Tensor, z: Tensor, activation: str, backend: str) -> Tensor:
    """The gradient of z."""
    if backend == "native":
        return native.gate_bwd(dy, z, activation)
    if backend == "triton":
        from fastbert.kernels.activation import gate_bwd

        return gate_bwd(dy, z, activation)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(reference.activated(z, activation, gated=True), z, dy)[0]


def gate(z: Tensor, activation: str) -> Tensor:
    """act(a) b, z = (a, b): (T, 2F) -> (T, F).

    Raises:
        ValueError: an odd number of columns, an unknown activation.
    """
    check_floating("gate", "z", z)
    if z.dim() != 2 or z.shape[1] % 2:
        raise ValueError(f"gate: z has shape {tuple(z.shape)}; it must be (*, an even number)")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"gate: activation is {activation!r}; known are {', '.join(reference.ACTIVATIONS)}")
    if torch.compiler.is_compiling():
        return reference.activated(z, activation, gated=True)
    _, run = dispatch.choose("gate", z.device.type, z, activation)
    return run(z, activation)


def _run(backend: str, z: Tensor, activation: str) -> Tensor:
    return _Gate.apply(z, activation, backend) if needs_gradient(z) else run_gate(z, activation, backend)


def _supports_native(z: Tensor, activation: str) -> str | None:
    return cpu_reason(z)


def _supports_triton(z: Tensor, activation: str) -> str | None:
    return reason_against(z)


dispatch.implement("gate", "triton", partial(_run, "triton"), _supports_triton)
dispatch.implement("gate", "native", partial(_run, "native"), _supports_native)
dispatch.implement("gate", "reference", partial(reference.activated, gated=True))
