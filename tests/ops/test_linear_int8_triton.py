"""int8 linear by Triton: the reference's integers, its sums, and what is kept of a weight and for how long."""

import pytest
import torch

pytest.importorskip("triton")

from triton_support import (
    ALL_DTYPES,
    COMPILED,
    DEVICE,
    INTERPRETED,
    RUN_DTYPES,
    TARGETS,
    check_resources,
    compiles,
    compiling_for,
    nan_filled,  # noqa: F401
    runs,
)

from fastbert import precision, reference
from fastbert.kernels import architecture, configs
from fastbert.kernels.linear import linear_quantized_fwd
from fastbert.kernels.quantize import quantize_rows_fwd
from fastbert.ops import _quantized_linear
from fastbert.weight import Weight, as_weight

# The rest of the columns' tiles, a tile and more, no bias, a wide row, and no row at all.
SHAPES = [(1, 128, 7), (5, 384, 40), (33, 133, 70), (3, 1, 1), (2, 63, 65), (0, 128, 8)]

pytestmark = pytest.mark.usefixtures("nan_filled")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def linear_int8(x, weight, bias, activation):
    return _quantized_linear.run(x, as_weight(weight, bias), activation)


@runs
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 63, 128, 133, 384, 1100])
def test_rows_are_the_references(columns, dtype):
    x = random(7, columns, dtype=dtype)
    x[2] = 0
    x[3] *= 1e-3
    x[4, columns // 2] = 300.0
    before = x.clone()
    got, scale = quantize_rows_fwd(x)
    expected, expected_scale = reference.quantize_rows(reference.rotate(x))
    assert got.shape == (7, -(-columns // 128) * 128) and got.dtype == expected.dtype
    assert not got[:, columns:].any()
    assert torch.equal(scale, expected_scale[:, 0])
    assert torch.equal(got[:, :columns], expected)
    assert torch.equal(x, before)
    assert torch.equal(quantize_rows_fwd(x[5:6])[0], got[5:6])


@runs
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_rows_that_are_not_finite(value):
    x = random(3, 200)
    x[1, 7] = value
    _, scale = quantize_rows_fwd(x)
    assert scale[0].isfinite() and not scale[1].isfinite() and scale[2].isfinite()


@runs
def test_rows_of_almost_nothing():
    x = torch.tensor([[1e-45, 0, 0, -1e-45], [1e-43, 3e-44, 0, 0]], device=DEVICE)
    got, scale = quantize_rows_fwd(x)
    expected, expected_scale = reference.quantize_rows(x)
    assert torch.equal(got[:, :4], expected) and torch.equal(scale, expected_scale[:, 0])


@runs
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
def test_int8_is_the_reference(activation):
    for M, K, N in SHAPES if activation in (None, "gelu") else SHAPES[1:2]:
        x, weight, bias = random(M, K), random(N, K), random(N) if N != 7 else None
        kept = as_weight(weight, bias)  # quantised once, which takes the interpreter longer than the product
        got = _quantized_linear.run(x, kept, activation)
        expected = reference.linear_int8(x, weight, bias, activation=activation)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, s=(M, K, N): f"{s}: {m}")
        assert torch.equal(_quantized_linear.run(x, kept, activation), got)


@runs
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
def test_int8_sums_are_exact(dtype):
    """The largest integers over the columns of a BERT-large's down projection: beyond what fp32 can add."""
    a = torch.full((3, 4096), 127, dtype=torch.int8, device=DEVICE)
    a[:, ::5] = -126
    b = torch.randint(100, 128, (33, 4096), device=DEVICE).to(torch.int8)
    one = torch.ones(33, device=DEVICE)
    got = linear_quantized_fwd(a, one[:3] / 2**12, b, one, None, None, dtype)
    exact = a.long().cpu() @ b.long().cpu().mT
    assert exact.abs().max() > 2**24
    assert torch.equal(got.cpu(), (exact.float() / 2**12).to(dtype))


@runs
@pytest.mark.skipif(INTERPRETED, reason="products that fill a GPU take the interpreter minutes")
@pytest.mark.parametrize("number", range(len(configs.linear_tiles("sm_90"))))
def test_the_gpus_own_tiles(number):
    """Each that this GPU has, over more of them than run at once, and a rest of rows and columns."""
    tiles = configs.linear_tiles(architecture.architecture(torch.device(DEVICE)))
    if number < len(tiles):
        (a, a_scale), (b, b_scale) = (quantize_rows_fwd(random(rows, 768)) for rows in (1111, 2056))
        got = linear_quantized_fwd(a, a_scale, b, b_scale, None, None, torch.float32, tile=tiles[number]).double()
        expected = (a.double() * a_scale[:, None].double()) @ (b.double() * b_scale[:, None].double()).mT
        assert (got - expected).norm() <= 1e-6 * expected.norm()


@runs
def test_a_row_does_not_depend_on_its_neighbours_and_strides_do_not_matter():
    wide, weight, bias = random(40, 512), random(50, 512)[:, ::2], random(100)[::2]
    x = wide[:, :256]
    kept = as_weight(weight, bias)
    whole = _quantized_linear.run(x, kept, "gelu")
    assert torch.equal(_quantized_linear.run(x[7:8], kept, "gelu"), whole[7:8])
    compact = linear_int8(x.contiguous(), weight.contiguous(), bias.contiguous(), "gelu")
    assert torch.equal(whole, compact)
    assert torch.equal(_quantized_linear.run(x.T.contiguous().T, kept, "gelu"), whole)


@runs
def test_a_weight_is_quantized_once_as_a_form_of_its_owner():
    weights = Weight([random(8, 128), random(4, 128)], [None, None])
    x = random(3, 128)
    with torch.no_grad():
        y = _quantized_linear.run(x, weights, None)
        (made,) = weights.forms.values()
        assert weights.nbytes() == 12 * 128 + 12 * 4
        assert torch.equal(_quantized_linear.run(x, weights, None), y)
        assert list(weights.forms.values()) == [made]
    assert torch.equal(y, linear_int8(x, torch.cat(weights.weights), None, None))


def test_reasons():
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    assert _quantized_linear.supports(x, as_weight(weight, None)) == "it runs on a GPU, not on cpu"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "of compute capability 7.5; it needs 8.0"), ((8, 0), None), ((9, 0), None), ("hip", None)],
)
def test_what_a_gpu_lacks(capability, reason, monkeypatch):
    precision.quantized_reason.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0" if capability == "hip" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.quantized_reason(torch.device("cuda")) == reason
    if reason is None:
        precision.check_precision("int8", torch.float32, "cuda")
    else:
        with pytest.raises(ValueError, match=f"quantize is 'int8' and cuda is {reason}"):
            precision.check_precision("int8", torch.float32, "cuda")
    precision.quantized_reason.cache_clear()


@compiles
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_quantize_compiles(target, dtype):
    for columns in (130, 768, 4096):
        with compiling_for(target) as compiled:
            quantize_rows_fwd(torch.zeros(3, columns, dtype=dtype))
        check_resources(compiled[0])
        if target == "sm_90" and columns == 4096:
            assert "ld.global.v" in compiled[0].assembly


def operands(M=300, N=1024, K=1024):
    a, b = torch.zeros(M, K, dtype=torch.int8), torch.zeros(N, K, dtype=torch.int8)
    return a, torch.ones(M), b, torch.ones(N)


@compiles
@pytest.mark.parametrize("target", COMPILED)
def test_every_tile_compiles(target):
    for tile in configs.linear_tiles(target):
        with compiling_for(target) as compiled:
            bias = torch.zeros(1024, dtype=torch.bfloat16)
            linear_quantized_fwd(*operands(), bias, "gelu", torch.bfloat16, tile=tile)
        check_resources(compiled[0])
        if target == "sm_90" and tile.block_m >= 64:
            for instruction in (".s32.s8.s8", "wgmma", "cp.async.bulk.tensor"):
                assert instruction in compiled[0].assembly


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_for_other_outputs(dtype):
    for target in TARGETS:
        with compiling_for(target) as compiled:
            linear_quantized_fwd(*operands(), torch.zeros(1024, dtype=dtype), "gelu", dtype)
            linear_quantized_fwd(*operands(N=1023), None, None, dtype)  # y that no descriptor can tell of
        for kernel in compiled:
            check_resources(kernel)
