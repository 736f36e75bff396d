"""The Triton linear_cross_entropy: its loss and gradients by the accuracy contract, and compiled for GPUs not there."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_accurate, assert_op_accurate

pytest.importorskip("triton")

from triton_support import (
    ALL_DTYPES,
    COMPILED,
    DEVICE,
    DTYPES,
    check_resources,
    compiles,
    compiling_for,
    nan_filled,  # noqa: F401
    runs,
)

from fastbert.kernels import configs
from fastbert.kernels import linear_cross_entropy as kernels
from fastbert.ops.linear_cross_entropy.triton import run_triton, supports_triton

pytestmark = pytest.mark.usefixtures("nan_filled")


def op(x, weight, bias, labels, ignore_index=-100):
    return run_triton(x, weight, bias, labels, ignore_index=ignore_index)


def naive(x, weight, bias, labels, ignore_index=-100):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(
        logits.to(torch.promote_types(x.dtype, torch.float32)), labels, ignore_index=ignore_index
    ).to(x.dtype)


def inputs_of(rows, width, vocab, *, ignored=0.3, device=DEVICE):
    labels = torch.randint(0, vocab, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    labels[-1:] = vocab - 1
    inputs = {
        "x": torch.randn(rows, width),
        "weight": torch.randn(vocab, width) / width**0.5,
        "bias": torch.randn(vocab),
        "labels": labels,
    }
    return {name: t.to(device) for name, t in inputs.items()}


def run(inputs, dtype=torch.float32, factor=1.0):
    """The loss and its gradients."""
    leaves = {k: x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    loss = op(**leaves)
    return [loss.detach(), *torch.autograd.grad(loss * factor, [leaves[k] for k in ("x", "weight", "bias")])]


def assert_all_equal(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture(params=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setattr(kernels, "_LOGITS_BYTES", 1)  # 128 rows at a time


@pytest.fixture(params=["labelled rows", "all rows"])
def compaction(request, monkeypatch):
    """With all rows, as a CUDA graph captures it."""
    if request.param == "all rows":
        monkeypatch.setitem(run_triton.__globals__, "_labelled", lambda *args: None)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "chunks"),  # up to 128 rows are one chunk however little memory there is
    [
        *((*size, "one chunk") for size in ((1, 2, 1), (1, 64, 129), (31, 100, 1000), (135, 62, 111))),
        (135, 62, 111, "chunks"),
    ],
    indirect=["chunks"],
)
def test_accuracy(rows, width, vocab, dtype, chunks, compaction):
    inputs = inputs_of(rows, width, vocab)
    assert_op_accurate(op, naive, inputs, dtype)
    with torch.no_grad():
        got = op(**{k: x.to(dtype) if k != "labels" else x for k, x in inputs.items()})
    assert torch.equal(got, run(inputs, dtype)[0])


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_of_several_blocks(dtype):
    """The running maximum rises, falls and stays; the last block is not whole."""
    inputs = inputs_of(5, 16, 2 * configs.cross_entropy(10**6)[0] + 37, ignored=0)
    inputs["bias"][:4000] -= 50
    inputs["labels"][:4] = torch.tensor([0, 4095, 4096, 8191])
    assert_op_accurate(op, naive, inputs, dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype):
    """Logits of hundreds, and a block of the vocabulary that a bias of -inf rules out."""
    inputs = inputs_of(20, 64, 5000)
    inputs["weight"] *= 100
    inputs["bias"][:4500] = -float("inf")
    inputs["labels"][inputs["labels"] >= 0] = 4600
    got = run(inputs, dtype)
    leaves = [inputs[k].to(dtype).requires_grad_() for k in ("x", "weight", "bias")]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for args, results in ((leaves, eager := []), (exact, true := [])):
        loss = naive(*args, inputs["labels"])
        results += [loss.detach(), *torch.autograd.grad(loss, args)]
    for mine, theirs, truth in zip(got, eager, true, strict=True):
        assert_accurate(mine, theirs, truth)


@runs
def test_fp16_keeps_small_gradients_for_a_scaled_loss():
    """A probability over the number of rows is below fp16's smallest number; times a scaler's factor it is not."""
    inputs = inputs_of(400, 32, 2000, ignored=0)
    scale = 2.0**14
    mine = run(inputs, torch.float16, scale)
    rounded = {k: x.half().double().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    loss = naive(**rounded) * scale
    exact = torch.autograd.grad(loss, [rounded[k] for k in ("x", "weight", "bias")])
    for a, b in zip(mine[1:], exact, strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


@runs
def test_rows_and_labels_that_count_for_nothing(compaction):
    inputs = inputs_of(60, 64, 300)
    ignored = inputs["labels"] == -100
    plain = run(inputs)
    inputs["x"][ignored] += 100.0
    changed = run(inputs)
    assert_all_equal(plain, changed)
    assert (plain[1][ignored] == 0).all()


@runs
def test_without_bias_and_another_ignore_index(compaction):
    inputs = inputs_of(50, 64, 300, ignored=0)
    inputs["labels"][::3] = 7
    x, weight, labels = inputs["x"], inputs["weight"], inputs["labels"]
    got = op(x, weight, None, labels.int(), ignore_index=7)
    eager = naive(x, weight, None, labels, ignore_index=7)
    assert_accurate(got, eager, naive(x.double(), weight.double(), None, labels, ignore_index=7))


@runs
def test_strided_inputs():
    inputs = inputs_of(50, 64, 300)
    expected = run(inputs)
    wide = {k: torch.cat([inputs[k], inputs[k] * 2], 1).requires_grad_() for k in ("x", "weight")}
    bias = torch.stack([inputs["bias"]] * 2, 1).requires_grad_()
    labels = torch.stack([inputs["labels"]] * 2, 1)[:, 0]
    loss = op(wide["x"][:, :64], wide["weight"][:, :64], bias[:, 0], labels)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    gradients = wide["x"].grad[:, :64], wide["weight"].grad[:, :64], bias.grad[:, 0]
    for got, want in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    columns_first = inputs["x"].t().contiguous().t()
    torch.testing.assert_close(op(columns_first, inputs["weight"], inputs["bias"], labels), expected[0])


@runs
def test_only_what_is_asked_for_gets_a_gradient():
    inputs = inputs_of(40, 64, 300)
    for name, want in zip(("x", "weight", "bias"), run(inputs)[1:], strict=True):
        leaves = {**inputs, name: inputs[name].clone().requires_grad_()}
        op(**leaves).backward()
        assert torch.equal(leaves[name].grad, want)


@runs
def test_a_scaled_loss_and_a_second_backward(chunks):
    inputs = inputs_of(130, 64, 300, ignored=0)
    expected = run(inputs)
    for a, b in zip(run(inputs, factor=0.25)[1:], expected[1:], strict=True):
        assert torch.equal(a, b * 0.25)
    leaves = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    loss = op(**leaves)
    (loss * 2).backward(retain_graph=True)
    loss.backward()
    assert torch.equal(leaves["weight"].grad, expected[2] * 2 + expected[2])


@runs
@pytest.mark.parametrize("rows", [0, 3])
def test_of_nothing_is_nan_as_in_torch(rows, compaction):
    inputs = {**inputs_of(rows, 8, 5), "labels": torch.full((rows,), -100, device=DEVICE)}
    got = run(inputs)
    assert got[0].isnan() and got[0].shape == ()
    leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]
    expected = torch.autograd.grad(naive(*leaves, inputs["labels"]), leaves)
    for a, b in zip(got[1:], expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@runs
@pytest.mark.parametrize("bad", [-1, 300, 1 << 40])
def test_labels_outside_the_vocabulary(bad, monkeypatch):
    inputs = inputs_of(40, 64, 300)
    inputs["labels"][3] = bad
    with pytest.raises(ValueError, match=f"labels holds {bad}; the weight has 300 rows, so 0 to 299 are valid"):
        op(**inputs)
    monkeypatch.setitem(run_triton.__globals__, "_labelled", lambda *args: None)  # as in a captured graph
    loss, *gradients = run(inputs)
    assert loss.isnan() and all(g.isnan().any() for g in gradients)


@runs
def test_autocast():
    inputs = inputs_of(40, 64, 300)
    leaves = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    expected = run(inputs, torch.float16)
    with torch.autocast(DEVICE, torch.float16):
        loss = op(**leaves)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.half() == expected[0]
    for name, want in zip(("x", "weight", "bias"), expected[1:], strict=True):
        assert leaves[name].grad.dtype == torch.float32 and torch.equal(leaves[name].grad, want.float())


def test_chunks_are_bounded_and_even(monkeypatch):
    for V, itemsize in ((30522, 2), (119547, 4), (30, 2)):
        for M in (1, 127, 4000, 4500, 100_000):
            rows = kernels._rows(M, V, itemsize)
            assert rows == M or (rows % 128 == 0 and rows * V * itemsize <= kernels._LOGITS_BYTES)
    assert kernels._rows(4500, 30522, 2) == 2304  # not 4,352 and then 148
    assert kernels._rows(1000, 10**7, 4) == 128


def test_reasons():
    inputs = inputs_of(4, 8, 10, device="cpu")
    assert supports_triton(**inputs, ignore_index=-100) == "it runs on a GPU, not on cpu"


@runs
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter computes in the CPU's memory")
def test_reasons_on_a_gpu():
    inputs = inputs_of(4, 8, 10)
    assert supports_triton(**inputs, ignore_index=-100) is None
    assert "dtypes float32, float16" in supports_triton(**{**inputs, "bias": inputs["bias"].half()}, ignore_index=0)
    assert "labels on cpu" in supports_triton(**{**inputs, "labels": inputs["labels"].cpu()}, ignore_index=0)


@compiles
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_compiles(target, dtype):
    x, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((3, 16), (30522, 16), (30522,)))
    labels = torch.zeros(3, dtype=torch.int64)
    with compiling_for(target) as compiled:
        _, count, *made = kernels.linear_cross_entropy_fwd(x, weight, bias, labels, needed=(True, True, True))
        kernels.linear_cross_entropy_fwd(x, weight, None, labels)
        kernels.linear_cross_entropy_bwd(torch.ones(()), count, *made, dtype)
    names = {kernel.name for kernel in compiled}
    assert {"_cross_entropy_kernel", "_scale_kernel"} <= names
    for kernel in compiled:
        check_resources(kernel)
