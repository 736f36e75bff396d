"""Every C++ row kernel for ARM, in an emulator, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert import reference

pytest.importorskip("ziglang")
pytest.importorskip("unicorn")
from emulator import FLAGS, Emulator, compile_kernels

DTYPES = {torch.float32: (0, 2e-6), torch.bfloat16: (1, 1e-2)}  # by number in C++; relative error
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu", "tanh")
THRESHOLD = 1 << 30  # a quarter is dropped
# The emulator has no bf16 instructions: what is compiled with them runs in fp32 and int8 only.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=FLAGS)
def machine(request, tmp_path_factory):
    return Emulator(compile_kernels(request.param, tmp_path_factory.mktemp(request.param))), request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request, machine):
    if request.param == torch.bfloat16 and machine[1] == "neon_bf16":
        pytest.skip("the emulator lacks instructions for bf16")
    return request.param


def random(dtype, *shape):
    return torch.randn(*shape).to(dtype)


def space(count):
    return torch.full((count,), float("nan"))


def close(got, expected, dtype, factor=1.0):
    assert not torch.isnan(got.float()).any()
    most = DTYPES[dtype][1] * factor * expected.abs().max()
    assert (got.double() - expected).abs().max() <= most, (got.double() - expected).abs().max() / most


@pytest.mark.parametrize("rows, columns, inner", [(1, 5, 8), (13, 40, 130), (30, 17, 258)])
def test_linear(machine, dtype, rows, columns, inner):
    x, weight, bias = random(dtype, rows, inner), random(dtype, columns, inner) / inner**0.5, random(dtype, columns)
    exact = x.double() @ weight.double().T + bias.double()
    for activation in (0, 1, 5):
        y = torch.full((rows, columns), float("nan"), dtype=dtype)
        machine[0].call(
            "linear", DTYPES[dtype][0], 0, activation, rows, columns, inner, x, weight, bias, y,
            space(20_000), space(rows * (inner + 64)), space(rows),
        )  # fmt: skip
        close(y, {0: exact, 1: F.gelu(exact), 5: exact.tanh()}[activation], dtype)


@pytest.mark.parametrize("rows, columns, inner", [(1, 5, 8), (13, 40, 130), (30, 17, 258)])
def test_linear_int8(machine, dtype, rows, columns, inner):
    x, weight, bias = random(dtype, rows, inner), random(dtype, columns, inner), random(dtype, columns)
    y = torch.full((rows, columns), float("nan"), dtype=dtype)
    machine[0].call(
        "linear", DTYPES[dtype][0], 1, 0, rows, columns, inner, x, weight, bias, y,
        space(20_000), space(rows * (inner + 64)), space(rows),
    )  # fmt: skip
    expected = reference.linear(x, weight, bias, precision="int8").double()
    close(y, expected, dtype, factor=4.0)  # a number on the border between two integers may round to either
    number = machine[0].call("packed_bytes", DTYPES[dtype][0], 1, columns, 256)
    assert number < 1.1 * (columns + 16) * (256 + 12)  # a byte each


def norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 63), (3, 768)])
def test_add_layer_norm(machine, dtype, rows, columns):
    x, residual, weight, bias = (random(dtype, *s) for s in ((rows, columns),) * 2 + ((columns,),) * 2)
    y = torch.zeros(rows, columns, dtype=dtype)
    machine[0].call("add_layer_norm", DTYPES[dtype][0], rows, columns, x, residual, weight, bias, y)
    close(y, norm(x.double() + residual.double(), weight.double(), bias.double()), dtype, factor=2.0)


def test_add_layer_norm_and_its_backward(machine, dtype):
    rows, columns = 70, 100
    x, residual, weight, bias, dy = (
        random(dtype, *shape) for shape in ((rows, columns),) * 2 + ((columns,),) * 2 + ((rows, columns),)
    )
    y, dx, dresidual = (torch.zeros(rows, columns, dtype=dtype) for _ in range(3))
    dweight, dbias = (torch.zeros(columns, dtype=dtype) for _ in range(2))
    machine[0].call(
        "add_layer_norm_train", DTYPES[dtype][0], rows, columns, x, residual, weight, bias, y, 7, 0,
        space(rows), space(rows), space(4 * columns + 512), dy, dx, dresidual, space(4 * columns), dweight, dbias,
    )  # fmt: skip
    exact = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    expected = norm(exact[0] + exact[1], exact[2], exact[3])
    close(y, expected, dtype, factor=2.0)
    gradients = torch.autograd.grad(expected, exact, dy.double())
    for got, wanted in zip((dx, dresidual, dweight, dbias), gradients, strict=True):
        close(got, wanted, dtype, factor=4.0)


def softmax_attention(qkv, window=-1):
    q, k, v = qkv.unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.25
    if window >= 0:
        places = torch.arange(len(qkv))
        scores = scores.masked_fill((places[:, None] - places).abs() > window, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("tokens, window", [(1, -1), (37, -1), (130, -1), (130, 16)])
def test_attention(machine, dtype, tokens, window):
    heads, width = 2, 16
    qkv, y = random(dtype, tokens, 3, heads, width), torch.zeros(tokens, heads, width, dtype=dtype)
    machine[0].call("attention", DTYPES[dtype][0], tokens, heads, width, qkv, y, window, space(200_000))
    close(y, softmax_attention(qkv.double(), window), dtype, factor=2.0)


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
def test_attention_and_its_backward(machine, dtype, threshold):
    """With dropout, the gradient is that of the same masks: it is linear in dy, and y in v."""
    tokens, heads, width = 45, 2, 16
    qkv, dy = random(dtype, tokens, 3, heads, width), random(dtype, tokens, heads, width)
    y, dqkv = torch.zeros(tokens, heads, width, dtype=dtype), torch.zeros(tokens, 3, heads, width, dtype=dtype)
    machine[0].call(
        "attention_train", DTYPES[dtype][0], tokens, heads, width, qkv, y, -1, 7, threshold,
        space(2 * heads * tokens), dy, dqkv, space(200_000),
    )  # fmt: skip
    if threshold:  # sum of y dy = sum of v dv
        left, right = (y.double() * dy.double()).sum(), (qkv[:, 2].double() * dqkv[:, 2].double()).sum()
        assert abs(left - right) <= DTYPES[dtype][1] * 20 * left.abs()
        plain = softmax_attention(qkv.double())
        assert (y.double() - plain).abs().max() > 0.1
        return
    exact = qkv.double().requires_grad_()
    expected = softmax_attention(exact)
    close(y, expected, dtype, factor=2.0)
    close(dqkv, torch.autograd.grad(expected, exact, dy.double())[0], dtype, factor=4.0)


def test_embed_layer_norm(machine, dtype):
    tokens, columns = 21, 100
    tables = [random(dtype, count, columns) for count in (50, 2, 30)]
    ids = [torch.randint(0, len(table), (tokens,)) for table in tables]
    weight, bias, y = random(dtype, columns), random(dtype, columns), torch.zeros(tokens, columns, dtype=dtype)
    arguments = [a for table, of in zip(tables, ids, strict=True) for a in (table, of, len(table))]
    machine[0].call(
        "embed_layer_norm",
        DTYPES[dtype][0],
        tokens,
        columns,
        *arguments,
        weight,
        bias,
        y,
        7,
        0,
        space(2 * columns + 64),
    )
    summed = sum(table.double()[of] for table, of in zip(tables, ids, strict=True))
    close(y, norm(summed, weight.double(), bias.double()), dtype, factor=2.0)


def test_rotary(machine, dtype):
    tokens, heads, groups, width = 9, 4, 2, 16
    x, table = random(dtype, tokens, heads + 2 * groups, width), torch.randn(30, 2, width // 2)
    positions, y = torch.randint(0, 30, (tokens,)), torch.zeros(tokens, 3, heads, width, dtype=dtype)
    machine[0].call("rotary", DTYPES[dtype][0], tokens, heads, groups, width, x, y, table, positions, 0)
    cosines, sines = table.double()[positions].unbind(1)
    q, k, v = x.double().split([heads, groups, groups], 1)

    def turned(x):
        a, b = x.chunk(2, -1)
        c, s = cosines[:, None], sines[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    k, v = (part.repeat_interleave(heads // groups, 1) for part in (turned(k), v))
    close(y, torch.stack([turned(q), k, v], 1), dtype)


@pytest.mark.parametrize("tokens", [2, 64, 130])
def test_the_gradient_of_a_weight(machine, dtype, tokens):
    outputs, inner = 20, 33
    dz, x = random(dtype, tokens, outputs), random(dtype, tokens, inner)
    dweight = torch.zeros(outputs, inner, dtype=dtype)
    machine[0].call(
        "linear_dweight", DTYPES[dtype][0], outputs, inner, tokens, dz.T.contiguous(), x, space(20_000), dweight,
        space(outputs * inner),
    )  # fmt: skip
    close(dweight, dz.double().T @ x.double(), dtype)


FUNCTIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients(machine, dtype, name):
    rows, columns, number = 70, 37, ACTIVATIONS.index(name)
    z, dy = 3 * random(dtype, rows, columns), random(dtype, rows, columns)
    y, dz = torch.zeros_like(z), torch.zeros_like(z)
    machine[0].call("activate", DTYPES[dtype][0], z.numel(), z, y, number)
    exact = z.double().requires_grad_()
    expected = FUNCTIONS[name](exact)
    close(y, expected, dtype)
    saved = y if name in ("relu", "tanh") else z
    machine[0].call("activation_bwd", DTYPES[dtype][0], rows, columns, dy, saved, dz, number)
    factor = 4.0 if name == "tanh" else 1.0  # 1 - y^2 of a y that is rounded
    close(dz, torch.autograd.grad(expected, exact, dy.double())[0], dtype, factor=factor)


def test_cross_entropy(machine, dtype):
    vocabulary, tokens = 40, 32
    logits, bias = random(dtype, vocabulary, tokens), random(dtype, vocabulary)
    labels = torch.randint(0, vocabulary, (tokens,), dtype=torch.int32)
    top, total = torch.zeros(tokens), torch.zeros(tokens)
    machine[0].call("cross_entropy", DTYPES[dtype][0], vocabulary, tokens, logits, bias, labels, top, total)
    exact = logits.double() + bias.double()[:, None]
    close(top, exact.max(0).values, torch.float32)
    close(total, (exact - exact.max(0).values).exp().sum(0), torch.float32, factor=4.0)
