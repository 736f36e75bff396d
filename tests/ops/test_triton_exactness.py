"""Triton kernels where values lie far from zero: at most twice the error of eager PyTorch, and one rounding."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from support import assert_accurate, floor_of_product, score_gradients
from triton_support import DEVICE, RUN_DTYPES, nan_filled, runs

from fastbert.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from fastbert.kernels.attention import attention_fwd
from fastbert.kernels.attention_bwd import attention_bwd
from fastbert.kernels.embed_layer_norm import embed_layer_norm_bwd, embed_layer_norm_fwd
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

assert nan_filled  # a fixture, used by name
EPS = 1e-12
F32 = torch.float32


def add(x, weight, bias, dy=None):
    y, total, mean, rstd = add_layer_norm_fwd(x, None, weight, bias, eps=EPS, training=True)
    if dy is None:
        return y
    dx, _, dweight, dbias = add_layer_norm_bwd(dy, total, weight, mean, rstd, dtypes=(x.dtype, None, bias.dtype))
    return y, dx, dweight, dbias


def embed(x, weight, bias, dy=None):
    """Each row of x from its own row of the first table; the others are zero."""
    rows, zeros = torch.arange(len(x), device=DEVICE), torch.zeros(len(x), dtype=torch.long, device=DEVICE)
    ids, tables = (rows, zeros, zeros), (x, *(torch.zeros_like(x[:1]) for _ in range(2)))
    y, mean, rstd = embed_layer_norm_fwd(ids, tables, weight, bias, eps=EPS, training=True)
    if dy is None:
        return y
    dx, _, _, dweight, dbias = embed_layer_norm_bwd(
        dy, ids, tables, weight, mean, rstd, dropout_p=0.0, padding_idx=None, wanted=(True,) * 5
    )
    return y, dx, dweight, dbias


def eager(x, weight, bias, dy):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = F.layer_norm(leaves[0], weight.shape, *leaves[1:], EPS)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


NORMS = {"add_layer_norm": add, "embed_layer_norm": embed}


@runs
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("N", "value"), [(384, 3.3), (63, -0.1), (63, 1e4)])
def test_a_constant_row_is_its_bias(nan_filled, norm, N, value):
    x = torch.full((3, N), value, device=DEVICE)
    bias = torch.linspace(-1, 1, N, device=DEVICE)
    y = NORMS[norm](x, torch.ones(N, device=DEVICE), bias)
    assert (y - bias).abs().max() <= 1e-6


@runs
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("N", "mean"), [(384, 1e3), (63, 0.0), (63, 1e2), (63, -1e4)])
def test_rows_far_from_zero(nan_filled, norm, N, mean):
    x = torch.randn(5, N) + mean
    given = [t.to(DEVICE) for t in (x, torch.randn(N), torch.randn(N), torch.randn(5, N))]
    exact = eager(*(t.double() for t in given))
    for name, got, expected in zip(("y", "dx", "dweight", "dbias"), NORMS[norm](*given), exact, strict=True):
        assert (got - expected).abs().max() <= 2e-6 * float(expected.abs().max()), name


def attention_of(qkv, dout, scale):
    q, k, v = qkv.requires_grad_().permute(1, 2, 0, 3)
    out = torch.softmax(q @ k.mT * scale, -1) @ v
    out = out.transpose(0, 1)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


@runs
@pytest.mark.parametrize("dtype", RUN_DTYPES)
@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("level", [0.0, 1e3, 1e4, -1e4])
def test_attention_with_scores_far_from_zero(nan_filled, level, length, dtype):
    """Scores of a few, all moved by `level`, by a large component of each key; with few bits, so that no product of
    eager's rounds."""
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(length, 3, 2, 16, generator=generator).mul(8).round().div(8)
    scale = 0.25
    qkv[:, 0, :, 0], qkv[:, 1, :, 0] = 64.0, level / (64 * scale)
    dout = torch.randn(length, 2, 16, generator=generator)
    qkv, dout = qkv.to(DEVICE, dtype), dout.to(DEVICE, dtype)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    out, statistics = attention_fwd(qkv, cu_seqlens, length, scale=scale)
    got = out, attention_bwd(dout, qkv, out, statistics, cu_seqlens, length, scale=scale)
    naive, exact = attention_of(qkv.clone(), dout, scale), attention_of(qkv.double(), dout.double(), scale)
    q, k, v = qkv.detach().permute(1, 2, 0, 3)
    dscores = score_gradients(q, k, v, dout.transpose(0, 1), scale)
    floors = {"dq": floor_of_product(dscores, k, dtype), "dk": floor_of_product(dscores.mT, q, dtype)}
    for name, pick in (("out", lambda r: r[0]), *((f"d{n}", lambda r, i=i: r[1][:, i]) for i, n in enumerate("qkv"))):
        assert_accurate(pick(got), pick(naive), pick(exact), name, floors.get(name, (0.0, 0.0)))


@runs
@pytest.mark.parametrize("dtype", RUN_DTYPES)
@pytest.mark.parametrize("level", [0.0, 1e3, 1e4, -1e4])
def test_cross_entropy_with_logits_far_from_zero(nan_filled, level, dtype):
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(7, 24, generator=generator), torch.randn(70, 24, generator=generator)
    x, weight = (t.mul(8).round().div(8) for t in (x, weight))
    x[:, 0], weight[:, 0] = 32.0, level / 32
    x, weight = x.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    labels = torch.tensor([3, 69, -100, 0, 11, 5, 5], device=DEVICE)
    loss, count, *made = linear_cross_entropy_fwd(x, weight, None, labels, needed=(True, True, False))
    dx, dweight, _ = linear_cross_entropy_bwd(torch.ones(1, device=DEVICE), count, *made, dtype)

    def plain(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        logits = F.linear(*leaves)
        loss = F.cross_entropy(logits.to(torch.promote_types(dtype, F32)), labels)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    values = (loss, dx, dweight), plain(dtype), plain(torch.float64)
    chosen = labels >= 0
    dlogits = torch.softmax(F.linear(x, weight).double()[chosen], -1) - F.one_hot(labels[chosen], 70)
    floors = {"dx": floor_of_product(dlogits / len(dlogits), weight, dtype)}
    for name, *of_it in zip(("loss", "dx", "dweight"), *values, strict=True):
        assert_accurate(*of_it, name, floors.get(name, (0.0, 0.0)))
