"""Past the last attention a model computes the tokens that its head reads, and all of them where others see them."""

import pytest
import torch

import fastbert
from fastbert.families import FAMILIES
from fastbert.model import layer
from fastbert.model.bert import picked_states, run_bert
from fastbert.model.encoder import pick

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60)
LENGTHS = [7, 0, 12, 1]


def make_model(kind, head=fastbert.AutoModelForSequenceClassification):
    torch.manual_seed(1)
    settings = {**SIZES, "model_type": kind, "pad_token_id": 0, "id2label": dict(enumerate("abc"))}
    settings |= {"position_embedding_type": "alibi"} if kind == "jina_bert" else {}
    config = fastbert.BertConfig.from_dict(settings)
    return head.of(config)(config).eval()


def make_batch():
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(5, 60, mask.shape).masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture
def rows(monkeypatch):
    """Of each feed-forward that keeps its parts apart, the tokens it computes."""
    seen = []
    feed_forward = layer.Layer.feed_forward

    def counting(self, x, *rest):
        seen.append(len(x))
        return feed_forward(self, x, *rest)

    monkeypatch.setattr(layer.Layer, "feed_forward", counting)
    return seen


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_classifier_computes_the_first_tokens(kind, rows):
    """In training; the same logits and gradients as with a hook on the last layer, which sees all tokens."""
    model, batch = make_model(kind), make_batch()
    labels = torch.tensor([0, 1, 2, 0])
    found = model(**batch, labels=labels)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    read = sum(LENGTHS) if model._read() is None else len(LENGTHS)
    assert rows == [sum(LENGTHS), read]
    model.zero_grad()
    states = []
    last = list(model.family.layers(model.base_model))[-1]
    last.register_forward_hook(lambda module, args, output: states.append(output))
    whole = model(**batch, labels=labels)
    whole.loss.backward()
    assert [len(x) for x in states] == [sum(LENGTHS)] == rows[-1:]
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_hidden_states_and_attentions_are_of_all_tokens(rows):
    model, batch = make_model("bert"), make_batch()
    plain = model(**batch).logits
    found = model(**batch, output_hidden_states=True)
    assert rows == [sum(LENGTHS), len(LENGTHS), *[sum(LENGTHS)] * 2]
    torch.testing.assert_close(found.logits, plain)
    first = found.hidden_states[-1][:, 0]
    pooled = model.base_model.pooler.dense(first).tanh() * (torch.tensor(LENGTHS) > 0)[:, None]
    torch.testing.assert_close(model.classifier(pooled), plain)
    torch.testing.assert_close(model(**batch, output_attentions=True).logits, plain)


def test_a_part_that_is_called_sees_all_tokens():
    model, batch = make_model("bert"), make_batch()
    plain, seen = model(**batch).logits, []
    model.bert.encoder.layer[1].output.dense.register_forward_hook(
        lambda module, args, output: seen.append(len(output))
    )
    torch.testing.assert_close(model(**batch).logits, plain)
    assert seen == [sum(LENGTHS)]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet"])
def test_any_tokens(kind):
    """Twice, in any order, or none."""
    model = make_model(kind, fastbert.AutoModel)
    ids = torch.randint(5, 60, (20,))
    given = {"cu_seqlens": torch.tensor([0, 13, 20], dtype=torch.int32), "max_seqlen": 13}
    states = model(ids, **given).last_hidden_state
    for picked in ([17, 3, 3], [], list(range(20)), [1] * 21):
        rows = torch.tensor(picked, dtype=torch.int64)
        _, encoded = run_bert(model, model.config, ids, **given, picked=rows)
        assert encoded.is_picked
        torch.testing.assert_close(encoded.last_hidden_state, states[rows], rtol=1e-6, atol=1e-6)


def test_no_token_of_none_keeps_its_gradient():
    """DDP expects a gradient of every parameter, of a batch without texts, too."""
    assert pick(torch.zeros(0, 8, requires_grad=True), torch.zeros(0).long()).requires_grad


@pytest.mark.parametrize("sees", ["hook", "forward"])
def test_a_model_whose_call_is_seen_is_called(sees):
    class Own(fastbert.BertModel):
        def forward(self, *args, **options):
            seen.append("forward")
            return super().forward(*args, **options)

    seen: list[str] = []
    config = make_model("bert").config
    plain = fastbert.BertModel(config).eval()
    model = Own(config).eval() if sees == "forward" else fastbert.BertModel(config).eval()
    model.load_state_dict(plain.state_dict())
    if sees == "hook":
        model.register_forward_hook(lambda *_: seen.append("hook"))
    given = torch.randint(5, 60, (20,)), torch.tensor([0, 13, 13, 20], dtype=torch.int32)
    for picked in ("first", torch.tensor([4, 4, 19])):
        found, expected = (picked_states(m, *given, max_seqlen=13, picked=picked) for m in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert seen == [sees] * 2


@torch.inference_mode()
def test_texts_without_tokens():
    model = make_model("bert")
    nothing = {"input_ids": torch.zeros(3, 2, dtype=torch.int64), "attention_mask": torch.zeros(3, 2)}
    few = {"input_ids": torch.tensor([[5], [0], [0]]), "attention_mask": torch.tensor([[1], [0], [0]])}
    empty = model(**nothing).logits
    assert torch.equal(empty, model.classifier(torch.zeros(3, 32)))
    assert torch.equal(model(**few).logits[1:], empty[1:])
    torch.testing.assert_close(model(**few).logits[:1], model(torch.tensor([[5]])).logits)
