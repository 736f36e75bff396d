"""Several Python threads at once in the C++ engine: right results, and, under `make sanitize`, no data race.

Each thread has its own inputs, of different sizes, and shares the model and its packed weights with the others.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from support import TINY, require_native, tokens

import fastbert
from fastbert import BertConfig, BertForMaskedLM, native, ops
from fastbert.model.plan import forget_forms

WORKERS, ROUNDS = 4, 6


@pytest.fixture(params=[1, 2])
def threads(request):
    """Threads within a call, next to those that call."""
    require_native()
    torch.set_num_threads(request.param)
    return request.param


def all_at_once(call, prepare=lambda: None):
    """`call(i)` for several i on as many threads, which start each round together; the results are as when alone."""
    expected = [call(i) for i in range(WORKERS)]
    barrier = Barrier(WORKERS)

    def run(i):
        results = []
        for _ in range(ROUNDS):
            if barrier.wait() == 0:
                prepare()
            barrier.wait()
            results.append(call(i))
        return results

    with ThreadPoolExecutor(WORKERS) as pool:
        for want, results in zip(expected, pool.map(run, range(WORKERS)), strict=True):
            for got in results:
                for a, b in zip(want, got, strict=True):
                    assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ops(threads, dtype):
    weight, bias = torch.randn(200, 64).to(dtype), torch.randn(200).to(dtype)
    whole, part = ops.Weight([weight], [bias]), ops.Weight([weight[:192]], [None])
    table, vector = torch.randn(50, 64).to(dtype), torch.randn(64).to(dtype)
    inputs = [torch.randn(rows, 64).to(dtype) for rows in (1, 30, 129, 400)]

    def call(i):
        with torch.no_grad(), fastbert.use_backend("native", "linear", "attention", "add_layer_norm"):
            x, cu_seqlens = inputs[i], torch.tensor([0, len(inputs[i]) // 2, len(inputs[i])], dtype=torch.int32)
            ids = torch.arange(len(x)) % 50
            return (
                ops.linear(x, whole, activation="gelu"),
                ops.attention(ops.linear(x, part).view(-1, 3, 2, 32), cu_seqlens, len(x)),
                ops.add_layer_norm(x, x, vector, vector, eps=1e-12),
                ops.embed_layer_norm(ids, ids, ids, table, table, table, vector, vector, eps=1e-12),
            )

    def forget():
        whole.forms.clear()
        part.forms.clear()

    all_at_once(call, prepare=forget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_model(threads, dtype):
    """Inference; each round begins with weights that no one has packed yet."""
    model = BertForMaskedLM(BertConfig(**TINY)).eval().to(dtype)
    inputs = [tokens(batch, length) for batch, length in ((1, 1), (3, 8), (2, 40), (9, 17))]

    def call(i):
        with torch.no_grad():
            return (model(inputs[i]).logits,)

    all_at_once(call, prepare=lambda: forget_forms(model.bert))


def test_gradients_of_one_model(threads):
    model = BertForMaskedLM(BertConfig(**TINY))
    parameters = list(model.parameters())
    inputs = [tokens(batch, length) for batch, length in ((1, 2), (3, 8), (2, 40), (9, 17))]

    def call(i):
        loss = model(inputs[i], labels=inputs[i], output_logits=False).loss
        return loss, *torch.autograd.grad(loss, parameters)

    all_at_once(call)


def test_packed_weights_are_kept_once(threads):
    weights = [ops.Weight([torch.randn(300, 64)], [None]) for _ in range(4)]
    x = torch.randn(50, 64)

    def forget():
        for weight in weights:
            weight.forms.clear()

    with torch.no_grad():
        all_at_once(lambda i: [native.linear(x, w) for w in weights[i:] + weights[:i]], forget)
    assert [len(weight.forms) for weight in weights] == [1] * 4
