"""The C++ linear_cross_entropy: every instruction set this machine has, by the accuracy contract."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from support import assert_accurate, assert_op_accurate, require_native

import fastbert
from fastbert import ops, reference

implementation = import_module("fastbert.native.linear_cross_entropy")
DTYPES = [torch.float32, torch.bfloat16]


def inputs_of(rows, width, vocab, *, ignored=0.3):
    labels = torch.randint(0, vocab, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    labels[-1:] = vocab - 1
    return {
        "x": torch.randn(rows, width),
        "weight": torch.randn(vocab, width) / width**0.5,
        "bias": torch.randn(vocab),
        "labels": labels,
    }


def naive(x, weight, bias, labels, ignore_index=-100):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(
        logits.to(torch.promote_types(x.dtype, torch.float32)), labels, ignore_index=ignore_index
    ).to(x.dtype)


def run(inputs, dtype=torch.float32, factor=1.0):
    """The loss and its gradients."""
    leaves = {k: x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    loss = ops.linear_cross_entropy(**leaves)
    return [loss.detach(), *torch.autograd.grad(loss * factor, [leaves[k] for k in ("x", "weight", "bias")])]


@pytest.fixture(autouse=True)
def _native():
    require_native()
    with fastbert.use_backend("native", "linear_cross_entropy"):
        yield


@pytest.fixture(params=["all at once", "in chunks"])
def budget(request, monkeypatch):
    """With the logits of a few hundred words at a time, they are made twice."""
    if request.param == "in chunks":
        monkeypatch.setattr(implementation, "_GRADIENT_BYTES", 1)
        monkeypatch.setattr(implementation, "_LOSS_BYTES", 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(1, 2, 1), (1, 64, 129), (31, 62, 500), (63, 100, 128), (111, 1000, 300)]
)
def test_accuracy(isa, budget, rows, width, vocab, dtype):
    inputs = inputs_of(rows, width, vocab)
    assert_op_accurate(ops.linear_cross_entropy, naive, inputs, dtype)
    with torch.no_grad():
        got = ops.linear_cross_entropy(**{k: x.to(dtype) if k != "labels" else x for k, x in inputs.items()})
    assert torch.equal(got, run(inputs, dtype)[0])


def test_odd_width_in_fp32(isa, budget):
    assert_op_accurate(ops.linear_cross_entropy, naive, inputs_of(40, 63, 200), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(isa, dtype):
    """Logits of hundreds: nothing overflows, and the probabilities that round to zero do no harm."""
    inputs = inputs_of(40, 64, 300)
    inputs["weight"] *= 100
    inputs["bias"][::7] = -1000
    assert_op_accurate(ops.linear_cross_entropy, naive, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(isa, budget, dtype):
    inputs, results = inputs_of(200, 64, 1000), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(inputs, dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_used_before_leaves_no_trace(isa):
    inputs = inputs_of(50, 64, 500)
    clean = run(inputs)
    run({k: x * float("nan") if k != "labels" else x for k, x in inputs_of(90, 64, 700).items()})
    assert all(torch.equal(a, b) for a, b in zip(clean, run(inputs), strict=True))


def test_a_row_without_a_label_counts_for_nothing(isa):
    inputs = inputs_of(60, 64, 300)
    ignored = inputs["labels"] == -100
    plain = run(inputs)
    inputs["x"][ignored] = float("nan")
    changed = run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))
    assert (plain[1][ignored] == 0).all()


def test_strided_inputs(isa):
    inputs = inputs_of(50, 64, 300)
    expected = run(inputs)
    wide = {k: torch.cat([inputs[k], inputs[k] * 2], 1).requires_grad_() for k in ("x", "weight")}
    labels = torch.stack([inputs["labels"]] * 2, 1)[:, 0]
    bias = inputs["bias"].clone().requires_grad_()
    loss = ops.linear_cross_entropy(wide["x"][:, :64], wide["weight"][:, :64], bias, labels.int())
    loss.backward()
    assert torch.equal(loss, expected[0]) and torch.equal(bias.grad, expected[3])
    for i, name in enumerate(("x", "weight"), 1):
        assert torch.equal(wide[name].grad[:, :64], expected[i]) and (wide[name].grad[:, 64:] == 0).all()
    x = inputs["x"].t().contiguous().t()  # columns first
    torch.testing.assert_close(ops.linear_cross_entropy(x, inputs["weight"], inputs["bias"], labels), expected[0])


def test_without_bias_and_another_ignore_index(isa):
    inputs = inputs_of(50, 64, 300, ignored=0)
    inputs["labels"][::3] = 7
    got = ops.linear_cross_entropy(inputs["x"], inputs["weight"], None, inputs["labels"], ignore_index=7)
    double = (inputs["x"].double(), inputs["weight"].double(), None, inputs["labels"])
    eager = reference.linear_cross_entropy(inputs["x"], inputs["weight"], None, inputs["labels"], ignore_index=7)
    assert_accurate(got, eager, reference.linear_cross_entropy(*double, ignore_index=7))


def test_only_what_is_asked_for_gets_a_gradient():
    inputs = inputs_of(40, 64, 300)
    expected = dict(zip(("x", "weight", "bias"), run(inputs)[1:], strict=True))
    for name, want in expected.items():
        leaves = {**inputs, name: inputs[name].clone().requires_grad_()}
        ops.linear_cross_entropy(**leaves).backward()
        assert torch.equal(leaves[name].grad, want)


def test_a_scaled_loss_and_a_second_backward():
    inputs = inputs_of(40, 64, 300)
    expected = run(inputs)
    for a, b in zip(run(inputs, factor=0.25)[1:], expected[1:], strict=True):
        assert torch.equal(a, b * 0.25)
    leaves = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    loss = ops.linear_cross_entropy(**leaves)
    (loss * 2).backward(retain_graph=True)
    loss.backward()
    assert torch.equal(leaves["weight"].grad, expected[2] * 2 + expected[2])


def test_a_parameter_takes_its_gradient_without_a_copy():
    inputs = inputs_of(40, 64, 300)
    weight = inputs["weight"].requires_grad_()
    loss = ops.linear_cross_entropy(**inputs)
    address = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == address


@pytest.mark.parametrize("rows", [0, 3])
def test_of_nothing_is_nan_as_in_torch(isa, rows):
    inputs = {**inputs_of(rows, 8, 5), "labels": torch.full((rows,), -100)}
    got = run(inputs)
    assert got[0].isnan() and got[0].shape == () and F.cross_entropy(torch.randn(3, 5), torch.full((3,), -100)).isnan()
    leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]
    expected = torch.autograd.grad(naive(*leaves, inputs["labels"]), leaves)
    for a, b in zip(got[1:], expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bad", [-1, 300, 1 << 40])
def test_labels_outside_the_vocabulary(bad, grad):
    inputs = inputs_of(40, 64, 300)
    inputs["labels"][3] = bad
    inputs["weight"].requires_grad_(grad)
    with pytest.raises(ValueError, match=f"labels holds {bad}; the weight has 300 rows, so 0 to 299 are valid"):
        ops.linear_cross_entropy(**inputs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": torch.zeros(64, 300).T}, "last dimension not contiguous"),
        ({"weight": torch.zeros(300, 64).half()}, "mixed dtypes"),
        ({"bias": torch.zeros(600)[::2]}, r"bias of shape \(300,\)"),
        ({"x": torch.zeros(4, 63).bfloat16(), "weight": torch.zeros(300, 63).bfloat16(), "bias": None}, "odd width"),
    ],
)
def test_reasons(change, reason):
    with pytest.raises(fastbert.BackendError, match=f"cannot run this call: .*{reason}"):
        ops.linear_cross_entropy(**{**inputs_of(4, 64, 300), **change})


def exact_logits(kind):
    """Inputs whose logits, of some 10,000, fp32 holds exactly; three neighbours in the vocabulary are close."""
    if kind == "a large bias":
        x, weight = torch.randint(-2, 3, (60, 64)).float(), torch.randint(-1, 2, (300, 64)).float() / 8
        bias = 1e4 + torch.randint(-4, 5, (300,)).float()
    else:
        x, weight = torch.randint(-40, 41, (60, 64)).float(), torch.randint(-40, 41, (300, 64)).float()
        for first in (1, 2):
            weight[first::3] = weight[::3] + (torch.randn(100, 64) < -2.5)
        bias = torch.zeros(300)
    return {"x": x, "weight": weight, "bias": bias, "labels": torch.randint(0, 300, (60,))}


@pytest.mark.parametrize("kind", ["a large bias", "large products"])
def test_logits_of_ten_thousand(isa, budget, kind):
    """By the contract without a floor: log(sum) added to such a maximum would lose all but four of its digits."""
    inputs = exact_logits(kind)
    assert 5e3 < F.linear(*(inputs[k] for k in ("x", "weight", "bias"))).amax() < 1e5
    eager, exact = [], []
    for results, dtype in ((eager, torch.float32), (exact, torch.float64)):
        leaves = {k: x.to(dtype).requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
        loss = naive(**leaves)
        results += [loss.detach(), *torch.autograd.grad(loss, [leaves[k] for k in ("x", "weight", "bias")])]
    for name, got, peer, truth in zip(("loss", "dx", "dweight", "dbias"), run(inputs), eager, exact, strict=True):
        assert_accurate(got, peer, truth, name)


def test_a_small_loss_of_large_logits(isa):
    """The label's logit is 10,000 and the largest by 8: a loss of 1e-3, which is not 0."""
    x, weight = torch.ones(40, 2), torch.full((4, 2), 4996.0)
    weight[2] += 4
    labels = torch.full((40,), 2)
    exact = naive(x.double(), weight.double(), None, labels)
    assert 5e-4 < exact < 2e-3
    got = ops.linear_cross_entropy(x, weight, None, labels)
    assert abs(got - exact) <= 1e-4 * exact


def test_words_that_a_bias_of_minus_infinity_leaves_out(isa):
    """The first words of all, a whole block of them, and some others: they have no probability and no gradient."""
    inputs = inputs_of(40, 64, 400)
    inputs["labels"][:] = 399
    out = torch.cat([torch.arange(140), torch.arange(150, 390, 7)])
    inputs["bias"][out] = -float("inf")
    got, left = run(inputs), torch.ones(400, dtype=torch.bool)
    left[out] = False
    alone = {**inputs, "weight": inputs["weight"][left], "bias": inputs["bias"][left]}
    alone["labels"] = torch.full((40,), int(left.sum()) - 1)
    for a, b in zip([*got[:2], got[2][left], got[3][left]], run(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert (got[2][out] == 0).all() and (got[3][out] == 0).all()
