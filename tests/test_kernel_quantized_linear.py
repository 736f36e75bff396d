"""int8 and fp8 linear by Triton: the reference's integers, its sums, and what is kept of a weight and for how long."""

import pytest
import torch

pytest.importorskip("triton")

from triton_support import (
    ALL_DTYPES,
    DEVICE,
    DTYPES,
    INTERPRETED,
    TARGETS,
    check_resources,
    compiles,
    compiling_for,
    in_the_interpreter,
    nan_filled,  # noqa: F401
    run_in_the_interpreter,
    runs,
)

from fastbert import precision, reference
from fastbert.kernels import architecture, configs
from fastbert.kernels.linear_quantized import linear_quantized_fwd
from fastbert.kernels.quantize import quantize_rows_fwd
from fastbert.ops import Weight, _quantized_linear


def run(x, weight, bias, *rest):
    return _quantized_linear.run(x, Weight([weight], [bias]), *rest)


QUANTIZERS = {"int8": lambda x: reference.quantize_rows(reference.rotate(x)), "fp8": reference.quantize_rows_fp8}
needs_fp8 = pytest.mark.skipif(
    not INTERPRETED and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)),
    reason="no fp8 before compute capability 8.9",
)
# The rest of the columns' tiles, a tile and more, no bias, a wide row, and no row at all.
SHAPES = [(1, 128, 7), (5, 384, 40), (33, 133, 70), (3, 1, 1), (2, 63, 65), (0, 128, 8)]

pytestmark = pytest.mark.usefixtures("nan_filled")


@in_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def assert_same_fp8(got, expected):
    """Equal; but triton 3.7's interpreter forgets the carry into the exponent, and rounds ties and subnormals off."""
    got, bits = got.float(), expected.view(torch.uint8)
    if INTERPRETED:
        settled = (bits & 0x7F == 0) | ((bits & 0x78 > 0) & (bits & 7 > 0))
        got, expected = got[settled], expected.float()[settled]
        assert len(got) > len(bits.flatten()) / 2 and (got == expected).float().mean() > 0.98
        torch.testing.assert_close(got, expected, rtol=0.125, atol=0)
    else:
        assert torch.equal(got, expected.float())


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=needs_fp8)])
@pytest.mark.parametrize("columns", [1, 63, 128, 133, 384, 1100])
def test_rows_are_the_references(columns, kind, dtype):
    x = random(7, columns, dtype=dtype)
    x[2] = 0
    x[3] *= 1e-3
    x[4, columns // 2] = 300.0
    before = x.clone()
    got, scale = quantize_rows_fwd(x, kind)
    expected, expected_scale = QUANTIZERS[kind](x)
    assert got.shape == (7, -(-columns // 128) * 128) and got.dtype == expected.dtype
    assert not got[:, columns:].float().any()
    assert torch.equal(scale, expected_scale[:, 0])
    if kind == "int8":
        assert torch.equal(got[:, :columns], expected)
    else:
        assert_same_fp8(got[:, :columns], expected)
    assert torch.equal(x, before)
    assert torch.equal(quantize_rows_fwd(x[5:6], kind)[0], got[5:6])


@runs
@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=needs_fp8)])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_rows_that_are_not_finite(value, kind):
    x = random(3, 200)
    x[1, 7] = value
    _, scale = quantize_rows_fwd(x, kind)
    assert scale[0].isfinite() and not scale[1].isfinite() and scale[2].isfinite()


@runs
def test_rows_of_almost_nothing():
    x = torch.tensor([[1e-45, 0, 0, -1e-45], [1e-43, 3e-44, 0, 0]], device=DEVICE)
    got, scale = quantize_rows_fwd(x, "int8")
    expected, expected_scale = reference.quantize_rows(x)
    assert torch.equal(got[:, :4], expected) and torch.equal(scale, expected_scale[:, 0])


@runs
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
def test_int8_is_the_reference(activation):
    for M, K, N in SHAPES if activation in (None, "gelu") else SHAPES[1:2]:
        x, weight, bias = random(M, K), random(N, K), random(N) if N != 7 else None
        got = run(x, weight, bias, activation, "int8")
        expected = reference.linear_int8(x, weight, bias, activation=activation)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, s=(M, K, N): f"{s}: {m}")
        assert torch.equal(run(x, weight, bias, activation, "int8"), got)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
@needs_fp8
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_fp8_is_the_reference(activation):
    for M, K, N in SHAPES:
        x, weight, bias = random(M, K), random(N, K), random(N) if N != 7 else None
        (a, a_scale), (b, b_scale) = map(reference.quantize_rows_fp8, (x, weight))
        pad = lambda t, K=K: torch.nn.functional.pad(t.view(torch.uint8), (0, -K % 128)).view(t.dtype)  # noqa: E731
        got = linear_quantized_fwd(pad(a), a_scale[:, 0], pad(b), b_scale[:, 0], bias, activation, x.dtype)
        expected = reference.linear_fp8(x, weight, bias, activation=activation)
        # On Hopper sums have 14 bits after the first: module docstring of linear_quantized.
        tolerance = 1e-5 if INTERPRETED else 2e-3 * max(K, 1) ** 0.5
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance, msg=lambda m, s=(M, K, N): f"{s}: {m}")


@runs
@needs_fp8
@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds to fp8 wrongly")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_from_end_to_end(dtype):
    x, weight, bias = random(300, 1024, dtype=dtype), random(513, 1024, dtype=dtype), random(513, dtype=dtype)
    got = run(x, weight, bias, "gelu", "fp8").double()
    expected = reference.linear_fp8(x, weight, bias, activation="gelu").double()
    assert (got - expected).norm() <= 0.01 * expected.norm()


@runs
@needs_fp8
@pytest.mark.skipif(INTERPRETED, reason="products that fill a GPU take the interpreter minutes")
@pytest.mark.parametrize("kind", precision.QUANTIZED)
@pytest.mark.parametrize("number", range(len(configs.linear_tiles("sm_90", 2))))
def test_the_gpus_own_tiles(number, kind):
    """Each that this GPU has, over more of them than run at once, and a rest of rows and columns."""
    tiles = configs.linear_tiles(architecture.architecture(torch.device(DEVICE)), 2)
    if number < len(tiles):
        (a, a_scale), (b, b_scale) = (quantize_rows_fwd(random(rows, 768), kind) for rows in (1111, 2056))
        got = linear_quantized_fwd(a, a_scale, b, b_scale, None, None, torch.float32, tile=tiles[number]).double()
        expected = (a.double() * a_scale[:, None].double()) @ (b.double() * b_scale[:, None].double()).mT
        assert (got - expected).norm() <= (1e-6 if kind == "int8" else 1e-3) * expected.norm()


@runs
def test_a_row_does_not_depend_on_its_neighbours_and_strides_do_not_matter():
    wide, weight, bias = random(40, 512), random(50, 512)[:, ::2], random(100)[::2]
    x = wide[:, :256]
    whole = run(x, weight, bias, "gelu", "int8")
    assert torch.equal(run(x[7:8], weight, bias, "gelu", "int8"), whole[7:8])
    compact = _quantized_linear.run(x.contiguous(), weight.contiguous(), bias.contiguous(), "gelu", "int8")
    assert torch.equal(whole, compact)
    assert torch.equal(run(x.T.contiguous().T, weight, bias, "gelu", "int8"), whole)


@runs
def test_a_weight_is_quantized_once():
    weight, x = Weight([random(8, 128)], [None]), random(3, 128)
    _quantized_linear.run(x, weight, None, "int8")
    (made,) = weight.forms.values()
    _quantized_linear.run(x, weight, None, "int8")
    assert list(weight.forms.values()) == [made] and weight.nbytes() == 8 * 128 + 8 * 4


def test_reasons():
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    for kind in precision.QUANTIZED:
        assert _quantized_linear.supports(x, Weight([weight], [None]), kind) == "it runs on a GPU, not on cpu"


@pytest.mark.parametrize(
    ("kind", "capability", "reason"),
    [
        ("int8", (7, 5), "of compute capability 7.5; it needs 8.0"),
        ("int8", (8, 0), None),
        ("fp8", (8, 6), "of compute capability 8.6; it needs 8.9"),
        ("fp8", (8, 9), None),
        ("fp8", (9, 0), None),
        ("int8", "hip", None),
        ("fp8", "hip", "an AMD GPU; fp8 is NVIDIA's float8_e4m3fn, and int8 runs"),
    ],
)
def test_what_a_gpu_lacks(kind, capability, reason, monkeypatch):
    precision.quantized_reason.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0" if capability == "hip" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.quantized_reason(kind, torch.device("cuda")) == reason
    if reason is None:
        precision.check_precision(kind, torch.float32, "cuda")
    else:
        with pytest.raises(ValueError, match=f"quantize is '{kind}' and cuda is {reason}"):
            precision.check_precision(kind, torch.float32, "cuda")
    precision.quantized_reason.cache_clear()


def kinds_of(target):
    return ("int8", "fp8") if target == "sm_90" else ("int8",)


@compiles
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_quantize_compiles(target, dtype):
    for kind in kinds_of(target):
        for columns in (130, 768, 4096):
            with compiling_for(target) as compiled:
                quantize_rows_fwd(torch.zeros(3, columns, dtype=dtype), kind)
            check_resources(compiled[0])
            if target == "sm_90" and columns == 4096:
                assert "ld.global.v" in compiled[0].assembly
                assert ("cvt.rn.satfinite.e4m3x2.f32" in compiled[0].assembly) == (kind == "fp8")


def operands(kind, M=300, N=1024, K=1024):
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return torch.zeros(M, K, dtype=dtype), torch.ones(M), torch.zeros(N, K, dtype=dtype), torch.ones(N)


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_compiles(target):
    for kind in kinds_of(target):
        for tile in configs.linear_tiles(target, 2):
            with compiling_for(target) as compiled:
                bias = torch.zeros(1024, dtype=torch.bfloat16)
                linear_quantized_fwd(*operands(kind), bias, "gelu", torch.bfloat16, tile=tile)
            check_resources(compiled[0])
            if target == "sm_90" and tile.block_m >= 64:
                assert ("e4m3.e4m3" if kind == "fp8" else ".s32.s8.s8") in compiled[0].assembly
                assert "wgmma" in compiled[0].assembly and "cp.async.bulk.tensor" in compiled[0].assembly


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_for_other_outputs(dtype):
    for target in TARGETS:
        with compiling_for(target) as compiled:
            linear_quantized_fwd(*operands("int8"), torch.zeros(1024, dtype=dtype), "gelu", dtype)
            linear_quantized_fwd(*operands("int8", N=1023), None, None, dtype)  # y that no descriptor can tell of
        for kernel in compiled:
            check_resources(kernel)
