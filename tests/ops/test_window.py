"""attention with a window of keys: C++ on every instruction set, and the reference."""

from functools import partial

import pytest
import torch
from support import assert_accurate, poisoned_memory
from test_native_bwd import assert_op_accurate, dropped_attention, gradients, naive_attention

from fastbert import native, ops, reference, use_backend

LENGTHS = (0, 1, 5, 0, 32, 33, 64, 150)
CU = torch.tensor(LENGTHS).cumsum(0).int()
LONGEST = max(LENGTHS)


def outside(window, length, dtype):
    """What is added to the scores, (L, L): 0 within the window."""
    places = torch.arange(length)
    return torch.zeros(length, length, dtype=dtype).masked_fill((places[:, None] - places).abs() > window, -torch.inf)


def windowed(qkv, window, cu_seqlens=CU, factors=None, bias=None):
    def added(length):
        own = outside(window, length, qkv.dtype)
        return own if bias is None else own + reference.bias_of_distances(bias, length)

    return naive_attention(qkv, cu_seqlens, factors=factors, bias=added)


def rows(heads, width):
    torch.manual_seed(heads * 100 + width)
    return {"qkv": torch.randn(int(CU[-1]), 3, heads, width)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 7, 31, 64, 149, 1000])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 16), (2, 80)])
def test_results_and_gradients(isa, heads, width, window, dtype):
    with use_backend("native", "attention"), poisoned_memory():
        attention = lambda qkv: ops.attention(qkv, CU, LONGEST, window=window)  # noqa: E731
        # Where a query sees one key, dP - delta is the rounding of dP, of up to 10.
        slack = {"dqkv": 1e-6} if window < 2 else {}
        assert_op_accurate(attention, partial(windowed, window=window), rows(heads, width), dtype, slack=slack)


def test_the_same_numbers_without_gradients_and_with_a_window_that_sees_all(isa):
    qkv = rows(3, 32)["qkv"]
    with use_backend("native", "attention"), torch.no_grad():
        for window in (0, 5, 64):
            got = ops.attention(qkv, CU, LONGEST, window=window).double()
            torch.testing.assert_close(got, windowed(qkv.double(), window), rtol=1e-5, atol=1e-6)
        assert torch.equal(ops.attention(qkv, CU, LONGEST, window=LONGEST), ops.attention(qkv, CU, LONGEST))


def test_with_a_bias(isa):
    given = {**rows(2, 16), "bias": torch.randn(2, 2 * 160 - 1)}
    with use_backend("native", "attention"):
        attention = lambda qkv, bias: ops.attention(qkv, CU, LONGEST, bias=bias, window=9)  # noqa: E731
        exact = lambda qkv, bias: windowed(qkv, 9, bias=bias)  # noqa: E731
        assert_op_accurate(attention, exact, given, torch.float32, slack={"dbias": 4e-7})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_one_mask_forward_and_backward(isa, dtype):
    p, given = 0.3, rows(2, 16)
    factors = dropped_attention(CU, 2, p, LONGEST)
    attention = lambda qkv: ops.attention(qkv, CU, LONGEST, dropout_p=p, window=20)  # noqa: E731
    torch.manual_seed(7)  # as in dropped_attention
    got = gradients(attention, dtype, given)
    eager, exact = (gradients(partial(windowed, window=20, factors=factors), d, given) for d in (dtype, torch.float64))
    for name, *values in zip(("out", *given), got, eager, exact, strict=True):
        assert_accurate(*values, name)


def test_gradients_do_not_depend_on_threads(isa):
    given, found = rows(5, 16), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(lambda qkv: ops.attention(qkv, CU, LONGEST, window=40), torch.float32, given))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_key_outside_the_window_is_never_read(isa):
    """Whatever it holds: large scores neither overflow nor move the highest score."""
    qkv = torch.randn(300, 3, 2, 16)
    cu_seqlens = torch.tensor([0, 300]).int()
    loud = qkv.clone()
    loud[200:, 1] *= 1e4
    contexts = []
    for rows_given in (qkv, loud):
        x = rows_given.clone().requires_grad_()
        y = ops.attention(x, cu_seqlens, 300, window=30)
        y[:150].sum().backward()
        assert x.grad.isfinite().all() and not x.grad[180:].any()
        contexts.append(y[:150].detach())
    assert torch.equal(*contexts)


def test_the_reference():
    qkv = rows(3, 16)["qkv"].double()
    with use_backend("reference", "attention"):
        found = gradients(lambda qkv: ops.attention(qkv, CU, LONGEST, window=12), torch.float64, {"qkv": qkv})
        plain = ops.attention(qkv, CU, LONGEST, window=12)
    expected = gradients(partial(windowed, window=12), torch.float64, {"qkv": qkv})
    for a, b in zip((*found, plain), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    cu_seqlens = torch.tensor([0, 3, 7]).int()
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    function = lambda qkv: ops.attention(qkv, cu_seqlens, 4, window=1)  # noqa: E731
    assert torch.autograd.gradcheck(function, qkv) and torch.autograd.gradgradcheck(function, qkv)
    small = qkv.detach().float().requires_grad_()
    first = torch.autograd.grad(function(small).square().sum(), small, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), small)[0]
    wide = small.detach().double().requires_grad_()
    first = torch.autograd.grad(windowed(wide, 1, cu_seqlens).square().sum(), wide, create_graph=True)[0]
    expected = torch.autograd.grad(first.square().sum(), wide)[0]
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-4)


def test_compiled():
    given = rows(2, 16)
    run = torch.compile(
        lambda qkv: ops.attention(qkv, CU, LONGEST, window=10) * 1.0, fullgraph=True, backend="aot_eager"
    )
    compiled = gradients(run, torch.float32, given)
    eager = gradients(lambda qkv: ops.attention(qkv, CU, LONGEST, window=10) * 1.0, torch.float32, given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="attention: window is -1; it must be at least 0"):
        ops.attention(torch.randn(5, 3, 2, 4), torch.tensor([0, 5]).int(), 5, window=-1)


def test_the_time_of_a_window_grows_with_the_tokens_alone(isa):
    """Four times the tokens take less than seven times as long, where all keys would take sixteen."""
    from time import perf_counter

    def seconds(length):
        qkv, cu_seqlens = torch.randn(length, 3, 2, 32), torch.tensor([0, length]).int()
        times = []
        for _ in range(7):
            start = perf_counter()
            native.attention(qkv, cu_seqlens, length, window=32)
            times.append(perf_counter() - start)
        return min(times)

    if isa == "amx_emulated":
        pytest.skip("emulated")
    assert seconds(4096) < 7 * seconds(1024)
