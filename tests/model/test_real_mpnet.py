"""The real all-mpnet-base-v2 in sentence-transformers, accelerated and on its own: the same vectors, the same STS-B."""

import csv

import numpy as np
import pytest
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import fastbert

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]
TEXTS = [
    "",
    "Ok",
    "A man is playing a guitar.",
    "Someone plays an instrument on the street while a small crowd listens and claps. " * 30,  # cut
    "naïve café <mask> </s> [UNK] 中文 😀",
]


@pytest.fixture(scope="module")
def pairs(stsb):
    with open(stsb / "sts-test.csv", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


def correlation(encode, pairs):
    a, b, scores = encode(pairs[0]), encode(pairs[1]), pairs[2]
    return spearmanr((a * b).sum(1), scores).statistic


def test_vectors_and_sts(mpnet, pairs):
    original, fast = (SentenceTransformer(str(mpnet), device="cpu") for _ in range(2))
    fastbert.accelerate(fast)
    own = fastbert.Embedder.from_pretrained(mpnet)
    expected = original.encode(TEXTS)
    np.testing.assert_allclose(fast.encode(TEXTS), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(own.embed(TEXTS), expected, rtol=0, atol=1e-5)
    figures = [correlation(encode, pairs) for encode in (original.encode, fast.encode, own.embed)]
    assert figures[0] > 0.8  # as sentence-transformers has it: 83.4
    assert max(abs(figure - figures[0]) for figure in figures) < 1e-5, figures
    assert "ran the original code" not in str(fastbert.explain(fast))


@pytest.mark.parametrize("quantize, dtype, limit", [("int8", None, 0.995), (None, "bfloat16", 0.999)])
def test_lower_precisions(mpnet, pairs, quantize, dtype, limit):
    import torch

    exact = fastbert.Embedder.from_pretrained(mpnet)
    other = fastbert.Embedder.from_pretrained(mpnet, quantize=quantize, dtype=dtype and getattr(torch, dtype))
    a, b = exact.embed(pairs[0][:300]), other.embed(pairs[0][:300])
    assert (a * b).sum(1).min() > limit
