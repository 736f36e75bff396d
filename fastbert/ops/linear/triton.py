"""linear by Triton: its autograd function, and what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.ops import _quantized_linear
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._triton import reason_against
from fastbert.ops.gate import gate
from fastbert.precision import QUANTIZED
from fastbert.weight import Weight


class _TritonLinear(torch.autograd.Function):
    """Saves x and weight, if a gradient needs them, and z, to which the activation is applied.

    z is also an output: as a saved output it stays a function of x, weight and bias for a second derivative.
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
    """dy act'(z), differentiable in both if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z.view_as(z) if create_graph else z.detach().requires_grad_()
        return torch.autograd.grad(reference.ACTIVATIONS[activation](z), z, dy, create_graph=create_graph)[0]


def run_triton(
    x: Tensor, weight: Weight, *, activation: str | None, precision: str | None, gated: bool = False
) -> Tensor:
    from fastbert.kernels.linear import linear_fwd

    if gated and activation is not None:
        return gate(run_triton(x, weight, activation=None, precision=precision), activation)
    if precision in QUANTIZED:
        return _quantized_linear.run(x, weight, activation)
    if needs_gradient(x, *weight.tensors):
        return _TritonLinear.apply(x, *weight.stacked(), activation)[0]
    stacked = weight.stacked() if len(weight.weights) == 1 else weight.form("stacked", weight.stacked)
    return linear_fwd(x, *stacked, activation)[0]


def supports_triton(
    x: Tensor, weight: Weight, *, activation: str | None = None, precision: str | None = None, gated: bool = False
) -> str | None:
    if precision in QUANTIZED:
        return _quantized_linear.supports(x, weight)
    return reason_against(x, *weight.tensors)
