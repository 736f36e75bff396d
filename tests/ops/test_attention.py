"""attention: every backend by the accuracy contract; sequences see only themselves."""

import pytest
import torch
import torch._dynamo.testing
from support import assert_op_accurate, poisoned_memory, require_native

import fastbert
from fastbert import native, ops, reference
from fastbert.ops.dispatch import TABLE

LENGTHS = ([1], [63, 1, 111], [0, 5, 0, 7, 7], [16, 16, 16], [0], [])


def naive(qkv, cu_seqlens, max_seqlen, scale=None):
    """One sequence at a time, probabilities spelled out."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].unbind(1)
        probs = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) * scale, dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", probs, v))
    return torch.cat(parts) if parts else qkv[:, 0]


def cancelled(qkv, cu_seqlens, scale, dim):
    """The largest sum of the sizes of what cancels in dq and dk.

    Their ds is p * (dp - sum(p * dp)) * scale. Where a softmax is nearly one-hot, the difference is far smaller than
    its two terms, each of which is rounded before: dq and dk err by eps / 2 of either term, times p * scale and the
    other factor, k or q. Eager PyTorch's error can be far below that: then all but the one p are 0, or its sum happens
    to round as dp does, which depends on the instructions that it takes.
    """
    scale = dim**-0.5 if scale is None else scale
    qkv = qkv.double()
    dout = torch.linspace(-1, 1, qkv[:, 0].numel(), dtype=torch.float64).view_as(qkv[:, 0])
    largest = 0.0
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].unbind(1)
        if len(q):
            p = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) * scale, dim=-1)
            dp = torch.einsum("qhd,khd->hqk", dout[start:end], v)
            sizes = p * scale * (dp.abs() + (p * dp).sum(-1, keepdim=True).abs())
            dq = torch.einsum("hqk,khd->qhd", sizes, k.abs())
            dk = torch.einsum("hqk,qhd->khd", sizes, q.abs())
            largest = max(largest, float(dq.max()), float(dk.max()))
    return largest


def inputs_of(lengths, heads=3, dim=16):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"qkv": torch.randn(sum(lengths), 3, heads, dim), "cu_seqlens": cu_seqlens}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", TABLE["attention"]["cpu"])
def test_accuracy(backend, dtype, lengths):
    if backend == "native" and (native.available() or dtype == torch.float64):
        pytest.skip(native.available() or "the native backend has no float64")
    for heads, dim in ((3, 16),) if backend == "reference" else ((3, 16), (2, 32), (1, 64), (2, 6), (1, 80)):
        given = inputs_of(lengths, heads, dim)
        with fastbert.use_backend(backend, "attention"):
            for scale in (None, 0.3):
                backward = dim <= 16 or scale is None
                slack = {"dqkv": torch.finfo(torch.float32).eps / 2 * cancelled(**given, scale=scale, dim=dim)}
                kwargs = {"max_seqlen": max(lengths, default=0), "scale": scale}
                assert_op_accurate(ops.attention, naive, given, dtype, backward, slack, **kwargs)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_reference_backward_is_the_gradient(lengths, scale):
    given = inputs_of(lengths)
    qkv = given["qkv"].double().requires_grad_()
    out = naive(qkv, given["cu_seqlens"], 0, scale)
    dout = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, qkv, dout)
    got = reference.attention_bwd(dout, qkv.detach(), given["cu_seqlens"], 0, scale=scale)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_sequence_alone_gives_the_same():
    given = inputs_of([9, 20, 3])
    out = ops.attention(given["qkv"], given["cu_seqlens"], 20)
    alone = ops.attention(given["qkv"][9:29], torch.tensor([0, 20], dtype=torch.int32), 20)
    torch.testing.assert_close(out[9:29], alone, rtol=0, atol=1e-6)


def test_no_matrix_over_the_whole_row(monkeypatch):
    """64 sequences of 32: no score matrix may span two of them."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        seen.append(q.shape)
        return real(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    given = inputs_of([32] * 63 + [31])
    with fastbert.use_backend("reference"):
        ops.attention(given["qkv"], given["cu_seqlens"], 32)
    assert [tuple(s) for s in seen] == [(63, 3, 32, 16), (1, 3, 31, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 8], [0], [20, 0]], ids=str)
def test_tokens_of_no_sequence_get_zeros(dtype, lengths):
    """In the reference, as on a GPU, whose offsets no one has read."""
    given = inputs_of(lengths, heads=2, dim=8)
    tokens = sum(lengths)
    qkv = torch.cat([given["qkv"], torch.full((7, 3, 2, 8), float("nan"))]).to(dtype)
    with fastbert.use_backend("reference", "attention"), poisoned_memory():
        out = ops.attention(qkv, given["cu_seqlens"], max(lengths), checked=True)
        alone = ops.attention(qkv[:tokens], given["cu_seqlens"], max(lengths))
    assert torch.equal(out[:tokens], alone)
    assert torch.equal(out[tokens:], torch.zeros(7, 2, 8, dtype=dtype))


def test_gradient_of_tokens_of_no_sequence():
    given = inputs_of([5, 8], heads=2, dim=8)
    qkv = torch.cat([given["qkv"], torch.randn(7, 3, 2, 8)]).double().requires_grad_()
    dout = torch.randn(20, 2, 8, dtype=torch.float64)
    out = reference.attention(qkv, given["cu_seqlens"], 8)
    (expected,) = torch.autograd.grad(out, qkv, dout)
    got = reference.attention_bwd(dout, qkv.detach(), given["cu_seqlens"], 8)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not got[13:].any()


def test_non_contiguous_input():
    given = inputs_of([5, 8])
    wide = torch.randn(13, 3, 3, 32)
    wide[..., ::2] = given["qkv"]
    out = ops.attention(wide[..., ::2], given["cu_seqlens"], 8)
    torch.testing.assert_close(out, naive(**given, max_seqlen=8))


def test_dropout_drops_and_keeps_the_mean():
    given = inputs_of([200], heads=8)
    given["qkv"][:, 2] = 1.0
    out = ops.attention(given["qkv"], given["cu_seqlens"], 200, dropout_p=0.25)
    assert out.std() > 0
    assert abs(out.mean() - 1) < 0.01


@pytest.mark.parametrize("chosen", ["native", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_registered_op(chosen, dropout_p):
    if chosen == "reference" and dropout_p:
        pytest.skip("the reference's dropout breaks the graph")
    given = inputs_of([5, 8, 0, 2])
    qkv, seed = given["qkv"].requires_grad_(), torch.tensor([7]) if dropout_p else None
    torch.library.opcheck(
        torch.ops.fastbert.attention.default, (chosen, True, qkv, None, given["cu_seqlens"], 0.25, dropout_p, seed)
    )


def test_compiles_in_one_graph_for_any_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.attention, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for lengths in ([5, 8, 2], [9, 1, 3], [4, 11]):
        given = inputs_of(lengths)
        qkv = given["qkv"].requires_grad_()
        out = compiled(qkv, given["cu_seqlens"], max(lengths))
        expected = naive(**given, max_seqlen=0)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        (got,) = torch.autograd.grad(out, qkv, dout)
        (wanted,) = torch.autograd.grad(expected, qkv, dout)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, "other lengths compiled again"


def test_another_longest_sequence_compiles_nothing_anew():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.attention, fullgraph=True, backend=counter)
    for lengths in ([5, 8, 2], [3, 11, 1], [2, 1, 12]):
        given = inputs_of(lengths)
        torch.testing.assert_close(
            compiled(given["qkv"], given["cu_seqlens"], max(lengths)), naive(**given, max_seqlen=0)
        )
    assert counter.frame_count == 1


def test_compiled_dropout_is_one_graph_whose_backward_has_its_mask():
    require_native()
    given = inputs_of([40], heads=2, dim=40)
    v = torch.eye(40).expand(2, 40, 40).transpose(0, 1)  # (T, H, D): the output is the probabilities themselves
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    qkv = torch.stack([given["qkv"][:, 0], given["qkv"][:, 1], v], dim=1).requires_grad_()
    out = compiled(qkv, given["cu_seqlens"], 40, dropout_p=0.3)
    kept = out.detach() != 0
    assert abs(kept.float().mean() - 0.7) < 0.03
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    # dv of a key is the sum of the probabilities that reached it, in every column.
    torch.testing.assert_close(dqkv[:, 2], out.detach().sum(0).T[:, :, None].expand(40, 2, 40), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": torch.zeros(4, 2, 3, 16)},
            r"attention: qkv has shape \(4, 2, 3, 16\); it must be \(\*, 3, \*, \*\)",
        ),
        ({"qkv": torch.zeros(4, 3, 3, 16, dtype=torch.int64)}, "qkv has dtype torch.int64"),
        ({"cu_seqlens": torch.zeros(2)}, r"attention: cu_seqlens has shape \(2,\) and dtype torch.float32"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_errors(change, message):
    call = {"qkv": torch.zeros(4, 3, 3, 16), "cu_seqlens": torch.tensor([0, 4]), "max_seqlen": 4, **change}
    with pytest.raises(ValueError, match=message):
        ops.attention(**call)
