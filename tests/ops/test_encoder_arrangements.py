"""The C++ encoder of other layers than BERT's: norms before, gates, rotary positions, windows, grouped heads."""

import pytest
import torch
from support import assert_accurate
from test_encoder_native import LENGTHS, inputs, two_threads_and_poison

from fastbert import native, ops

assert two_threads_and_poison  # a fixture for all tests here
ARRANGEMENTS = {
    "modernbert": {"gated": True, "pre_norm": True, "window": 9, "rotary": True, "biases": False},
    "nomic": {"gated": True, "rotary": True},
    "eurobert": {"gated": True, "pre_norm": True, "rms": True, "rotary": True, "key_heads": 2, "biases": False},
    "jina": {"rotary": True},
    "pre-norm": {"pre_norm": True},
}


def arranged(width, inner, heads, dtype, *, biases=True, precision=None, activation="gelu", count=3, **kind):
    torch.manual_seed(width)
    head, gated, rms = width // heads, kind.get("gated"), kind.get("rms")
    keys = kind.pop("key_heads", heads)
    rotary = torch.randn(300, head) if kind.pop("rotary", False) else None
    window = kind.pop("window", None)

    def product(rows, columns):
        bias = (0.1 * torch.randn(rows)).to(dtype) if biases else None
        return ops.Weight([(torch.randn(rows, columns) / columns**0.5).to(dtype)], [bias])

    def norm():
        weight = (1 + 0.1 * torch.randn(width)).to(dtype)
        return weight, None if rms or not biases else (0.1 * torch.randn(width)).to(dtype)

    layers = [
        ops.LayerWeights(
            *(product((heads + 2 * keys) * head, width), product(width, width)),
            None if kind.get("pre_norm") and i == 0 else norm(),  # as ModernBERT's first
            *(product(2 * inner if gated else inner, width), product(width, inner), norm()),
            num_heads=heads,
            activation=activation,
            eps=1e-5,
            precision=precision,
            key_heads=keys,
            rotary=rotary,
            window=window if i else None,
            **kind,
        )
        for i in range(count)
    ]
    return ops.EncoderWeights(layers, norm() if kind.get("pre_norm") else None)


def cast(weights, dtype):
    def to(part):
        if isinstance(part, ops.Weight):
            return ops.Weight(to(part.weights), to(part.biases) or (None,) * len(part.weights))
        if isinstance(part, tuple):
            return tuple(map(to, part))
        return part.to(dtype) if torch.is_tensor(part) else part

    return ops.EncoderWeights([ops.LayerWeights(*map(to, w)) for w in weights.layers], to(weights.final_norm))


def of(weights, x, cu_seqlens, longest, backend="native", **options):
    lengths = cu_seqlens.diff().long()
    positions = torch.arange(len(x)) - cu_seqlens[:-1].long().repeat_interleave(lengths) + 5
    if backend == "native":
        assert native.supports_encoder(x, weights, cu_seqlens, longest, positions=positions) is None
        return native.encoder(x, weights, cu_seqlens, longest, positions=positions, **options)
    return _by_reference(x, weights, cu_seqlens, longest, positions)


def _by_reference(x, weights, *rest):
    from fastbert import use_backend

    with use_backend("reference"):
        return ops.encoder(x, weights, *rest[:2], positions=rest[2])


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "inner"), [(64, 144), (48, 50)])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_accuracy(isa, name, width, inner, dtype, kind):
    weights, given = arranged(width, inner, 4, dtype, **ARRANGEMENTS[name]), inputs(kind, width, dtype)
    exact = of(cast(weights, torch.float64), given[0].double(), *given[1:], backend="reference")
    slack = (1e-6, 1e-6) if dtype == torch.float32 else (0.0, 0.0)
    got = of(weights, *given)
    assert_accurate(got, of(weights, *given, backend="reference"), exact, name, slack)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, None), (torch.float32, "int8"), (torch.float32, "high"), (torch.bfloat16, "int8")],
)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_same_bits_as_the_ops_it_is_made_of(isa, name, dtype, precision, kind):
    """In any precision, with any number of threads, and the input is left as it was."""
    weights = arranged(64, 200, 4, dtype, precision=precision, activation="silu", **ARRANGEMENTS[name])
    given = inputs(kind, 64, dtype)
    before = given[0].clone()
    from fastbert.ops.encoder import _layers

    lengths = given[1].diff().long()
    positions = torch.arange(len(before)) - given[1][:-1].long().repeat_interleave(lengths) + 5
    with torch.no_grad():
        expected = _layers(given[0], weights, *given[1:], None, positions, None)
    some = torch.tensor([3, 0, 3, len(before) - 1])
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(of(weights, *given), expected), threads
        assert torch.equal(of(weights, *given, picked=some), expected[some]), threads
    assert torch.equal(given[0], before)
    with torch.no_grad():
        torch.testing.assert_close(_layers(given[0], weights, *given[1:], None, positions, some), expected[some])


def test_a_row_does_not_depend_on_its_batch_mates():
    weights = arranged(64, 128, 4, torch.float32, **ARRANGEMENTS["modernbert"])
    x, cu_seqlens, longest = inputs("in blocks", 64, torch.float32)
    together = of(weights, x, cu_seqlens, longest)
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = of(weights, x[first:end], torch.tensor([0, end - first]).int(), end - first)
        assert torch.equal(alone, together[first:end])


def test_positions_beyond_the_table_are_named():
    weights = arranged(64, 128, 4, torch.float32, **ARRANGEMENTS["jina"])
    x, cu_seqlens, longest = inputs("op by op", 64, torch.float32)
    with pytest.raises(ValueError, match="positions holds 300; the rotary table has 300 rows"):
        ops.encoder(x, weights, cu_seqlens, longest, positions=torch.full((len(x),), 300))
    assert torch.equal(ops.encoder(x, weights, cu_seqlens, longest), ops.encoder(x, weights, cu_seqlens, longest))
