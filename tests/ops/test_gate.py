"""Gated products: act(a) b of a product's halves, fused and in training, in C++ on every instruction set."""

import pytest
import torch
from support import poisoned_memory
from test_native_bwd import assert_op_accurate

from fastbert import ops, reference, use_backend
from fastbert.reference import ACTIVATIONS


def split(dtype, **sizes):
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in sizes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate(isa, activation, dtype):
    given = {"z": 2 * split(torch.float32, z=(67, 2 * 37))["z"]}
    with use_backend("native", "gate"), poisoned_memory():
        run = lambda z: ops.gate(z, activation)  # noqa: E731
        exact = lambda z: reference.activated(z, activation, gated=True)  # noqa: E731
        assert_op_accurate(run, exact, given, dtype, slack={"out": 3e-7, "dz": 6e-7})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "width"), [(1, 32, 16), (37, 48, 64), (50, 90, 34), (3, 16, 2)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_gated_product(isa, rows, inner, width, with_bias, dtype):
    """Halves that fill their panels, and others."""
    given = split(torch.float32, x=(rows, width), weight=(2 * inner, width))
    given["weight"] /= width**0.5
    given |= split(torch.float32, bias=(2 * inner,)) if with_bias else {}

    def run(x, weight, bias=None):
        return ops.linear(x, weight, bias, activation="gelu", gated=True)

    def exact(x, weight, bias=None):
        return reference.linear(x, weight, bias, activation="gelu", gated=True)

    with use_backend("native", "linear"), poisoned_memory():
        assert_op_accurate(run, exact, given, dtype, slack={"out": 2e-7})
        with torch.no_grad():
            fused = run(**given)
    torch.testing.assert_close(fused, exact(**given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["int8", "high", "highest"])
def test_precisions(isa, precision, dtype):
    if precision != "int8" and dtype != torch.float32:
        pytest.skip("it is for float32")
    given = split(dtype, x=(50, 256), weight=(2 * 72, 256), bias=(2 * 72,))
    with torch.no_grad():
        got = ops.linear(**given, activation="silu", precision=precision, gated=True)
        expected = reference.linear(**given, activation="silu", precision=precision, gated=True)
    scale = float(expected.float().norm())
    assert float((got.float() - expected.float()).norm()) < (2e-5 if dtype == torch.float32 else 1e-2) * scale


def test_two_weights_are_the_halves(isa):
    given = split(torch.float32, x=(20, 32), gate=(48, 32), up=(48, 32))
    both = ops.Weight([given["gate"], given["up"]], [None, None])
    a, b = (given["x"] @ given[name].T for name in ("gate", "up"))
    with torch.no_grad():
        got = ops.linear(given["x"], both, activation="silu", gated=True)
    torch.testing.assert_close(got, torch.nn.functional.silu(a) * b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_recomputed_in_the_backward(backend):
    given = split(torch.float32, x=(30, 16), up=(2 * 24, 16), up_bias=(48,), down=(16, 24))
    found = []
    with use_backend(backend, "linear", "gate"):
        for recompute in (False, True):
            leaves = [x.clone().requires_grad_() for x in given.values()]
            y = ops.feed_forward(*leaves, None, activation="gelu", gated=True, recompute=recompute)
            found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_second_derivatives():
    given = split(torch.float32, x=(5, 6), weight=(8, 6))
    results = []
    for kind in (torch.float32, torch.float64):
        leaves = [x.to(kind).requires_grad_() for x in given.values()]
        y = ops.linear(*leaves, activation="silu", gated=True)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


def test_compiled():
    given = split(torch.float32, x=(7, 16), weight=(48, 16))
    run = torch.compile(
        lambda x, w: ops.linear(x, w, activation="gelu", gated=True), fullgraph=True, backend="aot_eager"
    )
    expected = ops.linear(*given.values(), activation="gelu", gated=True)
    torch.testing.assert_close(run(*given.values()), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ops.linear(torch.zeros(2, 4), torch.zeros(6, 4), gated=True), "gated with activation None and 6"),
        (
            lambda: ops.linear(torch.zeros(2, 4), torch.zeros(5, 4), activation="gelu", gated=True),
            "gated with activation 'gelu' and 5 columns",
        ),
        (lambda: ops.gate(torch.zeros(2, 5), "gelu"), r"gate: z has shape \(2, 5\)"),
        (lambda: ops.gate(torch.zeros(2, 4), "swish9"), "gate: activation is 'swish9'"),
    ],
)
def test_what_does_not_fit_is_named(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()
