"""The accuracy contract: right results keep it, and each kind of planted error breaks it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import complaint, limits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cut(x, bits):
    """x with so many bits fewer in its mantissa, cut off."""
    kind, mask = (torch.int32, -(1 << bits)) if x.dtype == torch.float32 else (torch.int16, -(1 << bits))
    return (x.view(kind) & mask).view(x.dtype)


def product(dtype, rows=64, inner=256, columns=96):
    """(exact, eager) of a linear layer."""
    x, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner) / 16, torch.randn(columns)
    operands = [t.to(dtype) for t in (x, weight, bias)]
    return F.linear(*(t.double() for t in operands)), F.linear(*operands)


def norm(dtype):
    x, weight, bias = torch.randn(64, 96), torch.rand(96) + 0.5, torch.randn(96)
    operands = [t.to(dtype) for t in (x, weight, bias)]
    exact = F.layer_norm(operands[0].double(), (96,), *(t.double() for t in operands[1:]))
    return exact, F.layer_norm(operands[0], (96,), *operands[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [product, norm])
def test_right_results_keep_it(make, dtype):
    """Eager's, and what is exact but for one rounding."""
    exact, eager = make(dtype)
    allowed = limits(exact, eager)
    assert complaint(eager, exact, allowed) is None
    assert complaint(exact.to(dtype), exact, allowed) is None


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100])
def test_one_rounding_of_few_elements_keeps_it(size):
    """Where eager happens to be exact."""
    for _ in range(200):
        exact = torch.randn(size, dtype=torch.float64)
        assert complaint(exact.bfloat16(), exact, limits(exact, exact.bfloat16())) is None
        allowed = limits(exact.bfloat16().double(), exact.bfloat16())
        nearby = exact.bfloat16().double() + exact * 2**-9 * (2 * torch.rand(size) - 1)
        assert complaint(nearby.float(), exact.bfloat16().double(), allowed) is None


PLANTED = {
    "two bits fewer": lambda y: cut(y, 2),
    "another unit in one element": lambda y: y.index_fill(0, torch.tensor(5), 1.0),
    "a scale of 1 %": lambda y: y * 1.01,
    "a NaN": lambda y: y.masked_fill(torch.arange(y.numel()).view(y.shape) == 7, float("nan")),
    "rows exchanged": lambda y: y.flip(0),
    "the last column left out": lambda y: F.pad(y[:, :-1], (0, 1)),
    "another shape": lambda y: y[:-1],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [product, norm])
@pytest.mark.parametrize("planted", PLANTED)
def test_planted_errors_break_it(planted, make, dtype):
    exact, eager = make(dtype)
    for right in (eager, exact.to(dtype)):
        assert complaint(PLANTED[planted](right), exact, limits(exact, eager)) is not None


@pytest.mark.parametrize("planted", ["a scale of 1 %", "a NaN", "rows exchanged", "the last column left out"])
def test_planted_errors_break_it_in_fp32(planted):
    exact, eager = product(torch.float32)
    assert complaint(PLANTED[planted](eager), exact, limits(exact, eager)) is not None


def test_sums_in_bf16_break_it():
    """A product whose partial sums are rounded to bf16 after every 16 columns, as an accumulator of that type does."""
    exact, eager = product(torch.bfloat16, inner=2048)
    x, weight, bias = torch.randn(64, 2048).bfloat16(), (torch.randn(96, 2048) / 16).bfloat16(), torch.zeros(96)
    exact, eager = x.double() @ weight.double().T, F.linear(x, weight)
    total = bias.bfloat16().expand(64, 96)
    for k in range(0, 2048, 16):
        total = (total.float() + x[:, k : k + 16].float() @ weight[:, k : k + 16].float().T).bfloat16()
    assert complaint(total, exact, limits(exact, eager)) is not None
