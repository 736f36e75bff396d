"""Accuracy that is ours: bounds of the formulas, not of what another library happens to round to."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import require_native

import fastbert
from fastbert import ops, reference

EPS = torch.finfo(torch.float32).eps
# In fp64.
FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5)),
    "gelu_new": lambda x: x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x * torch.sigmoid(x),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_derivatives_of_activations(isa, activation):
    """Over -8 to 8, where they are between -0.13 and 1.13: within four roundings."""
    columns = 16
    z = torch.linspace(-8, 8, 4000 * columns).view(-1, columns)
    exact = z.double().requires_grad_()
    FORMULAS[activation](exact).sum().backward()
    x = z.clone().requires_grad_()
    with fastbert.use_backend("native", "linear"):
        ops.linear(x, torch.eye(columns), None, activation=activation).sum().backward()
    assert (x.grad - exact.grad).abs().max() <= 4 * EPS


@pytest.mark.parametrize("activation", FORMULAS)
def test_derivatives_far_out(isa, activation):
    x = torch.tensor([[-1e30, -1e14, -50.0, 50.0, 1e14, 1e30, float("nan"), 0.0]], requires_grad=True)
    with fastbert.use_backend("native", "linear"):
        y = ops.linear(x.t(), torch.ones(1, 1), None, activation=activation)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx[0, :6], torch.tensor([0.0, 0, 0, 1, 1, 1]), rtol=0, atol=1e-15)
    assert dx[0, 6].isnan() and dx[0, 7] == 0.5


def test_derivative_of_tanh_gelu_in_the_reference():
    """The formula written out takes 1 - tanh^2 of a rounded tanh, times up to 17: 8 roundings at most."""
    z = torch.linspace(-8, 8, 64000)
    exact, x = z.double().requires_grad_(), z.clone().requires_grad_()
    FORMULAS["gelu_new"](exact).sum().backward()
    reference.linear(x[:, None], torch.eye(1), activation="gelu_new").sum().backward()
    assert (x.grad - exact.grad).abs().max() <= 8 * EPS


NORMS = {
    "add_layer_norm": lambda x, w, b: ops.add_layer_norm(x, None, w, b, eps=1e-12),
    "embed_layer_norm": lambda x, w, b: ops.embed_layer_norm(
        torch.arange(len(x)), *(torch.zeros(len(x), dtype=torch.long) for _ in range(2)), x, *ZEROS, w, b, eps=1e-12
    ),
}
WIDTH = 384
ZEROS = torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("value", [3.3, -0.1, 1e4])
@pytest.mark.parametrize("norm", NORMS)
def test_a_constant_row_is_its_bias(isa, norm, value, grad):
    x = torch.full((3, WIDTH), value, requires_grad=grad)
    weight, bias = torch.ones(WIDTH), torch.linspace(-1, 1, WIDTH)
    with fastbert.use_backend("native", norm):
        y = NORMS[norm](x, weight, bias)
    # Without the correction the mean's rounding, eps / 2 of the value, is blown up by 1 / sqrt(1e-12).
    assert (y - bias).abs().max() <= 1e-3 * max(1.0, abs(value) * EPS / 2 * 1e6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e3, -1e4])
def test_rows_far_from_zero(isa, norm, mean):
    """Their values are rounded as they come; from there on, mean and spread cost no digits."""
    require_native()
    x = (torch.randn(40, WIDTH) + mean).requires_grad_()
    weight, bias, dy = torch.randn(WIDTH), torch.randn(WIDTH), torch.randn(40, WIDTH)
    exact = x.detach().double().requires_grad_()
    expected = F.layer_norm(exact, (WIDTH,), weight.double(), bias.double(), 1e-12)
    with fastbert.use_backend("native", norm):
        y = NORMS[norm](x, weight, bias)
        with torch.no_grad():
            inference = NORMS[norm](x, weight, bias)
    y.backward(dy), expected.backward(dy.double())
    for got in (y, inference):
        assert (got - expected).abs().max() <= 2e-6 * float(expected.abs().max())
    assert (x.grad - exact.grad).abs().max() <= 2e-6 * float(exact.grad.abs().max())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_in_any_layout(layout, dtypes):
    x, residual = (torch.randn(6, 16).to(dtype) for dtype in dtypes)
    lay = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.t().contiguous().t(),
        "strided": lambda t: torch.stack([t, t], 2)[:, :, 0],
    }[layout]
    weight, bias = torch.randn(16), torch.randn(16)
    expected = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
    for a, b in ((lay(x), residual), (x, lay(residual)), (lay(x), lay(residual))):
        torch.testing.assert_close(ops.add_layer_norm(a, b, weight, bias, eps=1e-5), expected, rtol=1e-6, atol=1e-6)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_every_mix_of_dtypes_has_the_right_values(x_dtype, residual_dtype, weight_dtype, grad):
    """fp16 and bf16 together make fp32, which neither is: what a kernel is asked for is what it gets."""
    x, residual = torch.randn(6, 16).to(x_dtype), torch.randn(6, 16).to(residual_dtype)
    weight, bias = torch.randn(16).to(weight_dtype), torch.randn(16).to(weight_dtype)
    expected = F.layer_norm(x.double() + residual.double(), (16,), weight.double(), bias.double(), 1e-5)
    y = ops.add_layer_norm(x.requires_grad_(grad), residual, weight, bias, eps=1e-5)
    assert y.dtype == torch.promote_types(x_dtype, residual_dtype)
    coarsest = max(torch.finfo(t.dtype).eps for t in (x, residual, weight))
    assert (y - expected).abs().max() <= 4 * coarsest * float(expected.abs().max())
    if grad:
        y.sum().backward()
        assert x.grad.isfinite().all()
