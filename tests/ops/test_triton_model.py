"""Whole models over the Triton ops: losses and every gradient against the reference's, and training that repeats.

Dispatch refuses tensors of the CPU, so here it is told to take them; their kernels run in the interpreter.
"""

import functools

import pytest
import torch

pytest.importorskip("triton")

from triton_support import (
    COMPILED,
    DEVICE,
    INTERPRETED,
    RUN_DTYPES,
    compiles,
    compiling_for,
    runs,
)

import fastbert
from fastbert import ops
from fastbert.ops import _triton, dispatch

OPS = [op for op, order in dispatch.TABLE.items() if "triton" in order["cuda"]]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,  # large, so that attention is far from uniform
}
MASK = torch.tensor([[1] * 9, [1] * 3 + [0] * 6, [0] * 9, [1, 0, 1, 1, 0, 1, 1, 1, 0]])
IDS = torch.randint(1, 40, MASK.shape, generator=torch.Generator().manual_seed(1))
SENTENCES = torch.ones(4, dtype=torch.long)  # all alike, so that the sum of their errors does not cancel
LABELS = IDS.masked_fill((IDS % 3 > 0) | (MASK == 0), -100)


@pytest.fixture
def triton_on_any_device(monkeypatch):
    monkeypatch.setattr(_triton, "_device_reason", lambda device: None)
    for op in OPS:
        order = dispatch.TABLE[op]
        monkeypatch.setitem(dispatch.TABLE, op, {**order, "cpu": order["cuda"]})


@pytest.fixture(autouse=True)
def _triton_where_it_runs(request):
    if INTERPRETED:
        request.getfixturevalue("triton_on_any_device")


@compiles
@pytest.mark.usefixtures("triton_on_any_device")
@pytest.mark.parametrize("target", COMPILED)
def test_the_smallest_model_compiles(target):
    """What the ops launch, forward and backward. A size of 1 is a constant to Triton's compiler, so that each of these
    is a program of its own. Nothing runs."""
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=2, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1
    )
    ids = torch.ones(1, 1, dtype=torch.long)
    launched = set()
    for dtype in (torch.bfloat16, torch.float32):
        model = fastbert.BertForMaskedLM(config).to(dtype).train()
        with compiling_for(target) as compiled, fastbert.use_backend("triton", *OPS):
            model(ids, labels=ids, output_logits=False).loss.backward()
            with torch.no_grad():
                model.eval()(ids)
        launched |= {kernel.name for kernel in compiled}
    parts = ("embed_layer_norm", "attention", "add_layer_norm", "activation", "cross_entropy")
    assert [part for part in parts if not any(part in name for name in launched)] == []
    assert sum("_bwd" in name for name in launched) >= 4, launched


def model_of(kind=fastbert.BertForPreTraining, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    config = fastbert.BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return kind(config).to(DEVICE, dtype)


def padded():
    return {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "token_type_ids": IDS % 2}


def packed():
    kept = MASK.bool()
    cu_seqlens = torch.tensor([0, *MASK.sum(1).cumsum(0)], dtype=torch.int32)
    return {"input_ids": IDS[kept], "labels": LABELS[kept], "cu_seqlens": cu_seqlens, "max_seqlen": 9}


def train(model, given, backend_name="triton"):
    """The loss and the gradient of each parameter; by Triton, of every op that has a version of it."""
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    model.zero_grad()
    with fastbert.use_backend(backend_name, *OPS):
        loss = model(**given).loss
        loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(kind, given, dtype):
    """Against fp64: no gradient's share of error is above twice what eager's is of its worst one."""
    mine = train(model_of(kind, dtype=dtype), given)
    eager = train(model_of(kind, dtype=dtype), given, "reference")
    exact = train(model_of(kind, dtype=dtype).double(), given, "reference")
    assert mine.keys() == eager.keys() == exact.keys()
    # What is left out is the gradient of a key's bias, which is none.
    names = [name for name, x in exact.items() if x.norm() > 1e-9]
    share = lambda got, name: float((got[name].double() - exact[name]).norm() / exact[name].norm())  # noqa: E731
    limit = 2 * max(share(eager, name) for name in names)
    assert 0 < limit < (20 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-4)
    for name in names:
        assert mine[name].dtype == eager[name].dtype and share(mine, name) <= limit, (name, share(mine, name), limit)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
FAMILIES = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "distilbert": {},
    "electra": {"embedding_size": 24},
    "mpnet": {},
    "nomic_bert": {},
    "gte": {},
    "jina_embeddings_v3": {},
    "modernbert": {"local_attention": 4, "num_hidden_layers": 3},
    "eurobert": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "jina_bert": {"model_type": "bert", "position_embedding_type": "alibi"},
}


@runs
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    def make():
        torch.manual_seed(0)
        settings = SIZES | NO_DROPOUT | {"num_hidden_layers": 1, "model_type": name} | FAMILIES[name]
        config = fastbert.BertConfig.from_dict(settings)
        return fastbert.AutoModelForMaskedLM.of(config)(config).to(DEVICE)

    given = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 9, [1] * 3 + [0] * 6, [0] * 9, [1] * 7 + [0] * 2])}
    given |= {"labels": IDS.masked_fill(given["attention_mask"] == 0, -100), "output_logits": False}
    mine, eager, exact = (
        train(make(), given),
        train(make(), given, "reference"),
        train(make().double(), given, "reference"),
    )
    assert mine.keys() == exact.keys()
    share = lambda got, name: float((got[name].double() - exact[name]).norm() / exact[name].norm())  # noqa: E731
    names = [where for where, x in exact.items() if x.norm() > 1e-9]
    limit = 4 * max(share(eager, where) for where in names)  # a turned key's bias has a small gradient
    assert 0 < limit < 1e-4
    for where in names:
        assert share(mine, where) <= limit, (where, share(mine, where), limit)
    model = make().eval()
    with torch.no_grad(), fastbert.use_backend("triton", *(op for op in OPS if op != "encoder")):
        states = model.base_model(IDS.to(DEVICE)).last_hidden_state
    with torch.no_grad(), fastbert.use_backend("reference"):
        torch.testing.assert_close(states, model.base_model(IDS.to(DEVICE)).last_hidden_state, rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("dtype", RUN_DTYPES)
@pytest.mark.parametrize("batch", [padded, packed])
def test_pretraining(batch, dtype):
    given = {**batch(), "next_sentence_label": SENTENCES, "output_logits": False}
    check(fastbert.BertForPreTraining, given, dtype)


@runs
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (fastbert.BertForMaskedLM, {"labels": LABELS}),
        (fastbert.BertForSequenceClassification, {"labels": torch.tensor([1, 0, 1, 1])}),
        (fastbert.BertForTokenClassification, {"labels": LABELS.clamp(max=1)}),
        (
            fastbert.BertForQuestionAnswering,
            {"start_positions": torch.tensor([1, 0, 2, 3]), "end_positions": torch.tensor([4, 1, 2, 5])},
        ),
    ],
)
def test_heads(kind, labels):
    given = {name: x for name, x in padded().items() if name != "labels"}
    check(kind, {**given, **labels}, torch.float32)


@functools.cache
def expected_with_dropout():
    return with_dropout()


def with_dropout(change=lambda model: None, dtype=torch.float32):
    model = model_of(dropout=0.3, dtype=dtype).train()
    change(model)
    torch.manual_seed(7)
    return train(model, {**packed(), "next_sentence_label": SENTENCES, "output_logits": False})


@runs
def test_dropout_is_the_same_in_the_backward():
    """The slope along the gradient, measured: with a mask of another draw it would be something else."""
    results = expected_with_dropout()
    length = sum(x.pow(2).sum() for name, x in results.items() if name != "loss").sqrt()

    def moved(step):
        def move(model):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(results[name], alpha=float(step / length))

        return with_dropout(move)["loss"]

    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    torch.testing.assert_close(slope, length, rtol=2e-2, atol=0)


def set_recompute(model):
    for layer in model.bert.encoder.layer:
        layer.recompute_activations = True


@runs
@pytest.mark.parametrize(
    "change",
    [lambda model: None, set_recompute, lambda model: model.gradient_checkpointing_enable()],
    ids=["again", "recompute_activations", "gradient_checkpointing"],
)
def test_training_repeats_bit_for_bit(change):
    expected, results = expected_with_dropout(), with_dropout(change)
    assert expected.keys() == results.keys()
    for name, x in expected.items():
        assert torch.equal(x, results[name]), name


@runs
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_transforms_tensors_gets_the_reference():
    """torch.func and torch.jit.trace call with tensors that have no memory of their own."""
    x, weight, bias = torch.randn(3, 5, 8, device=DEVICE), torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)

    def norm(x):
        return ops.add_layer_norm(x, None, weight, bias, eps=1e-6)

    expected = torch.stack([norm(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(norm)(x), expected)
    torch.testing.assert_close(
        torch.func.grad(lambda x: norm(x).pow(3).sum())(x[0]).sum(1), torch.zeros_like(x[0, :, 0])
    )
    traced = torch.jit.trace(norm, x[0])
    torch.testing.assert_close(traced(x[1]), expected[1])
