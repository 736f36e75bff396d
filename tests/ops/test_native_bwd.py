"""The C++ backward passes: every instruction set this machine has, by the accuracy contract; what they must not do."""

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import assert_accurate, assert_op_accurate, poisoned_memory, require_native

import fastbert
from fastbert import native, ops, reference
from fastbert.native import extension, packed_weights

add_layer_norm_bwd = import_module("fastbert.native.add_layer_norm_bwd")  # functions have these names, too
linear_bwd = import_module("fastbert.native.linear_bwd")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def native_and_poisoned(monkeypatch):
    """The native backend, whose fresh memory is NaN: nothing may be read that was not written."""
    require_native()
    real_workspace = linear_bwd.workspace

    def poisoned_workspace(size):
        memory = real_workspace(size)
        memory.held.fill(255)  # NaN in every dtype
        return memory

    for module in (linear_bwd, add_layer_norm_bwd):
        monkeypatch.setattr(module, "workspace", poisoned_workspace)
    with fastbert.use_backend("native", "linear", "attention", "add_layer_norm"), poisoned_memory():
        yield


def gradients(function, dtype, inputs, dy=None):
    """The result of `function` and the gradient of each input, None where it has none."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    dy = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape) if dy is None else dy
    return [out.detach(), *torch.autograd.grad(out, leaves.values(), dy.to(dtype))]


def linear_inputs(rows, inner, outer):
    weight = torch.randn(outer, inner) / inner**0.5
    return {"x": torch.randn(rows, inner), "weight": weight, "bias": torch.randn(outer)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "relu", "silu", "tanh"])
def test_linear(isa, activation, dtype, monkeypatch):
    monkeypatch.setattr(linear_bwd, "_CHUNK_WORDS", 64)  # two chunks in bf16, four in fp32, and a rest
    for rows, inner, outer in ((0, 4, 6), (1, 2, 5), (63, 62, 111), (111, 100, 33), (253, 64, 130)):
        inputs = linear_inputs(rows, inner, outer)
        assert_op_accurate(ops.linear, reference.linear, inputs, dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (63, 111), (200, 768), (5, 1000)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_layer_norm(isa, with_residual, rows, width, dtype):
    inputs = {"x": torch.randn(rows, width), "weight": torch.randn(width), "bias": torch.randn(width)}
    if with_residual:
        inputs["residual"] = torch.randn(rows, width) + 3

    def add_layer_norm(x, weight, bias, residual=None, eps=1e-5):
        return ops.add_layer_norm(x, residual, weight, bias, eps=eps)

    def naive(x, weight, bias, residual=None, eps=1e-5):
        return F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, eps)

    assert_op_accurate(add_layer_norm, naive, inputs, dtype)


def naive_attention(qkv, cu_seqlens, scale=None, factors=None, bias=None):
    """`factors` (H, T, longest): what each probability is multiplied by; `bias(L)`: (H, L, L), added to the scores."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        probs = torch.softmax(scores if bias is None else scores + bias(end - start), dim=-1)
        if factors is not None:
            probs = probs * factors[:, start:end, : end - start].to(probs.dtype)
        parts.append(torch.einsum("hqk,khd->qhd", probs, v))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 16), (12, 32), (2, 64), (2, 80), (1, 34)])
def test_attention(isa, heads, width, dtype):
    cu_seqlens = torch.tensor([0, 1, 5, 0, 32, 33, 64, 130]).cumsum(0).int()
    dirty = torch.full((300, 3, heads, width), float("nan"), dtype=dtype, requires_grad=True)
    ops.attention(dirty, torch.tensor([0, 300]).int(), 300).sum().backward()  # leaves NaN in the threads' memory
    qkv = torch.randn(int(cu_seqlens[-1]), 3, heads, width)
    for scale in (None, 0.2):
        attention = partial(ops.attention, cu_seqlens=cu_seqlens, max_seqlen=130, scale=scale)
        naive = partial(naive_attention, cu_seqlens=cu_seqlens, scale=scale)
        assert_op_accurate(attention, naive, {"qkv": qkv}, dtype)


def dropped_linear(dropout_p):
    """The factors, 0 or 1 / (1 - p), that add_layer_norm multiplies x with under the seed at hand."""
    return lambda rows, width: (
        (
            ops.add_layer_norm(
                torch.ones(rows, width), None, torch.ones(width), torch.zeros(width), eps=1e-5, dropout_p=dropout_p
            )
            > 0
        ).double()
        / (1 - dropout_p)
    )


def dropped_attention(cu_seqlens, heads, dropout_p, longest):
    """The same for attention's probabilities, (H, T, longest): uniform ones against one column of values a call."""
    tokens, width = int(cu_seqlens[-1]), 16
    factors = torch.zeros(heads, tokens, longest, dtype=torch.float64)
    place = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])
    for first in range(0, longest, width):
        qkv = torch.zeros(tokens, 3, heads, width)
        inside = (place >= first) & (place < first + width)
        qkv[inside, 2] = F.one_hot(place[inside] - first, width).float()[:, None]
        torch.manual_seed(7)
        out = ops.attention(qkv, cu_seqlens, longest, dropout_p=dropout_p)
        count = min(width, longest - first)
        factors[:, :, first : first + count] = (out.transpose(0, 1)[..., :count] > 0).double() / (1 - dropout_p)
    return factors


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm_dropout_is_one_mask_forward_and_backward(isa, dtype):
    rows, width, p = 111, 130, 0.3
    inputs = {
        "x": torch.randn(rows, width),
        "residual": torch.randn(rows, width),
        "weight": torch.randn(width),
        "bias": torch.randn(width),
    }
    torch.manual_seed(7)
    factors = dropped_linear(p)(rows, width)
    assert 0.65 < (factors > 0).double().mean() < 0.75

    def naive(x, residual, weight, bias):
        return F.layer_norm(x * factors.to(x.dtype) + residual, weight.shape, weight, bias, 1e-5)

    torch.manual_seed(7)
    got = gradients(lambda **inputs: ops.add_layer_norm(**inputs, eps=1e-5, dropout_p=p), dtype, inputs)
    eager, exact = gradients(naive, dtype, inputs), gradients(naive, torch.float64, inputs)
    for name, *values in zip(("out", *inputs), got, eager, exact, strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_dropout_is_one_mask_forward_and_backward(isa, dtype):
    cu_seqlens, heads, p = torch.tensor([0, 40, 41, 111]).int(), 2, 0.3
    factors = dropped_attention(cu_seqlens, heads, p, 70)
    inputs = {"qkv": torch.randn(111, 3, heads, 16)}
    torch.manual_seed(7)
    got = gradients(lambda qkv: ops.attention(qkv, cu_seqlens, 70, dropout_p=p), dtype, inputs)
    eager, exact = (
        gradients(lambda qkv: naive_attention(qkv, cu_seqlens, factors=factors), d, inputs)
        for d in (dtype, torch.float64)
    )
    for name, *values in zip(("out", "dqkv"), got, eager, exact, strict=True):
        assert_accurate(*values, name)


_masks = []


def test_masks_are_the_same_on_every_instruction_set(isa):
    torch.manual_seed(7)
    _masks.append((dropped_linear(0.5)(20, 77), dropped_attention(torch.tensor([0, 20]).int(), 3, 0.5, 20)))
    assert all(torch.equal(a, b) for a, b in zip(_masks[0], _masks[-1], strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p):
    """Shares over all, by row and by column, and no correlation of neighbours, of rows far apart, or of calls."""
    rows, width = 2000, 512
    first, second = (dropped_linear(p)(rows, width) > 0 for _ in range(2))
    heads = dropped_attention(torch.tensor([0, 400]).int(), 2, p, 400) > 0
    for kept in (first, second, heads[0], heads[1]):
        kept = kept.double()
        n, deviation = kept.numel(), (p * (1 - p)) ** 0.5
        assert abs(kept.mean() - (1 - p)) < 5 * deviation / n**0.5
        for dim in (0, 1):
            means = kept.mean(dim)
            expected = deviation / kept.shape[dim] ** 0.5
            assert abs(means.std() / expected - 1) < 5 / (2 * len(means)) ** 0.5
        scaled = (kept - (1 - p)) / deviation
        for shift in ((1, 0), (0, 1), (1, 1), (0, 16), (64, 0), (7, -3)):
            assert abs((scaled * scaled.roll(shift, (0, 1))).mean()) < 5 / n**0.5, shift
    for a, b in ((first, second), (heads[0], heads[1])):
        a, b = ((t.double() - (1 - p)) / (p * (1 - p)) ** 0.5 for t in (a, b))
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_dropout_scales_what_stays_and_follows_the_seed():
    x, qkv = torch.randn(30, 64), torch.randn(30, 3, 2, 8)
    cu_seqlens, ones, zeros = torch.tensor([0, 30]).int(), torch.ones(64), torch.zeros(64)
    calls = (
        lambda: ops.add_layer_norm(x, x, ones, zeros, eps=1e-5, dropout_p=0.25),
        lambda: ops.attention(qkv, cu_seqlens, 30, dropout_p=0.25),
    )
    for call in calls:
        torch.manual_seed(3)
        a, b = call(), call()
        torch.manual_seed(3)
        assert torch.equal(call(), a) and not torch.equal(a, b)
    qkv[:, 2] = 1.0
    outs = torch.stack([ops.attention(qkv, cu_seqlens, 30, dropout_p=0.25) for _ in range(200)])
    assert abs(outs.mean() - 1) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(isa, dtype):
    x, residual = (torch.randn(300, 64).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = torch.randn(192, 64).to(dtype).requires_grad_(), torch.randn(192).to(dtype).requires_grad_()
    vector = torch.ones(64, dtype=dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, 100, 101, 300]).int()

    def run(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        y = ops.linear(x, weight, bias, activation="gelu").unflatten(1, (3, 4, 16))
        y = ops.attention(y, cu_seqlens, 199, dropout_p=0.1).flatten(1)
        y = ops.add_layer_norm(y, residual, vector, vector, eps=1e-5, dropout_p=0.1)
        return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), (x, residual, weight, bias, vector))]

    one, two, three = run(1), run(2), run(3)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_gradients(isa, dtype):
    """Slices and expanded gradients give the bits that their copies give."""
    cu_seqlens = torch.tensor([0, 4, 9]).int()
    ones = torch.ones(20, dtype=dtype)
    calls = {
        "linear": (lambda x: ops.linear(x, x.detach()[:7] * 1, None, activation="silu"), torch.randn(9, 60)),
        "odd linear": (lambda x: ops.linear(x, x.detach()[:7] * 1), torch.randn(9, 60)),
        "norm": (lambda x: ops.add_layer_norm(x, x.flip(0), ones, ones, eps=1e-5), torch.randn(9, 60)),
        "attention": (
            lambda x: ops.attention(x.unflatten(1, (1, 2, 10)).expand(9, 3, 2, 10), cu_seqlens, 5),
            torch.randn(9, 60),
        ),
    }
    for name, (call, wide) in calls.items():
        wide = wide.to(dtype)
        results = []
        for copy in (False, True):
            leaf = wide.clone().requires_grad_()
            x = leaf[:, 20:40]
            out = call(x.contiguous() if copy else x)
            dy = torch.tensor(0.5, dtype=dtype).expand(out.shape)
            results.append((out, *torch.autograd.grad(out, leaf, dy.contiguous() if copy else dy)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


@pytest.fixture
def called(monkeypatch):
    """The names of the extension's functions, as they are called."""
    names, real = [], extension.C

    class Spy:
        def __getattr__(self, name):
            value = getattr(real, name)
            if callable(value) and name.endswith("_cpu"):
                names.append(name)
            return value

    for module in (linear_bwd, packed_weights):
        monkeypatch.setattr(module, "C", Spy())
    return names


def test_nothing_is_done_for_what_needs_no_gradient(called):
    x, weight, bias = torch.randn(5, 8), torch.randn(4, 8), torch.randn(4)
    norm = torch.ones(8)

    owner = ops.Weight([weight], [bias])

    def run(call, *wanted, owned=False):
        leaves = [t.requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
        out = call(x, owner) if owned else call(*leaves)
        called.clear()
        out.sum().backward()
        assert [t.grad is not None for t in leaves] == list(wanted)
        for t in leaves:
            t.grad = None
        return set(called)

    for owned in (False, True):
        assert run(ops.linear, True, False, False, owned=owned) == {"pack_transposed_cpu", "linear_bwd_cpu"}
    assert run(ops.linear, True, False, False, owned=True) == {"linear_bwd_cpu"}, "packed again"
    assert run(ops.linear, False, True, False) == run(ops.linear, False, False, True) == {"linear_bwd_cpu"}
    for wanted in ((True, False, False), (False, True, False), (False, True, True)):
        expected = gradients(
            lambda x, residual, w: reference.add_layer_norm(x, residual, w, norm.double(), eps=1e-5),
            torch.float64,
            {"x": x, "residual": x, "w": norm},
        )[1:]
        leaves = [t.detach().clone().requires_grad_(w) for t, w in zip((x, x, norm), wanted, strict=True)]
        out = ops.add_layer_norm(*leaves, norm, eps=1e-5)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_transpose_is_the_packed_transpose(isa, dtype):
    code, number = extension.CPU_DTYPES[dtype], extension.chosen_isa()[1]
    for rows, columns in ((2, 1), (66, 33), (130, 100)):
        source = torch.randn(rows, columns + 2).to(dtype)[:, 1:-1]
        turned = source.T.contiguous()
        size = extension.C.packed_weight_bytes(code, 0, columns, rows, number)
        got, expected = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        extension.C.pack_transposed_cpu(
            *(code, columns, rows, source.data_ptr(), rows, source.stride(0), got.data_ptr(), 0, rows, number, 1)
        )
        extension.C.pack_weight_cpu(
            *(code, 0, columns, rows, turned.data_ptr(), rows, 0, expected.data_ptr(), number, 1)
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [(64, 64, 64), (96, 30, 6), (33, 7, 20)], ids=str)
def test_row_blocks_are_transposed_as_their_concatenation(isa, blocks, dtype):
    weights = [torch.randn(rows, 50).to(dtype) for rows in blocks]
    inner = sum(blocks) + sum(blocks) % 2
    several = packed_weights.packed_transpose(ops.Weight(weights, [None] * 3), inner)
    one = packed_weights.packed_transpose(ops.Weight([torch.cat(weights)], [None]), inner)
    assert torch.equal(several, one)


def test_the_packed_transpose_is_a_form_of_the_weight():
    parameter = torch.nn.Parameter(torch.randn(40, 64))
    x, weight = torch.randn(3, 64, requires_grad=True), ops.Weight([parameter], [None])
    for _ in range(2):
        (dx,) = torch.autograd.grad(ops.linear(x, weight).sum(), x)
        torch.testing.assert_close(dx, parameter.detach().sum(0).expand(3, 64))
    assert len(weight.forms) == 2
    assert weight.nbytes() >= 2 * parameter.nbytes


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(reentrant):
    x, weight = torch.randn(40, 48, requires_grad=True), torch.randn(48, 16, requires_grad=True)
    cu_seqlens, ones = torch.tensor([0, 15, 40]).int(), torch.ones(16)

    def layer(x):
        y = ops.attention(x.unflatten(1, (3, 2, 8)), cu_seqlens, 25, dropout_p=0.4).flatten(1)
        y = ops.add_layer_norm(y, None, ones, ones, eps=1e-5, dropout_p=0.4)
        return ops.linear(y, weight, activation="gelu")

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    results = []
    for run in (layer, checkpointed):
        torch.manual_seed(5)
        x.grad = weight.grad = None
        run(x).square().sum().backward()
        results.append((x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_transforms_of_functions_are_left_to_the_reference():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with fastbert.use_backend("auto"):
        got = torch.func.grad(lambda w: ops.linear(x, w, activation="gelu").sum())(weight)
    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ops.linear(x, leaf, activation="gelu").sum(), leaf)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_compiled_training_is_left_to_the_compiler():
    x, vector = torch.randn(6, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def call(x):
        return ops.add_layer_norm(x, x, vector, vector, eps=1e-5)

    dy = torch.randn(6, 16)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(x), (x, vector), dy) for f in (compiled, call))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_call_in_the_middle_of_another_one_has_memory_of_its_own(monkeypatch):
    """As a signal's handler makes it: within linear's backward, whose chunks share a workspace."""
    real, middle = linear_bwd.C, []

    def backward(rows):
        x, weight, dy = torch.randn(rows, 48), torch.randn(64, 48), torch.randn(rows, 64)
        return lambda: native.linear_bwd(dy, x, weight, None, None)

    def interrupted(*args):
        if not middle:
            middle.append(None)
            middle[0] = other()
        return real.linear_bwd_cpu(*args)

    call, other = backward(100), backward(90)
    expected, expected_other = call(), other()
    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    monkeypatch.setattr(linear_bwd, "C", SimpleNamespace(**{**names, "linear_bwd_cpu": interrupted}))
    for got, wanted in ((call(), expected), (middle[0], expected_other)):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_offsets_must_end_at_the_last_token():
    qkv = torch.randn(4, 3, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"cu_seqlens\[1\] is 3; offsets must rise from 0 to the number of tokens, 4"):
        ops.attention(qkv, torch.tensor([0, 3]).int(), 3)


def test_autocast_runs_the_kernels_in_its_dtype():
    """As torch casts: products in bf16, norms in fp32; gradients in the parameters' dtype."""
    inputs = linear_inputs(30, 48, 48) | {"vector": torch.ones(48)}
    cu_seqlens = torch.tensor([0, 10, 30]).int()

    def run(x, weight, bias, vector):
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            y = ops.linear(x, weight, bias, activation="gelu")
            products = y.dtype
            y = ops.attention(y.unflatten(1, (3, 2, 8)), cu_seqlens, 20).flatten(1)
            y = ops.linear(y.repeat(1, 3), weight, bias)
            y = ops.add_layer_norm(y, x, vector, vector, eps=1e-5)
        assert (products, y.dtype) in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64))
        return y

    got = gradients(run, torch.float32, inputs)
    with fastbert.use_backend("reference"):
        eager, exact = gradients(run, torch.float32, inputs), gradients(run, torch.float64, inputs)
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()
