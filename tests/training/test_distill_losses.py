"""Distillation's losses against naive ones in float64, and the students they teach."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import transformers
from support import TINY

import fastbert
from fastbert.training.distill.layers import LayerLosses
from fastbert.training.distill.losses import choice_loss, label_loss, number_loss, relation_loss, state_loss
from fastbert.training.distill.settings import DistillationSettings
from fastbert.training.distill.student import check_vocabularies, make_student, spread

KINDS = [
    fastbert.BertModel,
    fastbert.BertForPreTraining,
    fastbert.BertForMaskedLM,
    fastbert.BertForSequenceClassification,
    fastbert.BertForTokenClassification,
    fastbert.BertForQuestionAnswering,
    fastbert.BertForMultipleChoice,
]


def logits(rows=5, columns=7, seed=0):
    random = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, columns, dtype=torch.float64, generator=random) for _ in range(2))
    return student.requires_grad_(), teacher


def assert_same(loss, naive, x, **tolerance):
    """Values and gradients of two losses."""
    (got,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(naive, x, retain_graph=True)
    assert expected.abs().max() > 1e-3  # there is a gradient to compare
    torch.testing.assert_close(loss, naive, **tolerance)
    torch.testing.assert_close(got, expected, **tolerance)


def softmax(row):
    exps = [x.exp() for x in row]
    return [x / sum(exps) for x in exps]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_of_classes(temperature):
    student, teacher = logits()
    naive = 0
    for s, t in zip(student, teacher, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        naive = naive + temperature**2 * sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    assert_same(choice_loss(student, teacher, temperature), naive, student)


def test_a_class_ruled_out_is_none():
    student, teacher = logits()
    wide = [torch.cat([x, x.new_full((5, 2), -torch.inf)], dim=1) for x in (student, teacher)]
    assert_same(choice_loss(*wide, 2.0), choice_loss(student, teacher, 2.0), student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets_of_labels(temperature):
    student, teacher = logits()
    naive = 0
    for s, t in zip(student, teacher, strict=True):
        for a, b in zip(s / temperature, t / temperature, strict=True):
            q, p = 1 / (1 + (-a).exp()), 1 / (1 + (-b).exp())
            naive = naive + temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()) / 7
    assert_same(label_loss(student, teacher, temperature), naive, student)


def test_numbers_and_states():
    student, teacher = logits()
    squares = sum((a - b) ** 2 for s, t in zip(student, teacher, strict=True) for a, b in zip(s, t, strict=True)) / 7
    assert_same(number_loss(student, teacher), squares, student)
    assert_same(state_loss(student, teacher, "mse"), squares, student)
    cosines = sum(1 - s @ t / (s.norm() * t.norm()) for s, t in zip(student, teacher, strict=True))
    assert_same(state_loss(student, teacher, "cosine"), cosines, student)


def naive_relations(student, teacher, bounds, relations, heads):
    """A sequence, a head and a token at a time, from (T, 3, E)."""
    total = 0
    for start, end in pairwise(bounds):
        for a, b in relations:
            for head in range(heads):
                rows = []
                for side in (student, teacher):
                    width = side.shape[2] // heads
                    x, y = (side[start:end, "qkv".index(k), head * width : (head + 1) * width] for k in (a, b))
                    rows.append([[x_i @ y_j / math.sqrt(width) for y_j in y] for x_i in x])
                for s, t in zip(*rows, strict=True):
                    q, p = softmax(s), softmax(t)
                    total = total + sum(v * (v / u).log() for u, v in zip(q, p, strict=True))
    return total / (len(relations) * heads)


@pytest.mark.parametrize(("relations", "heads"), [(("qq", "kk", "vv"), 2), (("qk", "vv"), 4), (("vq",), 1)])
def test_relations_of_models_of_different_widths_and_heads(relations, heads):
    bounds = [0, 3, 4, 4, 11, 13, 19]  # a sequence without a token, one of a single token; lengths of three groups
    random = torch.Generator().manual_seed(0)
    student = torch.randn(19, 3, 2, 4, dtype=torch.float64, generator=random).requires_grad_()
    teacher = 2 * torch.randn(19, 3, 4, 5, dtype=torch.float64, generator=random)
    loss = relation_loss(student, teacher, torch.tensor(bounds, dtype=torch.int32), relations, heads)
    assert_same(loss, naive_relations(student.flatten(2), teacher.flatten(2), bounds, relations, heads), student)


def test_the_relation_of_queries_and_keys_is_that_of_the_attention_probabilities():
    config = fastbert.BertConfig(**TINY)
    models = [fastbert.BertModel(config).double().eval() for _ in range(2)]
    cu_seqlens = torch.tensor([0, 8, 11], dtype=torch.int32)
    given = {"input_ids": torch.arange(5, 16), "cu_seqlens": cu_seqlens, "max_seqlen": 8}
    settings = DistillationSettings("t", hidden_weight=0, relation_weight=1, relations=("qk",), relation_layer=1)
    states = [model(**given, output_hidden_states=True).hidden_states for model in models]
    got = LayerLosses(*models, settings)(*models, *states, cu_seqlens)["relation"]
    student, teacher = (
        model(**given, output_attentions=True).attentions[i] for i, model in ((2, models[0]), (1, models[1]))
    )
    expected = (torch.xlogy(teacher, teacher) - torch.xlogy(teacher, student)).nansum(dim=-1).sum() / 4
    torch.testing.assert_close(got, expected)
    assert got > 0.1


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_states_go_by_the_map_and_are_projected_to_the_teachers_width(kind):
    teacher = fastbert.BertModel(fastbert.BertConfig(**TINY)).double()
    student = make_student(teacher, layers=[0, 2], hidden_size=24).double()
    settings = DistillationSettings("t", hidden_layers=(2, 0), hidden_loss=kind)
    losses = LayerLosses(student, teacher, settings).double()
    for projection in losses.projections:
        assert torch.equal(projection.weight, torch.eye(48, 24, dtype=torch.float64))
        torch.nn.init.normal_(projection.weight)
        torch.nn.init.normal_(projection.bias)
    random = torch.Generator().manual_seed(0)
    own = [torch.randn(6, 24, dtype=torch.float64, generator=random, requires_grad=True) for _ in range(3)]
    theirs = [torch.randn(6, 48, dtype=torch.float64, generator=random) for _ in range(4)]
    first, second = losses.projections
    loss = losses(student, teacher, own, theirs, torch.tensor([0, 6]))["hidden"]
    mapped = [(own[1] @ first.weight.T + first.bias, theirs[3]), (own[2] @ second.weight.T + second.bias, theirs[1])]
    naive = sum(state_loss(x, y, kind) for x, y in mapped) / 2
    torch.testing.assert_close(loss, naive)
    loss.backward()
    assert own[0].grad is None and all(p.grad.abs().sum() > 0 for p in losses.parameters())


def test_layers_are_spread_as_tinyberts():
    assert spread(4, 12) == [2, 5, 8, 11] and spread(3, 6) == [1, 3, 5] and spread(1, 6) == [5]
    assert spread(4, 6) == [0, 2, 3, 5]
    for count in (1, 2, 7):
        assert spread(count, count) == list(range(count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_begins_as_chosen_layers_of_its_teacher(tmp_path, kind):
    teacher = kind(fastbert.BertConfig(**TINY, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}))
    student = make_student(teacher, layers=[2, 0])
    assert type(student) is kind and student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 3
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        source = name.replace("layer.0.", "layer.X.").replace("layer.1.", "layer.0.").replace("layer.X.", "layer.2.")
        assert torch.equal(tensor, theirs[source]), name
        assert tensor.data_ptr() != theirs[source].data_ptr()
    assert_transformers_loads(student, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_student_has_the_first_units(tmp_path, kind):
    teacher = kind(fastbert.BertConfig(**TINY))
    student = make_student(teacher, num_layers=2, hidden_size=24)
    config = student.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (24, 48, 2)
    own, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    prefix = "" if kind is fastbert.BertModel else "bert."
    for name, source in (
        ("encoder.layer.1.attention.self.query.weight", "encoder.layer.2.attention.self.query.weight"),
        ("encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.LayerNorm.weight", "embeddings.LayerNorm.weight"),
    ):
        a, b = own[prefix + name], theirs[prefix + source]
        assert torch.equal(a, b[tuple(slice(n) for n in a.shape)]) and a.shape != b.shape, name
    assert_transformers_loads(student, tmp_path)


def assert_transformers_loads(model, folder):
    model.save_pretrained(folder)
    theirs = getattr(transformers, type(model).__name__).from_pretrained(folder).eval()
    ids = torch.arange(5, 13).view(1, 1, 8) if "Choice" in type(model).__name__ else torch.arange(5, 13)[None]
    with torch.no_grad():
        a, b = model(ids), theirs(ids)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_student_has_the_dropout_it_is_told():
    teacher = fastbert.BertModel(fastbert.BertConfig(**TINY))
    student = make_student(teacher, dropout=0.3)
    layer = student.encoder.layer[0]
    assert {layer.output.dropout.p, layer.attention.self.dropout.p, student.embeddings.dropout.p} == {0.3}
    assert teacher.config.hidden_dropout_prob == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 3]}, "layers: 3 is no layer of the teacher, which has 0 to 2"),
        ({"layers": [-1]}, "layers: -1 is no layer of the teacher, which has 0 to 2"),
        ({"layers": []}, "layers is empty; there must be at least one"),
        ({"num_layers": 4}, "num_layers is 4; it must be 1 to 3, which the teacher has"),
        ({"layers": [0], "num_layers": 2}, "layers are 1 and num_layers is 2; one of them is enough"),
        ({"hidden_size": 60}, "hidden_size is 60; the teacher has 48, a student no more"),
        ({"intermediate_size": 97}, "intermediate_size is 97; the teacher has 96, a student no more"),
        ({"hidden_size": 30}, "hidden_size is 30, no multiple of the 12 units that a head of the teacher has"),
        ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
    ],
)
def test_students_that_cannot_be(options, message):
    with pytest.raises(ValueError) as error:
        make_student(fastbert.BertModel(fastbert.BertConfig(**TINY)), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_layers": (0, 3)}, "hidden_layers: 3 is no layer of the teacher, which has 0 to 2"),
        ({"hidden_layers": (0,)}, "hidden_layers has 1 layers; the student has 2, each needs one"),
        ({"relation_layer": 7}, "relation_layer: 7 is no layer of the teacher, which has 0 to 2"),
        (
            {"relation_weight": 1.0, "relation_heads": 16},
            "relation_heads is 16; the student's hidden_size, 24, is no multiple of it",
        ),
    ],
)
def test_layers_that_cannot_be_compared(options, message):
    teacher = fastbert.BertModel(fastbert.BertConfig(**TINY))
    with pytest.raises(ValueError) as error:
        LayerLosses(make_student(teacher, num_layers=2, hidden_size=24), teacher, DistillationSettings("t", **options))
    assert str(error.value) == message


def test_vocabularies_must_be_the_same():
    tokenizers = [
        fastbert.BertTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) for words in ("ab", "ba", "a")
    ]
    check_vocabularies(tokenizers[0], tokenizers[0])
    with pytest.raises(ValueError, match=r"vocabularies, of 7 and 7 tokens: 'a' has number 5 in the teacher's and 6"):
        check_vocabularies(tokenizers[0], tokenizers[1])
    with pytest.raises(ValueError, match=r"of 7 and 6 tokens: 'b' has number 6 in the teacher's and none"):
        check_vocabularies(tokenizers[0], tokenizers[2])
    small, large = (fastbert.BertModel(fastbert.BertConfig(**{**TINY, "vocab_size": size})) for size in (100, 120))
    with pytest.raises(ValueError, match="the student's vocab_size is 100 and the teacher's 120"):
        LayerLosses(small, large, DistillationSettings("t"))
