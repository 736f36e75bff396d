"""cu_seqlens: one check and one error for each op that takes them, in every backend, with and without a gradient."""

import pytest
import torch
from support import TINY, require_native
from test_encoder_native import make_layers

import fastbert
from fastbert import ops, packing
from fastbert.ops import _checks

TOKENS = 39
WRONG = {
    "late start": ([1, 20, 39], 20, r"cu_seqlens\[0\] is 1; offsets must rise from 0 to the number of tokens, 39"),
    "negative start": ([-1, 20, 39], 21, r"cu_seqlens\[0\] is -1; offsets must rise from 0"),
    "early end": ([0, 20, 30], 20, r"cu_seqlens\[2\] is 30; offsets must rise .* to the number of tokens, 39"),
    "late end": ([0, 20, 40], 20, r"cu_seqlens\[2\] is 40; offsets must rise"),
    "decreasing": ([0, 20, 10, 39], 29, r"cu_seqlens\[2\] is 10; offsets must rise"),
    "beyond and back": ([0, 50, 39], 50, r"cu_seqlens\[1\] is 50; offsets must rise"),
    "no sequence": ([0], 39, r"cu_seqlens\[0\] is 0; offsets must rise from 0 to the number of tokens, 39"),
    "empty": ([], 39, r"cu_seqlens has shape \(0,\) and dtype torch.int32; it must be .* batch \+ 1 offsets"),
    "a matrix": ([[0, 39]], 39, r"cu_seqlens has shape \(1, 2\)"),
    "too short a longest": ([0, 20, 39], 19, r"cu_seqlens holds a sequence of 20 tokens; max_seqlen is 19"),
}


def attention(cu_seqlens, max_seqlen, grad=False, dropout_p=0.0):
    return ops.attention(torch.ones(TOKENS, 3, 2, 8).requires_grad_(grad), cu_seqlens, max_seqlen, dropout_p=dropout_p)


CALLS = {
    "attention": attention,
    "attention with a gradient": lambda *args: attention(*args, grad=True),
    "attention with dropout": lambda *args: attention(*args, dropout_p=0.5),
    "encoder": lambda *args: ops.encoder(
        torch.ones(TOKENS, 48), ops.EncoderWeights(make_layers(48, 96, 4, torch.float32)), *args
    ),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_offsets_are_one_error(kind, call, backend):
    if backend == "native":
        require_native()
    offsets, max_seqlen, message = WRONG[kind]
    with pytest.raises(ValueError, match=f"^{call.split()[0]}: {message}"), fastbert.use_backend(backend):
        CALLS[call](torch.tensor(offsets, dtype=torch.int32), max_seqlen)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.bool])
@pytest.mark.parametrize("call", CALLS)
def test_other_dtypes(call, dtype):
    with pytest.raises(
        ValueError, match=f"^{call.split()[0]}: cu_seqlens has shape .* dtype {dtype}; .* int32 or int64"
    ):
        CALLS[call](torch.tensor([0, TOKENS]).to(dtype), TOKENS)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("offsets", [[0, 39], [0, 0, 20, 20, 39, 39]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_right_offsets_run(call, offsets, dtype):
    assert CALLS[call](torch.tensor(offsets, dtype=dtype), 39).isfinite().all()


def test_no_tokens_and_no_sequences():
    assert ops.attention(torch.ones(0, 3, 2, 8), torch.zeros(1, dtype=torch.int32), 0).shape == (0, 2, 8)


def test_a_compiled_graph_checks_when_it_runs():
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    qkv = torch.randn(TOKENS, 3, 2, 8)
    compiled(qkv, torch.tensor([0, 20, 39]), 20)
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 30"):
        compiled(qkv, torch.tensor([0, 20, 30]), 20)


def test_a_model_checks_once_a_call(monkeypatch):
    """Offsets that the model makes are not read again; those of a caller are, once, whatever the number of layers."""
    model, looked = fastbert.BertModel(fastbert.BertConfig(**TINY)).eval(), []
    for module in (packing, _checks):
        real = module.sequence_lengths
        monkeypatch.setattr(module, "sequence_lengths", lambda *a, real=real: looked.append(a) or real(*a))
    ids, cu_seqlens = torch.arange(1, 9), torch.tensor([0, 3, 8], dtype=torch.int32)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            looked.clear()
            model(ids[None], attention_mask=(ids[None] < 8).long())
            assert not looked
            model(ids, cu_seqlens=cu_seqlens, max_seqlen=5)
            assert len(looked) == 1
