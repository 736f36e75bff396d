"""Derivatives of gradients where the op runs by Triton: of each op against its formula in fp64."""

import pytest
import torch

pytest.importorskip("triton")

import torch.nn.functional as F
from test_second_derivatives import CU, OPS, E, T, penalty, vectors
from test_triton_model import OPS as TRITON_OPS
from test_triton_model import triton_on_any_device
from triton_support import DEVICE, INTERPRETED, runs

import fastbert
from fastbert import ops

assert triton_on_any_device  # a fixture, used by name


@pytest.fixture(autouse=True)
def _triton_where_it_runs(request):
    if INTERPRETED:
        request.getfixturevalue("triton_on_any_device")


def on_device(call, tensors):
    with torch.device(DEVICE):
        return [t.cpu() for t in penalty(call, [t.to(DEVICE) for t in tensors], torch.float32)]


def check(op, formula, tensors):
    with fastbert.use_backend("triton", *TRITON_OPS):
        got = on_device(op, tensors)
    for a, b in zip(got, penalty(formula, tensors, torch.float64), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@runs
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_of_ops(name):
    if DEVICE != "cpu" and name in ("attention", "embed_layer_norm", "linear_cross_entropy"):
        pytest.skip("its ids are on the host")
    check(*OPS[name])


@runs
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "weight and bias"])
@pytest.mark.parametrize("activation", [None, "gelu", "tanh"])
def test_linear_of_which_a_part_has_no_gradient(frozen, activation):
    """Such a part is not kept, and what is kept instead has to do."""
    every = dict(zip(("x", "weight", "bias"), vectors((T, E), (6, E), (6,)), strict=True))
    still = {name: every[name] for name in frozen.split(" and ")}
    moving = [name for name in every if name not in still]

    def by(linear):
        def call(*leaves):
            fixed = {name: t.to(leaves[0]) for name, t in still.items()}
            return linear(**fixed, **dict(zip(moving, leaves, strict=True))).sin()

        return call

    def formula(x, weight, bias):
        z = F.linear(x, weight, bias)
        return z if activation is None else getattr(F, activation)(z)

    check(by(lambda **t: ops.linear(**t, activation=activation)), by(formula), [every[name] for name in moving])


@runs
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_add_layer_norm_of_two_dtypes(dtypes):
    """A sum in fp32; each part's gradient is in its own dtype."""

    def op(x, residual, *vectors):
        return ops.add_layer_norm(x.to(dtypes[0]), residual.to(dtypes[1]), *vectors, eps=1e-5)

    def formula(x, residual, *vectors):
        return F.layer_norm(x + residual, (E,), *vectors, 1e-5)

    check(op, formula, [t.half().float() for t in vectors((T, E), (T, E))] + vectors((E,), (E,)))


@runs
def test_a_third_derivative():
    x, weight = vectors((T, E), (6, E))

    def third(call, dtype):
        a = x.to(DEVICE, dtype).requires_grad_()
        y = call(a, weight.to(DEVICE, dtype)).sum()
        for _ in range(2):
            (d,) = torch.autograd.grad(y, a, create_graph=True)
            y = d.square().sum()
        return torch.autograd.grad(y, a)[0]

    with fastbert.use_backend("triton", "linear"):
        got = third(lambda a, w: ops.linear(a, w, activation="tanh"), torch.float32)
    torch.testing.assert_close(
        got.double(), third(lambda a, w: F.linear(a, w).tanh(), torch.float64), rtol=1e-3, atol=1e-3
    )


@runs
@pytest.mark.parametrize("name", ["attention", "add_layer_norm"])
def test_with_dropout_it_is_one_error(name):
    calls = {
        "attention": lambda t: ops.attention(t[0], CU.to(DEVICE), 4, dropout_p=0.5),
        "add_layer_norm": lambda t: ops.add_layer_norm(*t, eps=1e-5, dropout_p=0.5),
    }
    leaves = [t.to(DEVICE).requires_grad_() for t in OPS[name][2]]
    with fastbert.use_backend("triton", name):
        y = calls[name](leaves).sum()
        with pytest.raises(RuntimeError, match=rf"{name}: a derivative of its gradient .* dropout_p is 0.5"):
            torch.autograd.grad(y, leaves, create_graph=True)
        torch.autograd.grad(calls[name](leaves).sum(), leaves)
