"""attention with a bias that depends on head and distance: C++ on every instruction set, and the reference."""

from functools import partial

import pytest
import torch
from support import assert_accurate, poisoned_memory
from test_native_bwd import assert_op_accurate, dropped_attention, gradients, naive_attention

from fastbert import native, ops, reference, use_backend

LENGTHS = (0, 1, 5, 0, 32, 33, 64, 130)
CU = torch.tensor(LENGTHS).cumsum(0).int()


def matrix(bias, length):
    """The bias of each query and key, one by one."""
    middle = bias.shape[1] // 2
    places = torch.arange(length)
    return bias[:, middle + places[None, :] - places[:, None]]


def biased(qkv, bias, cu_seqlens=CU, scale=None, factors=None):
    return naive_attention(qkv, cu_seqlens, scale=scale, factors=factors, bias=partial(matrix, bias))


def inputs(heads, width, reach=130):
    torch.manual_seed(heads * 100 + width)
    return {"qkv": torch.randn(int(CU[-1]), 3, heads, width), "bias": torch.randn(heads, 2 * reach - 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width", "reach"), [(1, 2, 130), (3, 16, 131), (12, 32, 200), (2, 80, 130)])
def test_results_and_gradients(isa, heads, width, reach, dtype):
    given = inputs(heads, width, reach)
    for scale in (None, 2.0):
        with use_backend("native", "attention"), poisoned_memory():
            attention = lambda qkv, bias: ops.attention(qkv, CU, 130, scale=scale, bias=bias)  # noqa: E731, B023
            # dP - delta cancels where one key has nearly all the probability: by two roundings of dP, of up to 3.
            assert_op_accurate(attention, partial(biased, scale=scale), given, dtype, slack={"dbias": 4e-7})


def test_without_gradients_the_same_numbers(isa):
    given = inputs(3, 32)
    with use_backend("native", "attention"), torch.no_grad():
        got = ops.attention(given["qkv"], CU, 130, bias=given["bias"])
    exact = biased(given["qkv"].double(), given["bias"].double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    zero = ops.attention(given["qkv"], CU, 130, bias=torch.zeros(3, 259))
    torch.testing.assert_close(zero, ops.attention(given["qkv"], CU, 130), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_one_mask_forward_and_backward(isa, dtype):
    heads, p, given = 2, 0.3, inputs(2, 16)
    factors = dropped_attention(CU, heads, p, 130)
    attention = lambda qkv, bias: ops.attention(qkv, CU, 130, dropout_p=p, bias=bias)  # noqa: E731
    torch.manual_seed(7)  # as in dropped_attention
    got = gradients(attention, dtype, given)
    eager, exact = (gradients(partial(biased, factors=factors), d, given) for d in (dtype, torch.float64))
    for name, *values in zip(("out", *given), got, eager, exact, strict=True):
        # A bias's gradient sums up to 130 terms that cancel: what eager's error is there, is its luck with the mask.
        luck = 130 * torch.finfo(torch.float32).eps * float(values[2].abs().mean())
        assert_accurate(*values, name, (luck, luck) if name == "bias" else (0.0, 0.0))


def test_gradients_do_not_depend_on_threads(isa):
    given = inputs(5, 16)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(lambda qkv, bias: ops.attention(qkv, CU, 130, bias=bias), torch.float32, given))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_large_scores_and_biases(isa):
    given = inputs(2, 16)
    for factor in (100.0, 1e4):
        qkv, bias = given["qkv"] * factor**0.5, given["bias"] * factor
        got = native.attention(qkv, CU, 130, bias=bias)
        exact = biased(qkv.double(), bias.double())
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=2e-2 * float(qkv.abs().max()))


def test_the_reference():
    given = {name: x.double() for name, x in inputs(3, 16).items()}
    with use_backend("reference", "attention"):
        found = gradients(lambda qkv, bias: ops.attention(qkv, CU, 130, bias=bias), torch.float64, given)
    for a, b in zip(found, gradients(biased, torch.float64, given), strict=True):
        torch.testing.assert_close(a, b)
    dout = torch.randn_like(given["qkv"][:, 0])
    context = [x.clone().requires_grad_() for x in given.values()]
    expected = torch.autograd.grad(biased(*context), context, dout)
    for a, b in zip(reference.attention_gradients(dout, given["qkv"], CU, None, given["bias"]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    cu_seqlens = torch.tensor([0, 3, 7]).int()
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    function = lambda qkv, bias: ops.attention(qkv, cu_seqlens, 4, bias=bias)  # noqa: E731
    assert torch.autograd.gradcheck(function, (qkv, bias))
    assert torch.autograd.gradgradcheck(function, (qkv, bias))
    q32, b32 = qkv.detach().float().requires_grad_(), bias.detach().float().requires_grad_()
    first = torch.autograd.grad(function(q32, b32).square().sum(), (q32, b32), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (q32, b32))
    wide = [x.detach().double().requires_grad_() for x in (q32, b32)]
    first = torch.autograd.grad(biased(*wide, cu_seqlens).square().sum(), wide, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), wide)
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_compiled():
    given = inputs(2, 16)
    run = torch.compile(
        lambda qkv, bias: ops.attention(qkv, CU, 130, bias=bias) * 1.0, fullgraph=True, backend="aot_eager"
    )
    compiled = gradients(run, torch.float32, given)
    eager = gradients(lambda qkv, bias: ops.attention(qkv, CU, 130, bias=bias) * 1.0, torch.float32, given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 10), (3, 11), (2, 7), (11,)])
def test_a_bias_of_another_shape_is_named(shape):
    qkv, cu_seqlens = torch.randn(5, 3, 2, 4), torch.tensor([0, 5]).int()
    with pytest.raises(
        ValueError, match=r"attention: bias has shape .*; it must be \(2, an odd number of at least 9\)"
    ):
        ops.attention(qkv, cu_seqlens, 5, bias=torch.zeros(shape))
