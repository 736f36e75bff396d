"""feed_forward: the numbers of two linears, whether or not the activation is recomputed; and what autograd keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import TINY, assert_op_accurate, mask_of, require_native, tokens

import fastbert
from fastbert import native, ops, reference

ROWS, WIDTH, INNER = 37, 24, 80


def inputs(rows=ROWS, bias=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    made = {
        "x": draw(rows, WIDTH),
        "up_weight": draw(INNER, WIDTH) / WIDTH**0.5,
        "up_bias": draw(INNER),
        "down_weight": draw(WIDTH, INNER) / INNER**0.5,
        "down_bias": draw(WIDTH),
    }
    return made if bias else {name: x for name, x in made.items() if "bias" not in name}


def naive(x, up_weight, up_bias, down_weight, down_bias, activation, recompute=None):
    inner = reference.ACTIVATIONS[activation](F.linear(x, up_weight, up_bias))
    return F.linear(inner, down_weight, down_bias)


def kept_bytes(run):
    """Bytes of the tensors that autograd keeps for the backward of run(), each storage once; biases, which are leaves
    that live anyway, do not count."""
    storages = {}

    def pack(x):
        if x.dim() > 1 or not x.is_leaf:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(storages.values()), out


@pytest.fixture(params=["native", "reference"])
def each_backend(request):
    if request.param == "native":
        require_native()
    with fastbert.use_backend(request.param, "linear"):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_gradients(each_backend, recompute, activation, dtype):
    if each_backend == "native" and dtype == torch.float64:
        pytest.skip("the native backend has no float64")
    for rows in (0, 1, ROWS):
        kwargs = {"activation": activation, "recompute": recompute}
        assert_op_accurate(ops.feed_forward, naive, inputs(rows), dtype, **kwargs)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_recomputed_it_is_the_same(each_backend, activation):
    results = []
    for recompute in (False, True):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs().items()}
        y = ops.feed_forward(**leaves, activation=activation, recompute=recompute)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves.values())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_recomputed_it_keeps_one_inner_tensor_less(each_backend):
    sizes = []
    for recompute in (False, True):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs().items()}
        size, _ = kept_bytes(lambda: ops.feed_forward(**leaves, activation="gelu", recompute=recompute))  # noqa: B023
        sizes.append(size)
    assert sizes[0] - sizes[1] == ROWS * INNER * 4
    weights = sum(inputs()[name].nbytes for name in ("x", "up_weight", "down_weight"))
    assert sizes[1] == weights + ROWS * INNER * 4


@pytest.mark.parametrize("trained", [("x",), ("up_weight",), ("up_bias",), ("down_weight",), ("down_bias",)], ids=str)
def test_only_the_gradients_that_are_needed(each_backend, trained, monkeypatch):
    leaves = inputs()
    for name in trained:
        leaves[name].requires_grad_()
    calls = []
    real = native.linear_bwd
    monkeypatch.setattr(native, "linear_bwd", lambda *a, **k: calls.append(a[-1]) or real(*a, **k))
    plain = torch.autograd.grad(ops.feed_forward(**leaves, activation="gelu").sum(), leaves[trained[0]])
    calls.clear()
    got = torch.autograd.grad(ops.feed_forward(**leaves, activation="gelu", recompute=True).sum(), leaves[trained[0]])
    assert torch.equal(plain[0], got[0])
    if each_backend == "native":
        down, *up = calls
        assert down == ("up" in trained[0] or trained == ("x",), trained == ("down_weight",), trained == ("down_bias",))
        assert len(up) == down[0]


def test_without_biases(each_backend):
    leaves = {name: x.requires_grad_() for name, x in inputs(bias=False).items()}
    results = []
    for recompute in (False, True):
        y = ops.feed_forward(**leaves, up_bias=None, down_bias=None, activation="gelu", recompute=recompute)
        results.append(torch.autograd.grad(y.square().sum(), leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    leaves = {name: x.requires_grad_() for name, x in inputs().items()}
    results = []
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.feed_forward(**leaves, activation="gelu", recompute=recompute)
        assert y.dtype == torch.bfloat16
        results.append(torch.autograd.grad(y.float().square().sum(), leaves.values()))
    for plain, recomputed in zip(*results, strict=True):
        assert recomputed.dtype == torch.float32 and torch.equal(plain, recomputed)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, WIDTH + 1)}, "has shape"),
        ({"up_bias": torch.zeros(3)}, "has shape"),
        ({"down_weight": torch.zeros(WIDTH, 3)}, "has shape"),
        ({"down_bias": torch.zeros(3)}, "has shape"),
        ({"x": torch.zeros(3, WIDTH, dtype=torch.long)}, "floating-point"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"precision": "exact"}, "precision is 'exact'"),
        ({"precision": "int8"}, "no gradient"),
    ],
)
def test_bad_arguments(changes, message, recompute):
    given = {name: x.requires_grad_() for name, x in inputs().items()} | {"activation": "gelu"} | changes
    with pytest.raises(ValueError, match=message):
        ops.feed_forward(**given, recompute=recompute)


def models():
    """A model, and its copy that recomputes."""
    torch.manual_seed(0)
    plain = fastbert.BertForSequenceClassification(fastbert.BertConfig(**TINY))
    recomputing = copy.deepcopy(plain)
    recomputing.recompute_activations()
    return plain.train(), recomputing.train()


def loss(model):
    mask = mask_of("right")
    return model(tokens().masked_fill(mask == 0, 0), attention_mask=mask, labels=torch.tensor([0, 1, 1])).loss


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_a_model_that_recomputes():
    plain, recomputing = models()
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(recomputing), strict=True))
    saved = kept_bytes(lambda: loss(plain))[0] - kept_bytes(lambda: loss(recomputing))[0]
    real_tokens = 8 + 3 + 1
    rows = (TINY["num_hidden_layers"] - 1) * real_tokens + 3  # the last layer's rows are the first token of each text
    assert saved == rows * TINY["intermediate_size"] * 4
    recomputing.recompute_activations(False)
    assert kept_bytes(lambda: loss(plain))[0] == kept_bytes(lambda: loss(recomputing))[0]


def test_a_model_that_recomputes_with_checkpoints_too():
    plain, recomputing = models()
    recomputing.gradient_checkpointing_enable()
    for a, b in zip(gradients(plain), gradients(recomputing), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_wrapped_layer_is_called_as_it_is():
    _, recomputing = models()
    called = []
    for layer in recomputing.bert.encoder.layer:
        layer.output.dense.register_forward_hook(lambda *_: called.append(1))
    gradients(recomputing)
    assert len(called) == TINY["num_hidden_layers"]


def test_an_accelerated_model_that_recomputes():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    original = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY)).train()
    plain, recomputing = (copy.deepcopy(original) for _ in range(2))
    fastbert.accelerate(plain)
    fastbert.accelerate(recomputing, recompute_activations=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(recomputing), strict=True))
    saved = kept_bytes(lambda: loss(plain))[0] - kept_bytes(lambda: loss(recomputing))[0]
    assert saved == TINY["num_hidden_layers"] * 12 * TINY["intermediate_size"] * 4
    fastbert.accelerate(recomputing)
    assert kept_bytes(lambda: loss(plain))[0] == kept_bytes(lambda: loss(recomputing))[0]
