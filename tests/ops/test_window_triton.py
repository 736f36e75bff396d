"""attention with a window, rotary positions, gated products and RMSNorm in Triton: forward and every gradient."""

import pytest
import torch

pytest.importorskip("triton")

from support import assert_accurate
from test_attention_triton import LENGTHS, TAIL, cu_seqlens_of, rows_of
from triton_support import (
    COMPILED,
    DEVICE,
    DTYPES,
    check_resources,
    compiles,
    compiling_for,
    nan_filled,
    runs,
)

from fastbert import reference
from fastbert.kernels import activation, attention, attention_bwd, rotary
from fastbert.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd

assert nan_filled  # a fixture, used by name


def expected(qkv, dout, lengths, window, scale):
    cu_seqlens = cu_seqlens_of(lengths)
    out = reference.attention_formula(qkv, cu_seqlens, scale, window=window)
    return out, reference.attention_gradients(dout, qkv, cu_seqlens, scale, None, window)[0]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "window"), [(LENGTHS, 0), (LENGTHS, 3), ([190, 7, 70], 20), ([150], 64)], ids=str)
def test_a_window(nan_filled, lengths, window, dtype):
    scale = 0.3
    qkv = rows_of(lengths, 1, 16, tail=TAIL).to(dtype)
    dout = torch.linspace(-1, 1, qkv[:, 0].numel(), device=DEVICE).view(qkv[:, 0].shape).to(dtype)
    cu_seqlens, longest = cu_seqlens_of(lengths), max(lengths)
    out, statistics = attention.attention_fwd(qkv, cu_seqlens, longest, scale=scale, window=window)
    dqkv = attention_bwd.attention_bwd(dout, qkv, out, statistics, cu_seqlens, longest, scale=scale, window=window)
    eager = expected(qkv, dout, lengths, window, scale)
    exact = expected(qkv.double(), dout.double(), lengths, window, scale)
    for name, *values in zip(("out", "dqkv"), (out, dqkv), eager, exact, strict=True):
        slack = (2e-6, 2e-6) if dtype == torch.float32 else (0.0, 0.0)  # dP - delta cancels
        assert_accurate(*values, name, slack)


@runs
def test_the_same_keys_are_dropped_with_a_window_that_sees_all(nan_filled):
    qkv, cu_seqlens = rows_of(LENGTHS, 2, 16, tail=TAIL), cu_seqlens_of(LENGTHS)
    seed = torch.tensor([7], device=DEVICE)
    options = {"scale": 0.3, "dropout_p": 0.4, "seed": seed}
    results = []
    for window in (None, max(LENGTHS)):
        out, statistics = attention.attention_fwd(qkv, cu_seqlens, max(LENGTHS), window=window, **options)
        dout = torch.ones_like(out)
        given = dout, qkv, out, statistics, cu_seqlens, max(LENGTHS)
        results.append((out, attention_bwd.attention_bwd(*given, window=window, **options)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 16), (6, 2, 8), (18, 6, 40), (3, 1, 6)])
def test_rotary(nan_filled, heads, groups, width, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, heads + 2 * groups, width, generator=generator).to(DEVICE, dtype)
    table = torch.randn(50, width, generator=generator).to(DEVICE)
    positions = torch.randint(0, 50, (37,), generator=generator).to(DEVICE)
    dy = torch.randn(37, 3, heads, width, generator=generator).to(DEVICE, dtype)
    values = []
    for kind in (dtype, torch.float64):
        leaf = x.to(kind).requires_grad_()
        y = reference.rotary(leaf, table.to(kind), positions, heads)
        values.append((y.detach(), torch.autograd.grad(y, leaf, dy.to(kind))[0]))
    got = rotary.rotary_fwd(x, table, positions, heads), rotary.rotary_bwd(dy, table, positions, groups)
    for name, *three in zip(("y", "dx"), got, *values, strict=True):
        assert_accurate(*three, name)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_gate(nan_filled, name, dtype):
    generator = torch.Generator().manual_seed(0)
    z = (2 * torch.randn(19, 2 * 136, generator=generator)).to(DEVICE, dtype)
    dy = torch.randn(19, 136, generator=generator).to(DEVICE, dtype)
    values = []
    for kind in (dtype, torch.float64):
        leaf = z.to(kind).requires_grad_()
        y = reference.activated(leaf, name, gated=True)
        values.append((y.detach(), torch.autograd.grad(y, leaf, dy.to(kind))[0]))
    got = activation.gate_fwd(z, name), activation.gate_bwd(dy, z, name)
    slack = (2e-6, 2e-6) if dtype == torch.float32 else (2e-5, 2e-5)
    for what, *three in zip(("y", "dz"), got, *values, strict=True):
        assert_accurate(*three, what, slack)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_norms_with_the_sum(nan_filled, rms, with_bias, dtype):
    if rms and with_bias:
        return
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dsum = (torch.randn(23, 40, generator=generator).to(DEVICE, dtype) for _ in range(4))
    weight, bias = (torch.randn(40, generator=generator).to(DEVICE, dtype) for _ in range(2))
    bias = bias if with_bias else None
    values = []
    for kind in (dtype, torch.float64):
        leaves = [t.to(kind).requires_grad_() for t in (x, residual, weight)]
        b = None if bias is None else bias.to(kind)
        outputs = reference.add_layer_norm(*leaves, b, eps=1e-5, rms=rms, return_sum=True)
        gradients = torch.autograd.grad(outputs, leaves, (dy.to(kind), dsum.to(kind)))
        values.append([*(t.detach() for t in outputs), *gradients])
    y, total, mean, rstd = add_layer_norm_fwd(x, residual, weight, bias, eps=1e-5, training=True, rms=rms)
    dtypes = dtype, dtype, dtype
    gradients = add_layer_norm_bwd(dy, total, weight, mean, rstd, dtypes=dtypes, rms=rms, dsum=dsum)
    names = "y", "sum", "dx", "dresidual", "dweight"
    for name, *three in zip(names, (y, total, *gradients[:3]), *values, strict=True):
        assert_accurate(*three, name, (3e-7, 3e-7) if dtype == torch.float32 else (0.0, 0.0))


# What spills: fp32's backward, whose products are scalars, as without a window.
SPILLS = {
    **{("sm_80", torch.float32, "dq"): 192, ("sm_90", torch.float32, "dq"): 192},
    **{("sm_80", torch.float32, "dkdv"): 256, ("sm_90", torch.float32, "dkdv"): 272},
}


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", COMPILED[:2])
def test_compiles(target, dtype):
    qkv = torch.empty(1000, 3, 12, 64, dtype=dtype)
    cu_seqlens, constants = torch.zeros(5, dtype=torch.int32), {"scale": 0.1, "window": 64}
    with compiling_for(target) as found:
        out, statistics = attention.attention_fwd(qkv, cu_seqlens, 4096, **constants)
        attention_bwd.attention_bwd(torch.empty_like(out), qkv, out, statistics, cu_seqlens, 4096, **constants)
        z = torch.empty(1000, 2304, dtype=dtype)
        activation.gate_bwd(activation.gate_fwd(z, "gelu"), z, "gelu")
        table, positions = torch.empty(8192, 64), torch.zeros(1000, dtype=torch.int64)
        turned = rotary.rotary_fwd(torch.empty(1000, 36, 64, dtype=dtype), table, positions, 12)
        rotary.rotary_bwd(turned, table, positions, 12)
    names = sorted(kernel.name.strip("_").removesuffix("_kernel") for kernel in found)
    assert {"rotary", "gate", "attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv"} <= set(names)
    for kernel in found:
        name = kernel.name.removesuffix("_kernel").rpartition("_")[2]
        check_resources(kernel, SPILLS.get((target, dtype, name), 0))
