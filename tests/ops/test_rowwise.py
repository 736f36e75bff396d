"""embed_layer_norm, linear, add_layer_norm and linear_cross_entropy: every backend, by the accuracy contract."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support import assert_accurate, assert_op_accurate, require_native

import fastbert
from fastbert import native, ops, reference
from fastbert.ops.dispatch import TABLE

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def layer_norm(x, weight, bias, eps):
    """The formula in fp64, where it is the truth; torch's own below that, where it is eager PyTorch."""
    if x.dtype != torch.float64:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def backends(op):
    return TABLE[op]["cpu"]


def skip_what_native_lacks(backend, dtype):
    if backend == "native" and (native.available() or dtype == torch.float64):
        pytest.skip(native.available() or "the native backend has no float64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 63, 111])
@pytest.mark.parametrize("backend", backends("embed_layer_norm"))
def test_embed_layer_norm(backend, rows, dtype):
    def naive(input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias, eps):
        return layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids], weight, bias, eps)

    skip_what_native_lacks(backend, dtype)
    width = 40
    inputs = {
        "input_ids": torch.randint(0, 30, (rows,)),
        "token_type_ids": torch.randint(0, 2, (rows,)),
        "position_ids": torch.randint(0, 16, (rows,)),
        "word": torch.randn(30, width),
        "token_type": torch.randn(2, width),
        "position": torch.randn(16, width),
        "weight": torch.randn(width),
        "bias": torch.randn(width),
    }
    with fastbert.use_backend(backend, "embed_layer_norm"):
        assert_op_accurate(ops.embed_layer_norm, naive, inputs, dtype, eps=1e-12)


def test_embed_layer_norm_padding_row_gets_no_gradient():
    word = torch.randn(5, 8, requires_grad=True)
    table, vector, ids = torch.randn(2, 8), torch.ones(8), torch.tensor([0, 1, 2])
    zeros = torch.zeros(3, dtype=torch.long)
    out = ops.embed_layer_norm(ids, zeros, zeros, word, table, table, vector, vector, eps=1e-12, padding_idx=1)
    out.pow(3).sum().backward()
    assert word.grad[1].abs().sum() == 0 and word.grad[0].abs().sum() > 0


@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("linear"))
def test_linear(backend, dtype, activation):
    functions = {
        None: lambda x: x,
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5)),
        "gelu_new": lambda x: x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": lambda x: x.clamp(min=0),
        "silu": lambda x: x * torch.sigmoid(x),
        "tanh": torch.tanh,
    }
    functions["gelu_pytorch_tanh"] = functions["gelu_new"]

    def naive(x, weight, bias, activation):
        return functions[activation](torch.nn.functional.linear(x, weight, bias))

    skip_what_native_lacks(backend, dtype)
    with fastbert.use_backend(backend, "linear"):
        for rows, inner, outer in ((1, 62, 111), (0, 4, 4), (111, 48, 1), (13, 100, 64), (63, 1000, 200)):
            inputs = {
                "x": torch.randn(rows, inner),
                "weight": torch.randn(outer, inner) / inner**0.5,
                "bias": torch.randn(outer),
            }
            # The error of a single bias gradient is a matter of luck, eager PyTorch's too.
            backward = backend == "reference" or outer > 1
            assert_op_accurate(ops.linear, naive, inputs, dtype, backward, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (63, 111), (5, 768), (3, 1000)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_add_layer_norm(backend, rows, width, dtype):
    def naive(x, residual, weight, bias, eps):
        return layer_norm(x + residual, weight, bias, eps)

    inputs = {
        "x": torch.randn(rows, width),
        "residual": torch.randn(rows, width) + 3,
        "weight": torch.randn(width),
        "bias": torch.randn(width),
    }
    with fastbert.use_backend(backend, "add_layer_norm"):
        assert_op_accurate(ops.add_layer_norm, naive, inputs, dtype, eps=1e-5)


@pytest.mark.parametrize("backend", ["auto", *backends("add_layer_norm")])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_layer_norm_inference(backend, with_residual):
    if backend == "native" and native.available() is not None:
        pytest.skip(native.available())
    x, residual = torch.randn(63, 111), torch.randn(63, 111) if with_residual else None
    weight, bias = torch.randn(111), torch.randn(111)
    exact = layer_norm((x + (0 if residual is None else residual)).double(), weight, bias, 1e-12)
    with fastbert.use_backend(backend, "add_layer_norm"):
        got = ops.add_layer_norm(x, residual, weight, bias, eps=1e-12)
    assert_accurate(got, reference.add_layer_norm(x, residual, weight, bias, eps=1e-12), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 2500])
@pytest.mark.parametrize("backend", backends("linear_cross_entropy"))
def test_linear_cross_entropy(backend, rows, dtype):
    def naive(x, weight, bias, labels):
        logits = (x @ weight.T + bias).double()  # the loss is taken in at least fp32: only the logits round
        return F.cross_entropy(logits, labels).to(x.dtype)

    skip_what_native_lacks(backend, dtype)
    labels = torch.randint(0, 37, (rows,))
    labels[1::3] = -100
    inputs = {
        "x": torch.randn(rows, 24),
        "weight": torch.randn(37, 24),
        "bias": torch.randn(37),
        "labels": labels,
    }
    with fastbert.use_backend(backend, "linear_cross_entropy"):
        assert_op_accurate(ops.linear_cross_entropy, naive, inputs, dtype)


def test_linear_cross_entropy_keeps_no_logits():
    """What autograd saves grows with the hidden size, not with the vocabulary."""
    rows, width, vocab = 2048, 8, 4096
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    saved = []

    def keep(t):
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.linear_cross_entropy(x, weight, None, torch.randint(0, vocab, (rows,)))
    assert max(saved, default=0) < rows * vocab / 16


def test_linear_cross_entropy_of_nothing_is_nan_as_in_torch():
    loss = ops.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), None, torch.full((3,), -100))
    assert loss.isnan()


@pytest.mark.parametrize("call", ["linear", "add_layer_norm", "embed_layer_norm", "linear_cross_entropy"])
def test_compiles_in_one_graph(call):
    x, weight, vector = torch.randn(6, 16), torch.randn(16, 16), torch.randn(16)
    ids = torch.arange(6)
    calls = {
        "linear": lambda x: ops.linear(x, weight, vector, activation="gelu"),
        "add_layer_norm": lambda x: ops.add_layer_norm(x, x, vector, vector, eps=1e-5),
        "embed_layer_norm": lambda x: ops.embed_layer_norm(ids, ids, ids, x, x, x, vector, vector, eps=1e-5),
        "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, weight, vector, ids),
    }
    compiled = torch.compile(calls[call], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), calls[call](x), rtol=1e-4, atol=1e-5)


def test_linear_cross_entropy_compiles_with_its_gradients_and_without_logits():
    require_native()
    tensors = [torch.randn(50, 16), torch.randn(300, 16), torch.randn(300)]
    labels = torch.randint(0, 300, (50,)).masked_fill(torch.arange(50) % 3 > 0, -100)
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for wanted in ((0, 1, 2), (1,), (0, 2)):
        got, eager = ([t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)] for _ in range(2))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = compiled(*got, labels)
        expected = ops.linear_cross_entropy(*eager, labels)
        torch.testing.assert_close(loss, expected)
        (3 * loss).backward()
        (3 * expected).backward()
        for mine, theirs in zip(got, eager, strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
        assert 50 * 300 not in sizes


def test_linear_cross_entropy_registered_op():
    require_native()
    x, weight, labels = torch.randn(6, 16).requires_grad_(), torch.randn(9, 16).requires_grad_(), torch.arange(6)
    arguments = ("native", x, weight, None, labels, -100, [True, True, False])
    torch.library.opcheck(torch.ops.fastbert.linear_cross_entropy.default, arguments)


def test_add_layer_norm_registered_op():
    x, vector = torch.randn(6, 16), torch.randn(16)
    torch.library.opcheck(torch.ops.fastbert.add_layer_norm.default, (x, x, vector, vector, 1e-5))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_add_layer_norm_drops_x_and_not_the_residual(p):
    x, residual = torch.full((400, 64), 5.0), torch.zeros(400, 64)
    residual[:, 0] = 100.0
    out = ops.add_layer_norm(x, residual, torch.ones(64), torch.zeros(64), eps=1e-5, dropout_p=p)
    kept = (out[:, 1:] > out[:, 1:].min(dim=1, keepdim=True).values + 1e-3).float().mean()
    assert (out.argmax(dim=1) == 0).all()
    assert abs(kept - (0.6 if p else 0.0)) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.linear(torch.zeros(2, 3), torch.zeros(4, 5)),
            r"linear: weight has shape \(4, 5\); it must be \(\*, 3\)",
        ),
        (
            lambda: ops.linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5)),
            r"linear: bias has shape \(5,\); it must be \(4\)",
        ),
        (
            lambda: ops.linear(torch.zeros(2, 3), torch.zeros(4, 3), activation="gelo"),
            "activation is 'gelo'; known are gelu, ",
        ),
        (
            lambda: ops.add_layer_norm(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(3), torch.ones(3), eps=1e-5),
            r"residual has shape \(2, 4\); it must be \(2, 3\)",
        ),
        (
            lambda: ops.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), None, torch.zeros(2)),
            "labels has dtype torch.float32",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weight_gradients_are_summed_in_fp32():
    """4096 rows in bf16: summed in bf16 the bias' gradient would stop growing at a few hundred."""
    x, weight, bias = (t.bfloat16().requires_grad_() for t in (torch.randn(4096, 8), torch.ones(8), torch.zeros(8)))
    ops.add_layer_norm(x, None, weight, bias, eps=1e-12).sum().backward()
    assert (bias.grad == 4096).all()


def test_the_triton_version_says_why_not_without_a_gpu():
    code = (
        "import torch; from fastbert.ops.add_layer_norm.triton import supports_triton as s; x = torch.ones(2, 2);"
        "print(s(x, x, x[0], x[0], eps=1e-5, dropout_p=0.0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "it runs on a GPU, not on cpu\n"
