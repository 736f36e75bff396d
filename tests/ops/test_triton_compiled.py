"""torch.compile over the Triton ops: one graph without a break, its gradients, and nothing compiled again.

Dispatch refuses tensors of the CPU, so here it is told to take them; their kernels run in the interpreter.
"""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

pytest.importorskip("triton")

from triton_support import DEVICE, INTERPRETED, runs

import fastbert
from fastbert import ops
from fastbert.ops import _triton, dispatch

E, FFN, H, V = 32, 64, 2, 50


@pytest.fixture(autouse=True)
def _triton_on_any_device(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(_triton, "_device_reason", lambda device: None)
        for op, order in dispatch.TABLE.items():
            if "triton" in order["cuda"]:
                monkeypatch.setitem(dispatch.TABLE, op, {**order, "cpu": order["cuda"]})
    torch._dynamo.reset()


def tensors():
    torch.manual_seed(0)
    shapes = {"qkv": (3 * E, E), "out": (E, E), "up": (FFN, E), "down": (E, FFN), "decoder": (V, E)}
    weights = {name: torch.randn(shape, device=DEVICE) * 0.2 for name, shape in shapes.items()}
    weights["norm"] = torch.ones(E, device=DEVICE)
    weights["bias"] = torch.zeros(E, device=DEVICE)
    return {name: w.requires_grad_() for name, w in weights.items()}


def batch(lengths):
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(DEVICE)
    x = torch.randn(sum(lengths), E, device=DEVICE)
    labels = torch.arange(sum(lengths), device=DEVICE) % V
    return x, labels.masked_fill(labels % 3 == 0, -100), cu_seqlens, max(lengths)


def layer_and_loss(w, x, labels, cu_seqlens, max_seqlen, dropout_p=0.0):
    qkv = ops.linear(x, w["qkv"]).unflatten(1, (3, H, -1))
    context = ops.attention(qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p).flatten(1)
    x = ops.add_layer_norm(ops.linear(context, w["out"]), x, w["norm"], w["bias"], eps=1e-6, dropout_p=dropout_p)
    y = ops.linear(ops.linear(x, w["up"], activation="gelu"), w["down"])
    x = ops.add_layer_norm(y, x, w["norm"], w["bias"], eps=1e-6, dropout_p=dropout_p)
    return ops.linear_cross_entropy(x, w["decoder"], None, labels)


@runs
def test_a_layer_and_its_loss_are_one_graph_for_any_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_and_loss, fullgraph=True, backend=counter)
    w = tensors()
    for lengths in ([5, 8, 2], [3, 11, 1], [2, 1, 12]):  # the same T and B, another longest
        given = batch(lengths)
        with fastbert.use_backend("reference"):
            expected = layer_and_loss(w, *given)
            wanted = torch.autograd.grad(expected, w.values())
        loss = compiled(w, *given)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        for name, mine, theirs in zip(w, torch.autograd.grad(loss, w.values()), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert counter.frame_count == 1


@runs
def test_the_graph_holds_the_triton_ops():
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compile(layer_and_loss, fullgraph=True, backend=keep)(tensors(), *batch([5, 8, 2]))
    (graph,) = graphs
    for op in ("attention", "linear_cross_entropy"):
        assert f"[target=torch.ops.fastbert.{op}](args = (triton, " in graph, graph


@runs
@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy"])
def test_registered_ops(op):
    x, labels, cu_seqlens, _ = batch([5, 8, 2])
    qkv = torch.randn(15, 3, H, 16, device=DEVICE, requires_grad=True)
    seed = torch.tensor([3], device=DEVICE)
    x, weight = x.requires_grad_(), torch.randn(V, E, device=DEVICE, requires_grad=True)
    arguments = {
        "attention": ("triton", True, qkv, None, cu_seqlens, 0.25, 0.1, seed),
        "linear_cross_entropy": ("triton", x, weight, None, labels, -100, [True, True, False]),
    }[op]
    torch.library.opcheck(getattr(torch.ops.fastbert, op).default, arguments)


@runs
def test_dropout_in_one_graph():
    compiled = torch.compile(layer_and_loss, fullgraph=True, backend="aot_eager")
    w, given = tensors(), batch([5, 8, 2])
    losses = {float(compiled(w, *given, dropout_p=0.3)) for _ in range(3)}
    assert len(losses) == 3 and all(loss == loss for loss in losses)
    loss = compiled(w, *given, dropout_p=0.3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, w.values()))
