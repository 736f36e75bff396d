"""Every model with a head on the C++ backend: which backend ran each op, and that torch computed none of them."""

import pytest
import torch
from support import TINY, mask_of, require_native, tokens

import fastbert
from fastbert import BertConfig
from fastbert.ops import dispatch

CLASSES = torch.tensor([0, 1, 1])
# head -> (what it is called with, how often each op runs above the encoder)
HEADS = {
    "BertModel": ({}, {"linear": 1}),
    "BertForPreTraining": ({}, {"linear": 4, "add_layer_norm": 1}),
    "BertForMaskedLM": ({}, {"linear": 2, "add_layer_norm": 1}),
    "BertForNextSentencePrediction": ({"labels": CLASSES}, {"linear": 2}),
    "BertForSequenceClassification": ({"labels": CLASSES}, {"linear": 2}),
    "BertForMultipleChoice": ({}, {"linear": 2}),
    "BertForTokenClassification": ({}, {"linear": 1}),
    "BertForQuestionAnswering": ({"start_positions": CLASSES, "end_positions": CLASSES}, {"linear": 1}),
}
# What torch would call these: products, LayerNorm, gathers and activations. Losses and dropout are torch's everywhere.
OURS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "native_layer_norm", "embedding", "gelu", "tanh")


class Torchs:
    """Collects which of those torch runs, by its profiler: a dispatch mode would be one to run torch's own for."""

    def __enter__(self):
        self.ran, self.profiler = [], torch.autograd.profiler.profile()
        self.profiler.__enter__()
        return self

    def __exit__(self, *error):
        self.profiler.__exit__(*error)
        names = (event.name.removeprefix("aten::") for event in self.profiler.function_events)
        self.ran = [name for name in names if name in OURS]


@pytest.fixture
def chosen(monkeypatch):
    """(op, backend) of each choice."""
    require_native()
    choices, choose = [], dispatch.choose

    def spy(op, *args, **kwargs):
        name, run = choose(op, *args, **kwargs)
        choices.append((op, name))
        return name, run

    monkeypatch.setattr(dispatch, "choose", spy)
    return choices


def example(name, kind):
    """A model, what to call it with, and the counts of ops above the encoder."""
    model = getattr(fastbert, name)(BertConfig(**TINY)).eval()
    arguments, counts = HEADS[name]
    ids, mask = tokens(), mask_of(kind)
    if name == "BertForMultipleChoice":
        ids, mask = ids[:, None].repeat(1, 2, 1), None if mask is None else mask[:, None].repeat(1, 2, 1)
    return model, {"input_ids": ids, "attention_mask": mask, **arguments}, counts


@pytest.mark.parametrize("kind", ["absent", "right", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_inference_is_native_throughout(chosen, name, dtype, kind):
    model, arguments, counts = example(name, kind)
    with torch.no_grad():
        with fastbert.use_backend("reference"):
            expected = model(**arguments)
        model.to(dtype)
        chosen.clear()
        with fastbert.use_backend("native"), Torchs() as torchs:
            got = model(**arguments)
    ran = [("embed_layer_norm", "native"), ("encoder", "native")] + [("read_mask", "native")] * (kind != "absent")
    ran += [(op, "native") for op, count in counts.items() for _ in range(count)]
    assert sorted(chosen) == (
        [] if name == "BertModel" else sorted(ran)
    )  # a BertModel is one call, of ops.encode_batch
    assert torchs.ran == []
    for key, value in expected.items():
        if value is not None:
            tolerance = 1e-5 if dtype == torch.float32 else 0.2
            torch.testing.assert_close(
                got[key].float(), value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_torch_is_seen_where_it_runs(chosen):
    model, arguments, _ = example("BertForMaskedLM", "right")
    with torch.no_grad(), fastbert.use_backend("reference"), Torchs() as torchs:
        model(**arguments)
    assert {"addmm", "native_layer_norm", "embedding", "gelu"} <= set(torchs.ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labelled", ["BertForMaskedLM", "BertForPreTraining"])
def test_the_loss_without_logits_is_native(chosen, labelled, dtype):
    """In inference and in training."""
    model, arguments, _ = example(labelled, "right")
    model.to(dtype)
    arguments |= {"labels": arguments["input_ids"], "output_logits": False}
    if labelled == "BertForPreTraining":
        arguments["next_sentence_label"] = CLASSES
    with fastbert.use_backend("native", "embed_layer_norm", "linear_cross_entropy"):
        trained = model(**arguments).loss
        trained.backward()
        with torch.no_grad(), fastbert.use_backend("native"):
            inferred = model(**arguments).loss
    assert chosen.count(("embed_layer_norm", "native")) == chosen.count(("linear_cross_entropy", "native")) == 2
    torch.testing.assert_close(trained, inferred, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    ours = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with fastbert.use_backend("reference"):
        model(**arguments).loss.backward()
    for n, p in model.named_parameters():
        assert (ours[n] is None) == (p.grad is None), n
        if p.grad is not None and not n.endswith("key.bias"):  # whose gradient is zero but for rounding
            error = (ours[n].double() - p.grad.double()).norm() / p.grad.double().norm().clamp(min=1e-4)
            assert error < (1e-4 if dtype == torch.float32 else 0.1), (n, error)


def packed_bytes(model):
    """The memory of all forms in the plans of a model."""
    return sum(vars(m)["_fastbert_plan"].nbytes() for m in model.modules() if "_fastbert_plan" in vars(m))


def test_logits_pack_the_word_table_and_the_loss_does_not():
    """The decoder's weight is the word table: its logits cost a packed copy of it, which goes with the model."""
    require_native()
    model, arguments, _ = example("BertForMaskedLM", "absent")
    table = model.config.vocab_size * model.config.hidden_size * 4
    with torch.no_grad(), fastbert.use_backend("native"):
        model(**arguments, labels=arguments["input_ids"], output_logits=False)
        without = packed_bytes(model)
        model(**arguments)
    assert table <= packed_bytes(model) - without <= 1.3 * table
