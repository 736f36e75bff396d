"""attention with a bias by head and distance in Triton: forward, every gradient; what its kernels take of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from support import assert_accurate, floors_of_rounding
from test_attention_bias import matrix
from test_attention_triton import LENGTHS, TAIL, cu_seqlens_of, rows_of
from triton_support import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    check_resources,
    compiles,
    compiling_for,
    nan_filled,
    runs,
)

from fastbert.kernels import attention, attention_bwd

assert nan_filled  # a fixture, used by name


def naive(qkv, bias, lengths, scale):
    out, start = [], 0
    for length in lengths:
        q, k, v = qkv[start : start + length].unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale + matrix(bias, length)
        out.append(torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), v))
        start += length
    return torch.cat([*out, 0.0 * qkv[start:, 0]])


def naive_gradients(qkv, bias, dout, lengths, scale):
    leaves = [x.clone().requires_grad_() for x in (qkv, bias)]
    out = naive(*leaves, lengths, scale)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def kernels(qkv, bias, dout, lengths, scale, **kwargs):
    cu_seqlens, longest = cu_seqlens_of(lengths), max(lengths, default=0)
    constants = {"scale": scale, "bias": bias, **kwargs}
    out, statistics = attention.attention_fwd(qkv, cu_seqlens, longest, **constants)
    dbias = torch.empty_like(bias, dtype=torch.float32)
    dqkv = attention_bwd.attention_bwd(dout, qkv, out, statistics, cu_seqlens, longest, dbias=dbias, **constants)
    return out, dqkv, dbias.to(bias.dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "reach"),
    [(LENGTHS, 2, 16, 33), (LENGTHS, 1, 40, 50), ([63, 111], 1, 32, 120), ([16, 1, 13], 3, 6, 16), ([0], 1, 16, 5)],
    ids=str,
)
def test_results_and_gradients(nan_filled, lengths, heads, dim, reach, dtype):
    qkv, scale = rows_of(lengths, heads, dim, tail=TAIL).to(dtype), dim**-0.5
    generator = torch.Generator().manual_seed(reach)
    bias = torch.randn(heads, 2 * reach - 1, generator=generator).to(DEVICE, dtype)
    dout = torch.linspace(-1, 1, qkv[:, 0].numel(), device=DEVICE).view(qkv[:, 0].shape).to(dtype)
    got, again = (kernels(qkv, bias, dout, lengths, scale) for _ in range(2))
    eager = naive_gradients(qkv, bias, dout, lengths, scale)
    inputs = [qkv.double(), bias.double(), dout.double()]
    exact = naive_gradients(*inputs, lengths, scale)
    floors = floors_of_rounding(lambda drawn: naive_gradients(*drawn, lengths, scale), inputs, list(exact), dtype)
    for name, *values, floor in zip(("out", "dqkv", "dbias"), got, eager, exact, floors, strict=True):
        slack = 4e-7 if name != "out" and dtype == torch.float32 else 0.0  # dP - delta cancels
        assert_accurate(*values, name, (slack + floor[0], slack + floor[1]))
    assert all(map(torch.equal, got, again)), "it differs on a repeat"


@runs
def test_the_op_has_the_gradient_of_the_bias(monkeypatch):
    """Through the op's autograd function, which gives each gradient its dtype."""
    from importlib import import_module

    op = import_module("fastbert.ops.attention.triton")
    qkv, bias = (x.to(DEVICE).requires_grad_() for x in (rows_of(tail=0).cpu(), torch.randn(2, 71)))
    out = op.run_triton(qkv, cu_seqlens_of(LENGTHS), 33, scale=0.3, dropout_p=0.0, bias=bias)
    got = torch.autograd.grad(out.square().sum(), (qkv, bias))
    leaves = [x.detach().double().requires_grad_() for x in (qkv, bias)]
    expected = torch.autograd.grad(naive(*leaves, LENGTHS, 0.3).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


# What spills, by target and dtype: in the dQ kernel that also sums diagonals, since moving a tile's rows takes the
# registers of another tile; and in fp32, whose products are scalars, in dK and dV as without a bias.
SPILLS = {
    ("sm_80", torch.bfloat16): {"dq": 728},
    ("sm_90", torch.bfloat16): {"dq": 160},
    ("sm_90", torch.float32): {"dq": 688, "dkdv": 320},
}


@compiles
@pytest.mark.parametrize(("target", "dtype"), SPILLS)
def test_compiles(target, dtype):
    qkv, bias = torch.empty(1000, 3, 12, 64, dtype=dtype), torch.empty(12, 1027)
    cu_seqlens, constants = torch.zeros(5, dtype=torch.int32), {"scale": 0.1, "bias": bias}
    with compiling_for(target) as found:
        out, statistics = attention.attention_fwd(qkv, cu_seqlens, 512, **constants)
        dbias = torch.empty_like(bias)
        attention_bwd.attention_bwd(
            torch.empty_like(out), qkv, out, statistics, cu_seqlens, 512, dbias=dbias, **constants
        )
    names = [kernel.name.strip("_").removesuffix("_kernel") for kernel in found]
    assert names.count("dbias") == 1 and not INTERPRETED
    for kernel in found:
        name = kernel.name.removesuffix("_kernel").rpartition("_")[2]
        check_resources(kernel, SPILLS[target, dtype].get(name, 0))
