"""fp8 products: what they are, number by number, and what they leave of a real model's vectors."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

import fastbert
from fastbert import ops, reference
from fastbert.inference import Embedder
from fastbert.precision import DEVICES

# Every value that float8_e4m3fn has from 0 up (Micikevicius et al., 2022, table 1): subnormals, then 15 binades.
VALUES = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]


def naive_rows(x):
    """The nearest of VALUES to each number over its row's scale, of two as near the one with an even last bit."""
    rounded, scales = np.zeros(x.shape), np.ones(len(x), np.float32)
    values = np.array(VALUES)
    for i, row in enumerate(x.float().numpy()):
        amax = np.float32(max(abs(v) for v in row))
        if amax:
            scales[i] = amax / np.float32(448)
        for k, v in enumerate(row):
            distance = np.abs(values - abs(float(np.float32(v) / scales[i])))
            nearest = np.flatnonzero(distance == distance.min())
            rounded[i, k] = np.copysign(values[min(nearest, key=lambda n: n % 2)], v)
    return rounded, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 63, 133])
def test_fp8_is_the_naive_loop(columns, dtype):
    assert len(VALUES) == 127 and VALUES[-1] == 448
    x, weight, bias = torch.randn(4, columns).to(dtype), torch.randn(3, columns).to(dtype), torch.randn(3).to(dtype)
    x[1] = 0
    x[2] *= torch.logspace(-6, 0, columns).to(dtype)  # down to subnormals and zero
    (a, a_scale), (b, b_scale) = naive_rows(x), naive_rows(weight)
    y = ((a @ b.T) * a_scale[:, None].astype(np.float64) * b_scale).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(y) + bias.float()).to(dtype)
    got = reference.linear(x, weight, bias, activation="gelu", precision="fp8")
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_become_a_number(value):
    x = torch.randn(2, 128)
    x[0, 5] = value
    y = reference.linear(x, torch.randn(4, 128), precision="fp8")
    assert not y[0].isfinite().any() and y[1].isfinite().all()


def test_a_gradient_is_refused():
    x, weight = torch.randn(2, 8), torch.randn(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match="linear: precision is 'fp8', which has no gradient"):
        ops.linear(x, weight, precision="fp8")


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_fp8_keeps_the_ranking_of_sts_b(minilm, stsb, monkeypatch):
    """As int8 keeps it; but the vectors not as well, at a lowest cosine of 0.988 for 0.996: three bits for six."""
    from scipy.stats import spearmanr

    monkeypatch.setitem(DEVICES, "fp8", ("cpu", "cuda"))  # by the reference, which runs anywhere
    with open(next(stsb.rglob("sts-test.csv")), encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts, scores = [row[5] for row in rows] + [row[6] for row in rows], [float(row[4]) for row in rows]
    rank = lambda v: 100 * spearmanr((v[: len(rows)] * v[len(rows) :]).sum(1), scores).statistic  # noqa: E731
    exact = Embedder.from_pretrained(minilm).embed(texts)
    with fastbert.use_backend("reference", "encoder", "linear"):
        vectors = Embedder.from_pretrained(minilm, quantize="fp8").embed(texts)
    cosines = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
    print(f"Spearman {rank(vectors):.2f} (fp32: {rank(exact):.2f}), cosine {cosines.min():.4f}, {cosines.mean():.4f}")
    assert abs(rank(vectors) - rank(exact)) <= 0.3
    assert cosines.min() >= 0.985 and cosines.mean() >= 0.997
