"""The C++ encoder: every instruction set this machine has, in blocks of rows and op by op, in every precision."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import assert_accurate, require_native

from fastbert import native, ops, reference, use_backend
from fastbert.engine import memory
from fastbert.native import extension

LENGTHS = {"op by op": [5, 0, 1, 33], "in blocks": [130, 1, 77, 0, 200, 64]}


def make_layers(width, inner, heads, dtype, precision=None, count=2, activation="gelu"):
    def product(rows, columns):
        return ops.Weight([(torch.randn(rows, columns) / columns**0.5).to(dtype)], [vector(rows)])

    def vector(size, mean=0.0):
        return (mean + 0.1 * torch.randn(size)).to(dtype)

    return [
        ops.LayerWeights(
            *(product(3 * width, width), product(width, width), (vector(width, 1.0), vector(width))),
            *(product(inner, width), product(width, inner), (vector(width, 1.0), vector(width))),
            num_heads=heads,
            activation=activation,
            eps=1e-12,
            precision=precision,
        )
        for _ in range(count)
    ]


def cast(layers, dtype):
    def to(part):
        if isinstance(part, ops.Weight):
            return ops.Weight(to(part.weights), to(part.biases))
        if isinstance(part, tuple):
            return tuple(map(to, part))
        return part.to(dtype) if torch.is_tensor(part) else part

    return [ops.LayerWeights(*map(to, w)) for w in layers]


def run(x, layers, cu_seqlens, longest, **options):
    """The C++ encoder of layers that no plan owns: packed for this call."""
    return native.encoder(x, ops.EncoderWeights(layers), cu_seqlens, longest, **options)


def inputs(kind, width, dtype):
    lengths = torch.tensor(LENGTHS[kind])
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    return torch.randn(int(cu_seqlens[-1]), width).to(dtype), cu_seqlens, int(lengths.max())


@pytest.fixture(autouse=True)
def two_threads_and_poison():
    """Workspaces begin with NaN; two threads, as the tasks of blocks are cut for their number."""
    torch.set_num_threads(2)
    kept = memory.fresh_bytes(8 << 20)
    kept.held.fill(255)
    memory.keep(kept)
    yield
    memory.workspace(0)  # taken, and not kept


def by_reference(x, layers, *rest):
    with use_backend("reference"):
        return ops.encoder(x, ops.EncoderWeights(layers), *rest)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "inner", "heads"), [(64, 144, 2), (48, 50, 4)])
def test_accuracy(isa, width, inner, heads, dtype, kind):
    layers, given = make_layers(width, inner, heads, dtype), inputs(kind, width, dtype)
    exact = by_reference(given[0].double(), cast(layers, torch.float64), *given[1:])
    assert_accurate(run(given[0], layers, *given[1:]), by_reference(given[0], layers, *given[1:]), exact)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, None),
        (torch.float32, "int8"),
        (torch.float32, "high"),
        (torch.float32, "highest"),
        (torch.bfloat16, None),
        (torch.bfloat16, "int8"),
    ],
)
def test_same_bits_as_the_ops_it_is_made_of(isa, dtype, precision, kind):
    """In any precision, with any number of threads, and the input is left as it was."""
    layers = make_layers(64, 200, 2, dtype, precision, activation="gelu_new")
    given = inputs(kind, 64, dtype)
    before = given[0].clone()
    x = given[0]
    for w in layers:
        qkv = native.linear(x, w.qkv, precision=precision).unflatten(1, (3, w.num_heads, -1))
        context = native.attention(qkv, *given[1:]).flatten(1)
        y = native.linear(context, w.out, precision=precision)
        x = native.add_layer_norm(y, x, *w.attention_norm, eps=w.eps)
        y = native.linear(x, w.up, activation=w.activation, precision=precision)
        y = native.linear(y, w.down, precision=precision)
        x = native.add_layer_norm(y, x, *w.norm, eps=w.eps)
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(given[0], layers, *given[1:]), x), threads
    assert torch.equal(given[0], before)
    some = torch.tensor([3, 0, 3, len(x) - 1])
    assert torch.equal(run(given[0], layers[:1], *given[1:], picked=some), run(given[0], layers[:1], *given[1:])[some])


def test_a_row_does_not_depend_on_its_batch_mates():
    require_native()
    layers = make_layers(64, 128, 2, torch.float32, "int8")
    x, cu_seqlens, longest = inputs("in blocks", 64, torch.float32)
    together = run(x, layers, cu_seqlens, longest)
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = run(x[first:end], layers, torch.tensor([0, end - first]).int(), end - first)
        assert torch.equal(alone, together[first:end])


def test_threads_may_run_one_model_at_once():
    """Each Python thread in its own memory; one of them drops the packed weights of another model meanwhile."""
    require_native()
    given = inputs("in blocks", 64, torch.float32)
    weights, other = (ops.EncoderWeights(make_layers(64, 128, 2, torch.float32)) for _ in range(2))
    expected = native.encoder(given[0], weights, *given[1:])

    def call(i):
        if i % 4 == 0:
            other.layers[0].up.forms.clear()
            other.forms.clear()
            native.encoder(given[0], other, *given[1:])
        return torch.equal(native.encoder(given[0], weights, *given[1:]), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


def test_weights_are_packed_once_and_again_when_dropped():
    require_native()
    layers, given = make_layers(64, 128, 2, torch.float32), inputs("op by op", 64, torch.float32)
    weights = ops.EncoderWeights(layers)
    first = native.encoder(given[0], weights, *given[1:])
    packed = dict(layers[1].down.forms)
    layers[1].down.weights[0].mul_(2)
    assert torch.equal(native.encoder(given[0], weights, *given[1:]), first)
    assert all(layers[1].down.forms[key] is form for key, form in packed.items())
    layers[1].down.forms.clear()
    weights.forms.clear()
    second = native.encoder(given[0], weights, *given[1:])
    torch.testing.assert_close(second, by_reference(given[0], layers, *given[1:]), rtol=1e-4, atol=1e-4)
    assert not torch.equal(first, second)


def test_reasons():
    require_native()
    x, cu_seqlens, longest = inputs("op by op", 64, torch.float32)
    layers = make_layers(64, 128, 2, torch.float32)

    def reason(x, layers, offsets=cu_seqlens):
        return native.supports_encoder(x, ops.EncoderWeights(layers), offsets, longest)

    assert reason(x, layers) is None
    assert reason(x, [layers[0], layers[1]._replace(precision="int8")]) == "layers that differ in precision"
    with torch.enable_grad():
        up = layers[0].up
        grown = ops.Weight([up.weights[0].clone().requires_grad_()], up.biases)
        assert "no backward" in reason(x, [layers[0]._replace(up=grown)])
    assert reason(x[:, :6].contiguous(), layers) == "width 6 with 2 heads"
    assert reason(x[:, :6], layers) == "x not contiguous"
    for offsets in (cu_seqlens.long(), cu_seqlens[None], cu_seqlens[:0], cu_seqlens.repeat_interleave(2)[::2]):
        assert reason(x, layers, offsets).startswith("attention: cu_seqlens is no")
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of tokens, 39"):
        run(x, layers, torch.tensor([0, 40]).int(), 40)


def test_numbers_that_would_crash_are_refused():
    require_native()
    with pytest.raises(ValueError, match="no precision of number 9"):
        extension.C.packed_weight_bytes(0, 9, 4, 4, extension.chosen_isa()[1])
    assert reference.ACTIVATIONS.keys() <= {name for name in extension.ACTIVATIONS if name}


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 3], [0, 21], [1, 20], [-1, 20], [0, 30, 20], [0, 20, 3, 20]])
def test_offsets_that_leave_out_tokens_or_lead_out_of_them(offsets):
    """Rows would be read that do not exist, or left as they lie in memory."""
    require_native()
    layers, x = make_layers(64, 144, 2, torch.float32), torch.randn(20, 64)
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of tokens, 20"):
        run(x, layers, torch.tensor(offsets, dtype=torch.int32), 20)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("picked", "message"),
    [
        (torch.tensor([1, 20]), "picked holds 20; there are 20 tokens"),
        (torch.tensor([-1]), "picked holds -1; there are 20"),
        (torch.zeros(21).long(), "picked has 21 tokens; there are 20"),
        (torch.tensor([1, 2]).int(), "picked is torch.int32 on cpu; it must be int64 on cpu"),
        (torch.tensor([[1, 2]]), r"picked has shape \(1, 2\)"),
    ],
)
def test_picked_tokens_that_are_not_there(picked, message, backend):
    require_native()
    weights = ops.EncoderWeights(make_layers(64, 144, 2, torch.float32))
    with use_backend(backend), pytest.raises(ValueError, match=message):
        ops.encoder(torch.randn(20, 64), weights, torch.tensor([0, 20]).int(), 20, picked=picked)


def test_the_native_part_checks_them_too():
    require_native()
    layers, x = make_layers(64, 144, 2, torch.float32), torch.randn(20, 64)
    for picked, message in (([20], "picked holds 20; there are 20"), ([0] * 21, "more tokens are picked")):
        with pytest.raises(ValueError, match=message):
            run(x, layers, torch.tensor([0, 20]).int(), 20, picked=torch.tensor(picked))


def test_picked_tokens_may_be_strided_and_layers_the_same_object():
    require_native()
    weights = ops.EncoderWeights(make_layers(64, 144, 2, torch.float32)[:1] * 2)
    given = torch.randn(20, 64), weights, torch.tensor([0, 20]).int(), 20
    for picked in (torch.arange(20)[::3], torch.tensor([3]).expand(4)):
        for backend in ("native", "reference"):
            with use_backend(backend):
                found, states = ops.encoder(*given, picked=picked), ops.encoder(*given)
            torch.testing.assert_close(found, states[picked], rtol=1e-5, atol=1e-5)


def test_no_token():
    require_native()
    layers = make_layers(64, 144, 2, torch.float32)
    for offsets in ([0], [0, 0, 0]):
        assert run(torch.empty(0, 64), layers, torch.tensor(offsets).int(), 0).shape == (0, 64)
