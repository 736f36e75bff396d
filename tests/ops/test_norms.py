"""add_layer_norm where norms stand before: the sum as a second output, RMSNorm, norms without a bias, in C++."""

from functools import partial

import pytest
import torch
from support import assert_accurate, poisoned_memory

from fastbert import ops, reference, use_backend

ROWS = [(0, 8), (1, 2), (63, 111), (70, 768)]


def tensors(rows, width, dtype, with_bias):
    torch.manual_seed(rows)
    given = {name: torch.randn(rows, width) + 2 for name in ("x", "residual")}
    given |= {name: torch.randn(width) for name in ("weight", "bias")}
    given = {name: x.to(dtype) for name, x in given.items()}
    return given if with_bias else {**given, "bias": None}


def outputs_and_gradients(function, given, dtype, dsum=True):
    leaves = {name: None if x is None else x.detach().to(dtype).requires_grad_() for name, x in given.items()}
    y, total = function(**leaves)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
    wanted = [x for x in leaves.values() if x is not None]
    found = torch.autograd.grad((y, total) if dsum else (y,), wanted, (dy, dy.flip(0)) if dsum else (dy,))
    return [y.detach(), total.detach(), *found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rms", "with_bias"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize(("rows", "width"), ROWS)
@pytest.mark.parametrize("dsum", [True, False])
def test_results_and_gradients(isa, dsum, rows, width, rms, with_bias, dtype):
    given = tensors(rows, width, dtype, with_bias)
    options = {"eps": 1e-5, "rms": rms, "return_sum": True}
    with use_backend("native", "add_layer_norm"), poisoned_memory():
        got = outputs_and_gradients(partial(ops.add_layer_norm, **options), given, dtype, dsum)
        with torch.no_grad():
            plain = ops.add_layer_norm(**given, **options)
            alone = ops.add_layer_norm(**given, eps=1e-5, rms=rms)
    eager = outputs_and_gradients(partial(reference.add_layer_norm, **options), given, dtype, dsum)
    exact = outputs_and_gradients(partial(reference.add_layer_norm, **options), given, torch.float64, dsum)
    slack = (4e-6, 4e-6) if dtype == torch.float32 else (2e-3, 2e-3)
    for i, three in enumerate(zip(got, eager, exact, strict=True)):
        assert_accurate(*three, f"number {i}", slack)
    torch.testing.assert_close(plain[0], got[0], rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
    assert torch.equal(plain[1], got[1])
    torch.testing.assert_close(alone, got[0], rtol=2e-2, atol=5e-2)


def test_dropout_in_the_sum(isa):
    """One mask for the norm, the sum and both gradients."""
    given = tensors(40, 64, torch.float32, with_bias=False)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in given.items()}
    y, total = ops.add_layer_norm(**leaves, eps=1e-5, dropout_p=0.4, return_sum=True)
    moved = (total - leaves["residual"]).detach()
    kept = moved != 0
    torch.testing.assert_close(moved[kept], leaves["x"].detach()[kept] / 0.6, rtol=1e-5, atol=1e-5)
    assert 0.5 < kept.float().mean() < 0.7
    torch.testing.assert_close(y, reference.layer_norm(total, leaves["weight"], None, 1e-5), rtol=1e-5, atol=1e-5)
    dx, dresidual = torch.autograd.grad((total * 3).sum() + y.sum(), (leaves["x"], leaves["residual"]))
    torch.testing.assert_close(dx, dresidual * kept / 0.6)


def test_second_derivatives_of_both_outputs():
    given, results = tensors(5, 6, torch.float32, with_bias=True), []
    for kind in (torch.float32, torch.float64):
        leaves = {name: x.detach().to(kind).requires_grad_() for name, x in given.items()}
        y, total = ops.add_layer_norm(**leaves, eps=1e-3, return_sum=True)
        first = torch.autograd.grad((y.square() * total).sum(), leaves.values(), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves.values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_rmsnorm_with_a_bias_is_refused():
    given = tensors(5, 6, torch.float32, with_bias=True)
    with pytest.raises(ValueError, match="add_layer_norm: bias is given with rms; RMSNorm has none"):
        ops.add_layer_norm(**given, eps=1e-5, rms=True)
