"""Operands of unlike dtypes: right values where an op takes them, else one error that names each and its dtype."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IDS = torch.zeros(4, dtype=torch.long)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


def randn(dtype, *shape, grad=False):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


# Of three dtypes: the call, and the names of what they are of.
PRODUCTS = {
    "linear": (
        lambda a, b, c, **g: ops.linear(randn(a, 4, 8, **g), randn(b, 6, 8, **g), randn(c, 6, **g)),
        ("x", "weight", "bias"),
    ),
    "feed_forward": (
        lambda a, b, c, **g: ops.feed_forward(
            *(randn(a, 4, 8, **g), randn(b, 6, 8, **g), None, randn(c, 8, 6, **g), None),
            activation="gelu",
            recompute=True,
        ),
        ("x", "up_weight", "down_weight"),
    ),
    "linear_cross_entropy": (
        lambda a, b, c, **g: ops.linear_cross_entropy(randn(a, 4, 8, **g), randn(b, 6, 8, **g), randn(c, 6, **g), IDS),
        ("x", "weight", "bias"),
    ),
}


@BACKENDS
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", PRODUCTS)
def test_products_of_unlike_dtypes(op, grad, backend):
    call, names = PRODUCTS[op]
    for dtypes in itertools.product(DTYPES, repeat=3):
        with fastbert.use_backend(backend):
            if len(set(dtypes)) == 1:
                call(*dtypes, grad=grad)
                continue
            shown = [f"{name} is {str(dtype)[6:]}" for name, dtype in zip(names, dtypes, strict=True)]
            with pytest.raises(ValueError, match=r"must be of one dtype, unless torch\.autocast is on") as error:
                call(*dtypes, grad=grad)
        if op == "feed_forward" and not grad:  # without a gradient it is two calls of linear
            assert str(error.value).startswith("linear: ")
        else:
            assert str(error.value).startswith(f"{op}: ") and all(part in str(error.value) for part in shown)


@pytest.mark.parametrize("op", PRODUCTS)
def test_autocast_takes_products_of_unlike_dtypes(op):
    with torch.autocast("cpu", torch.bfloat16):
        assert PRODUCTS[op][0](torch.float32, torch.bfloat16, torch.float32, grad=True).isfinite().all()


@BACKENDS
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", ["add_layer_norm", "embed_layer_norm"])
def test_norms_of_unlike_dtypes(op, grad, backend):
    """x or a table, residual or another table, weight, bias: whatever they are, the values of fp64."""
    for dtypes in itertools.product(DTYPES, repeat=4):
        tensors = [randn(d, *s, grad=grad) for d, s in zip(dtypes, [(4, 8), (4, 8), (8,), (8,)], strict=True)]
        summed = torch.promote_types(*dtypes[:2])

        def call(x, residual, weight, bias):
            if op == "add_layer_norm":
                return ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
            rows = torch.arange(4)
            return ops.embed_layer_norm(rows, rows, IDS, x, residual, torch.zeros_like(x), weight, bias, eps=1e-5)

        with fastbert.use_backend(backend):
            if torch.float64 in dtypes[2:] and summed != torch.float64:
                with pytest.raises(
                    ValueError, match=rf"^{op}: .*weight and bias may be float64 only where .* is$"
                ) as e:
                    call(*tensors)
                assert f"weight is {str(dtypes[2])[6:]}, bias is {str(dtypes[3])[6:]}" in str(e.value)
                continue
            y = call(*tensors)
        x, residual, weight, bias = (t.detach().double() for t in tensors)
        expected = F.layer_norm(x + residual, (8,), weight, bias, 1e-5)
        assert y.dtype == summed, dtypes
        assert (y - expected).abs().max() <= 4 * max(torch.finfo(d).eps for d in dtypes) * expected.abs().max(), dtypes
        if grad:
            y.sum().backward()
            assert all(t.grad.dtype == t.dtype and t.grad.isfinite().all() for t in tensors), dtypes


def test_tables_of_integers_are_refused():
    tables = torch.ones(4, 8, dtype=torch.int64), torch.ones(4, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"embed_layer_norm: word has dtype torch\.int64"):
        ops.embed_layer_norm(IDS, IDS, IDS, *tables, torch.ones(8), torch.ones(8), eps=1e-5)
