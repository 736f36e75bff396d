"""Derivatives of gradients: of each op against its formula in fp64, and of models against transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import require_native
from test_known_parts import make

import fastbert
from fastbert import ops, reference

T, E, H = 7, 8, 2
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
IDS = torch.tensor([3, 1, 4, 1, 5, 0, 2])


def vectors(*shapes):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# Each: the op, the formula, and the tensors that both take.
OPS = {
    **{
        f"linear {activation}": (
            lambda x, w, b, activation=activation: ops.linear(x, w, b, activation=activation),
            lambda x, w, b, activation=activation: reference.linear(x, w, b, activation=activation),
            vectors((T, E), (6, E), (6,)),
        )
        for activation in (None, "gelu", "gelu_new", "silu", "tanh")
    },
    "feed_forward": (
        lambda *t: ops.feed_forward(*t, activation="gelu", recompute=True),
        lambda x, u, ub, d, db: F.linear(F.gelu(F.linear(x, u, ub)), d, db),
        vectors((T, E), (12, E), (12,), (E, 12), (E,)),
    ),
    "add_layer_norm": (
        lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, eps=1e-5),
        lambda x, r, w, b: F.layer_norm(x + r, (E,), w, b, 1e-5),
        vectors((T, E), (T, E), (E,), (E,)),
    ),
    "add_layer_norm of one tensor twice": (
        lambda x, w, b: ops.add_layer_norm(x.sin(), x, w, b, eps=1e-5),
        lambda x, w, b: F.layer_norm(x.sin() + x, (E,), w, b, 1e-5),
        vectors((T, E), (E,), (E,)),
    ),
    "embed_layer_norm": (
        lambda *t: ops.embed_layer_norm(IDS, IDS % 2, torch.arange(T), *t, eps=1e-5, padding_idx=0),
        lambda *t: reference.embed_layer_norm(IDS, IDS % 2, torch.arange(T), *t, eps=1e-5, padding_idx=0),
        vectors((9, E), (2, E), (10, E), (E,), (E,)),
    ),
    "attention": (
        lambda qkv: ops.attention(qkv, CU, 4),
        lambda qkv: reference.attention_formula(qkv, CU),
        vectors((T, 3, H, E // H)),
    ),
    "linear_cross_entropy": (
        lambda x, w, b: ops.linear_cross_entropy(x, w, b, IDS.clone().index_fill_(0, torch.tensor([2]), -100)),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), IDS.clone().index_fill_(0, torch.tensor([2]), -100)),
        vectors((T, E), (6, E), (6,)),
    ),
}


def penalty(call, tensors, dtype):
    """The gradients of a loss in which the gradients of another stand."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    y = call(*leaves)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first) + y.sum(), leaves)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_second_derivatives_of_ops(name, backend):
    op, formula, tensors = OPS[name]
    if backend == "native":
        require_native()
    with fastbert.use_backend(backend):
        got = penalty(op, tensors, torch.float32)
    for a, b in zip(got, penalty(formula, tensors, torch.float64), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name", OPS)
def test_torch_func_hessian_of_ops(name):
    """Also where the tensors ask for a gradient of their own."""
    op, formula, tensors = OPS[name]

    def hessian(call, dtype):
        first, *rest = (t.to(dtype).requires_grad_() for t in tensors)
        return torch.func.hessian(lambda x: call(x, *rest).square().sum())(first)

    got, expected = hessian(op, torch.float32).detach(), hessian(formula, torch.float64).detach()
    assert expected.abs().max() > 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["attention", "add_layer_norm", "embed_layer_norm"])
def test_with_dropout_it_is_one_error(name):
    require_native()
    calls = {
        "attention": lambda t: ops.attention(t[0], CU, 4, dropout_p=0.5),
        "add_layer_norm": lambda t: ops.add_layer_norm(*t, eps=1e-5, dropout_p=0.5),
        "embed_layer_norm": lambda t: ops.embed_layer_norm(IDS, IDS % 2, IDS, *t, eps=1e-5, dropout_p=0.5),
    }
    leaves = [t.clone().requires_grad_() for t in OPS[name][2]]
    y = calls[name](leaves).sum()
    with pytest.raises(RuntimeError, match=rf"{name}: a derivative of its gradient .* dropout_p is 0.5"):
        torch.autograd.grad(y, leaves, create_graph=True)
    torch.autograd.grad(calls[name](leaves).sum(), leaves)


def models(tmp_path):
    original = make("BertForSequenceClassification")
    original.set_attn_implementation("eager")
    original.save_pretrained(tmp_path)
    own = fastbert.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    return original, {"accelerated": fastbert.accelerate(copy.deepcopy(original)), "own": own}


@pytest.mark.parametrize("output", ["logits", "pooler_output"])
def test_models_as_transformers(output, tmp_path):
    original, ours = models(tmp_path)
    embeds, direction = vectors((2, 6, 48), (2, 6, 48))

    def results(model):
        def score(e):
            out = model(inputs_embeds=e) if output == "logits" else model.bert(inputs_embeds=e)
            return out[output].square().sum()

        e = embeds.clone().requires_grad_()
        model.zero_grad()
        (gradient,) = torch.autograd.grad(score(e), e, create_graph=True)
        (gradient.flatten(1).norm(dim=1) - 1).square().mean().backward()
        product = torch.autograd.functional.hvp(score, embeds, direction)[1]
        return [product, *(p.grad for p in model.bert.encoder.parameters())]

    expected = results(original)
    for name, model in ours.items():
        for i, (a, b) in enumerate(zip(results(model), expected, strict=True)):
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=2e-4 * float(b.abs().max()) + 1e-4, msg=lambda m, n=name, i=i: f"{n} {i} {m}"
            )


@pytest.mark.parametrize("kind", ["jvp", "jacfwd", "functional"])
def test_forward_mode_as_transformers(kind, tmp_path):
    original, ours = models(tmp_path)
    embeds, direction = vectors((1, 4, 48), (1, 4, 48))

    def results(model):
        def score(e):
            return model(inputs_embeds=e).logits

        if kind == "jvp":
            return torch.func.jvp(score, (embeds,), (direction,))[1]
        if kind == "jacfwd":
            return torch.func.jacfwd(lambda a: score(embeds + a * direction))(torch.zeros(()))
        return torch.autograd.functional.jvp(score, embeds, direction)[1]

    expected = results(original)
    assert expected.abs().max() > 0
    for model in ours.values():
        torch.testing.assert_close(results(model), expected, rtol=1e-4, atol=1e-4)
