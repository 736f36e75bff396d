"""rotary: C++ on every instruction set, the reference, and what refuses."""

import math

import pytest
import torch
from support import poisoned_memory
from test_native_bwd import assert_op_accurate

from fastbert import ops, reference, use_backend

TOKENS, PLACES = 29, 50


def table_of(width):
    angles = torch.arange(PLACES)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def naive(qkv, width, heads, positions):
    """By complex numbers: columns i and i + D / 2 of queries and keys turn by one angle."""
    groups = (qkv.shape[1] - heads) // 2
    turn = torch.complex(*(part.double() for part in table_of(width)[positions].chunk(2, 1)))
    q, k, v = qkv.split((heads, groups, groups), 1)

    def turned(x):
        pairs = torch.complex(*(part.contiguous().double() for part in x.chunk(2, -1))) * turn[:, None]
        return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)

    k, v = (x.repeat_interleave(heads // groups, 1) for x in (turned(k), v))
    return torch.stack([turned(q), k, v], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(1, 1, 2), (4, 4, 64), (6, 2, 40), (3, 1, 34)])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_results_and_gradients(isa, backend, heads, groups, width, dtype):
    torch.manual_seed(0)
    positions = torch.randint(0, PLACES, (TOKENS,))
    given = {"qkv": torch.randn(TOKENS, heads + 2 * groups, width)}
    with use_backend(backend, "rotary"), poisoned_memory():
        run = lambda qkv: ops.rotary(qkv, table_of(width), positions, heads)  # noqa: E731
        exact = lambda qkv: naive(qkv, width, heads, positions)  # noqa: E731
        assert_op_accurate(run, exact, given, dtype, slack={"out": 2e-7, "dqkv": 2e-7})


def test_scores_depend_on_the_distance_alone(isa):
    qkv = torch.randn(1, 3, 16).expand(TOKENS, 3, 16).contiguous()
    q, k, _ = ops.rotary(qkv, table_of(16), torch.arange(TOKENS), 1)[:, :, 0].unbind(1)
    scores = q @ k.T
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_those_of_a_linear_op():
    qkv = torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(5)
    assert torch.autograd.gradcheck(lambda x: reference.rotary(x, table_of(4).double(), positions, 2), qkv)
    small = qkv.detach().float().requires_grad_()
    y = ops.rotary(small, table_of(4), positions, 2)
    first = torch.autograd.grad(y.square().sum(), small, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), small)[0]
    torch.testing.assert_close(first, 2 * small, rtol=1e-5, atol=1e-5)  # turning keeps lengths
    torch.testing.assert_close(second, 8 * small, rtol=1e-5, atol=1e-5)


def test_compiled():
    qkv, positions = torch.randn(TOKENS, 12, 16), torch.arange(TOKENS)
    run = torch.compile(lambda x: ops.rotary(x, table_of(16), positions, 4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(qkv), ops.rotary(qkv, table_of(16), positions, 4))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_heads": 5}, r"qkv has shape \(29, 12, 16\); with num_heads 5"),
        ({"num_heads": 12}, "with num_heads 12"),
        ({"qkv": torch.zeros(29, 12, 15)}, r"qkv has shape \(29, 12, 15\)"),
        ({"table": torch.zeros(50, 8)}, r"table has shape \(50, 8\); it must be \(\*, 16\)"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions has shape \(3,\)"),
        ({"positions": torch.full((29,), 50)}, "positions holds 50; the table has 50 rows"),
        ({"positions": torch.full((29,), -1)}, "positions holds -1"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_does_not_fit_is_named(change, reason):
    given = {"qkv": torch.zeros(29, 12, 16), "table": table_of(16), "positions": torch.arange(29), "num_heads": 4}
    with pytest.raises(ValueError, match=reason):
        ops.rotary(**{**given, **change})
    assert math.isfinite(float(ops.rotary(**given).sum()))
