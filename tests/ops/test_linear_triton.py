"""linear in Triton: the product with its activation, the activation and bias gradient next to cuBLAS, and the table.

A row's result may depend on its batch mates' number within the accuracy contract: other tiles add up K otherwise.
With as many of them, whatever they hold, it has the same bits.
"""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import tune_linear
from support import assert_accurate, assert_op_accurate
from triton_support import (
    ALL_DTYPES,
    COMPILED,
    DEVICE,
    DTYPES,
    INTERPRETED,
    TARGETS,
    check_resources,
    compiles,
    compiling_for,
    nan_filled,  # noqa: F401
    runs,
)

from fastbert import ops, reference
from fastbert.kernels import activation as kernels
from fastbert.kernels import architecture, configs, linear_table
from fastbert.kernels import linear as gemm
from fastbert.ops import dispatch
from fastbert.ops.linear.triton import run_triton, supports_triton

pytestmark = pytest.mark.usefixtures("nan_filled")
NAMES = tuple(reference.ACTIVATIONS)
FUSED = [dtype for dtype in DTYPES if INTERPRETED or dtype != torch.float32]  # no tile of a GPU is for fp32


def draw(*size, seed=0, scale=1.0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).mul(scale).to(DEVICE)


def operands(M, K, N, dtype=torch.float32):
    return (t.to(dtype) for t in (draw(M, K), draw(N, K, seed=1, scale=K**-0.5), draw(N, seed=2)))


def eager(x, weight, bias=None, activation=None):
    return reference.linear(x, weight, bias, activation=activation)


def check_fused(x, weight, bias, activation, keep_z=False, **kwargs):
    before = [t.clone() for t in (x, weight)]
    y, z = gemm.linear_fused_fwd(x, weight, bias, activation, keep_z, **kwargs)
    again, _ = gemm.linear_fused_fwd(x, weight, bias, activation, keep_z, **kwargs)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    assert torch.equal(y, again), "differs on a repeat"
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1]), "an input was changed"
    assert_accurate(y, eager(x, weight, bias, activation), eager(*wide, activation), "y")
    assert (z is not None) == keep_z
    if keep_z:
        assert_accurate(z, eager(x, weight, bias), eager(*wide), "z")
        # y is made of z as it was kept (but for what two compilations may contract), so that it can be made again.
        again = kernels.activation_fwd(z, activation)
        assert not y.numel() or (y != again).double().mean() < 0.01


@runs
@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_fused_forward(activation, dtype):
    check_fused(*operands(33, 63, 40, dtype), activation, keep_z=activation is not None)


@runs
@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize(
    ("M", "K", "N"), [(0, 16, 16), (1, 62, 111), (63, 64, 1), (111, 1, 48), (33, 1000, 63), (9, 0, 4)]
)
def test_fused_forward_of_odd_sizes(M, K, N, dtype):
    x, weight, bias = operands(M, K, N, dtype) if K else (t.to(dtype) for t in (draw(M, 0), draw(N, 0), draw(N)))
    check_fused(x, weight, bias, "gelu")
    check_fused(x, weight, None, None)


@runs
@pytest.mark.parametrize("tile", [(16, 16, 32, 4, 1), (32, 64, 16, 1, 2), (64, 64, 32, 1, 1)])
def test_fused_forward_whatever_the_tile(tile):
    tile = configs.LinearTile(*tile)
    check_fused(*operands(40, 80, 70, FUSED[0]), "gelu", keep_z=True, tile=tile)
    assert configs.LinearTile(64, 64, 32, 1, 1).parts == 2  # so that both ways of storing were walked


@runs
@pytest.mark.skipif(INTERPRETED, reason="products that fill a GPU take the interpreter minutes")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(configs.linear_tiles("sm_90"))))
def test_the_gpus_own_tiles(number, dtype):
    """Each that this GPU has, over more of them than run at once, and a rest of rows, columns and K."""
    tiles = configs.linear_tiles(architecture.architecture(torch.device(DEVICE)))
    if number < len(tiles):
        check_fused(*operands(1111, 776, 2056, dtype), "gelu", keep_z=True, tile=tiles[number])
        check_fused(*operands(1111, 776, 2056, dtype), "gelu", tile=tiles[number])


@runs
def test_fused_forward_with_strides():
    x, weight, bias = operands(40, 100, 66, FUSED[0])
    check_fused(x[::2, 3:-1], weight[1:, 4:], bias[1:], "gelu", keep_z=True)
    check_fused(x, weight, draw(2 * 66).to(x.dtype)[::2], "gelu")


@runs
@pytest.mark.skipif(not INTERPRETED, reason="launches for Hopper are taken apart here; there they run as they are")
@pytest.mark.parametrize("programs", [1, 3, 132])
def test_persistent_programs_with_descriptors(programs, monkeypatch):
    """Hopper's way in the interpreter: descriptors for all operands, fewer programs than tiles, rows past the end."""
    monkeypatch.setattr(architecture, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(architecture, "multiprocessors", lambda device: programs)
    tile = configs.LinearTile(32, 32, 32, 8, 1)
    for parts in (tile, configs.LinearTile(64, 64, 32, 1, 1)):
        x, weight, bias = operands(70, 72, 104, torch.float16)
        assert all(gemm._on_16_bytes(t) for t in (x, weight))
        check_fused(x, weight, bias, "gelu", keep_z=True, tile=parts)


@runs
def test_rows_do_not_depend_on_their_batch_mates():
    x, weight, bias = operands(40, 48, 40, FUSED[0])
    y, _ = gemm.linear_fused_fwd(x, weight, bias, "gelu")
    others = torch.cat([x[:1], draw(39, 48, seed=5, scale=100.0).to(x.dtype)])
    assert torch.equal(gemm.linear_fused_fwd(others, weight, bias, "gelu")[0][0], y[0])
    alone, _ = gemm.linear_fused_fwd(x[:1], weight, bias, "gelu")
    torch.testing.assert_close(alone[0], y[0], rtol=1e-6, atol=1e-6)


def derivative(z, dy, activation):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(reference.ACTIVATIONS[activation](z), z, dy)[0]


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_activation(activation, dtype, monkeypatch):
    """Forward, in place too, backward and sums, over all that matters of the axis; one row's part to many splits."""
    monkeypatch.setattr(architecture, "multiprocessors", lambda device: 4)
    z = torch.linspace(-12, 12, 300 * 131).view(131, 300).T.contiguous().to(DEVICE, dtype)  # columns are local
    y = kernels.activation_fwd(z, activation)
    # tanh is 1 - 2 / (1 + exp(2 z)): two terms up to 2, each rounded once, before they cancel.
    unit = torch.finfo(torch.float32).eps / 2 if activation == "tanh" and dtype == torch.float32 else 0.0
    exact = reference.ACTIVATIONS[activation](z.double())
    assert_accurate(y, reference.ACTIVATIONS[activation](z), exact, "y", (2 * unit, unit))
    in_place = z.clone()
    assert kernels.activation_fwd(in_place, activation, in_place) is in_place and torch.equal(in_place, y)

    dy = draw(*z.shape, seed=3).to(dtype)
    dz, sums = kernels.activation_bwd(dy, z, activation)
    exact = derivative(z.double(), dy.double(), activation)
    theirs = derivative(z, dy, activation)
    assert configs.activation_bwd(*z.shape, 4).splits > 1
    slope = 4 * unit * float(dy.abs().max())  # dz is dy (1 - tanh^2)
    assert_accurate(dz, theirs, exact, "dz", (slope, slope / 2))
    total = slope / 2 * len(dy) ** 0.5  # of so many errors of dz
    assert_accurate(sums, theirs.sum(0), exact.sum(0), "sums", (total, total / 2))
    without, none = kernels.activation_bwd(dy, z, activation, sums=False)
    assert none is None and torch.equal(without, dz)
    assert all(torch.equal(a, b) for a, b in zip(kernels.activation_bwd(dy, z, activation), (dz, sums), strict=True))


@runs
def test_gelu_in_16_bits_is_the_exact_one():
    """The polynomials before they are rounded, against erf: what fp16 adds by rounding is a hundred times as much."""
    import triton
    import triton.language as tl

    @triton.jit
    def both(z_ptr, y_ptr, slope_ptr, N: tl.constexpr):
        z = tl.load(z_ptr + tl.arange(0, N))
        tl.store(y_ptr + tl.arange(0, N), kernels.activate(z, "gelu", False))
        tl.store(slope_ptr + tl.arange(0, N), kernels.slope(z, "gelu", False))

    N = 2**15
    z = torch.linspace(-8, 8, N, device=DEVICE)
    z[0], z[-1], z[1] = -3e4, 3e4, float("nan")
    y, slope = torch.empty_like(z), torch.empty_like(z)
    both[(1,)](z, y, slope, N=N)
    exact = z.double()
    assert y[1].isnan()
    y[1], slope[1], exact[1] = 0.0, 0.5, 0.0
    error = (y - torch.nn.functional.gelu(exact)).abs()
    assert error[1:-1].max() < 2.5e-6 and error[0] < 4e-3 and error[-1] < 4e-3  # 1e-7 of 3e4 at the ends
    assert (slope - derivative(exact, torch.ones_like(exact), "gelu")).abs().max() < 8e-6


@runs
@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "gelu_new"])
def test_far_and_small_values(activation):
    z = torch.tensor([[1e-20, -1e-6, 1e-3, -0.06, 0.07, 1e4, -1e4, 0.0]], device=DEVICE)
    exact = z.double()
    y, (dz, _) = kernels.activation_fwd(z, activation), kernels.activation_bwd(torch.ones_like(z), z, activation)
    wanted = reference.ACTIVATIONS[activation](exact), derivative(exact, torch.ones_like(exact), activation)
    torch.testing.assert_close(y.double(), wanted[0], rtol=4e-6, atol=0)
    torch.testing.assert_close(dz.double(), wanted[1], rtol=2e-6, atol=1e-6)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [0, 1, 111, 1000])
def test_column_sum(M, dtype, monkeypatch):
    monkeypatch.setattr(architecture, "multiprocessors", lambda device: 132)
    x = draw(M, 63).to(dtype)
    assert_accurate(kernels.column_sum(x), x.sum(0), x.double().sum(0))
    expanded = draw(1, 63).to(dtype).expand(M, 63)
    exact = expanded.double().sum(0)
    # Equal numbers round the same way at each addition of a program's chain of 16 rows; eager adds in pairs.
    chain = 16 * torch.finfo(torch.float32).eps / 2 * float(exact.abs().max())
    assert_accurate(kernels.column_sum(expanded), expanded.sum(0), exact, "expanded", (chain, chain / 2))


@pytest.fixture(params=["cublas", "fused"])
def each_way(request, monkeypatch):
    """Whether the product with an activation is one kernel; counts those."""
    launched = []
    real = gemm.linear_fused_fwd
    monkeypatch.setattr(gemm, "linear_fused_fwd", lambda *a, **k: launched.append(1) or real(*a, **k))
    tile = None if request.param == "cublas" else configs.LinearTile(32, 32, 32, 4, 1)
    monkeypatch.setattr(gemm, "_choice", lambda x, weight, activation, keep_z: activation and tile)
    yield
    assert bool(launched) == (request.param == "fused")


def by_triton(x, weight, bias, activation):
    return run_triton(x, ops.Weight([weight], [bias]), activation=activation, precision=None)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_op(each_way, activation, dtype):
    """Forward and every gradient, with and without autograd."""
    run = by_triton
    for M in (1, 33):
        inputs = dict(zip(("x", "weight", "bias"), operands(M, 48, 72), strict=True))
        assert_op_accurate(run, eager, inputs, dtype, activation=activation)
        assert_op_accurate(run, eager, inputs, dtype, backward=False, activation=activation)
    assert_op_accurate(run, eager, inputs, dtype, activation=None)


@runs
def test_op_without_bias_and_with_an_expanded_gradient():
    x, weight, _ = operands(7, 16, 24)
    for activation in (None, "gelu"):
        grads = []
        for run in (by_triton, reference.linear):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            y = run(*leaves, None, activation=activation)
            grads.append(torch.autograd.grad(y.sum(), leaves, retain_graph=True))
            grads.append(torch.autograd.grad(y.T.contiguous().T.sum(), leaves))
        for got, wanted in zip(grads[:2], grads[2:], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@runs
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_op_keeps_and_computes_what_is_wanted(wanted):
    kept = []
    leaves = [t.requires_grad_(want) for t, want in zip(operands(7, 16, 24), wanted, strict=True)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = by_triton(*leaves, activation="gelu")
    sizes = {(7, 24)} | ({(7, 16)} if wanted[1] else set()) | ({(24, 16)} if wanted[0] else set())
    assert {tuple(t.shape) for t in kept if t.dim() > 1} == sizes  # the bias lives anyway
    (got,) = torch.autograd.grad(y.sum(), [t for t, want in zip(leaves, wanted, strict=True) if want])
    again = [t.detach().requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
    (exact,) = torch.autograd.grad(eager(*again, "gelu").sum(), [t for t in again if t.requires_grad])
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward(each_way, recompute, dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda *args, **kwargs: ("triton", run_triton))

    def naive(x, up_weight, up_bias, down_weight, down_bias, activation, recompute):
        return eager(eager(x, up_weight, up_bias, activation), down_weight, down_bias).sin()

    def run(**kwargs):  # a sine, or what reaches the bias is a straight line, whose sums all but cancel
        return ops.feed_forward(**kwargs).sin()

    up, down = operands(33, 24, 64), operands(33, 64, 24)
    names = ("x", "up_weight", "up_bias", "down_weight", "down_bias")
    inputs = dict(zip(names, [*up, *list(down)[1:]], strict=True))
    assert_op_accurate(run, naive, inputs, dtype, activation="gelu", recompute=recompute)


def test_what_it_refuses():
    x, weight, bias = torch.zeros(2, 4), torch.zeros(4, 4), torch.zeros(4)
    weight = ops.Weight([weight], [bias])
    assert "not on cpu" in supports_triton(x, weight)
    assert "not on cpu" in supports_triton(x, weight, precision="int8")


def test_the_table(tmp_path, monkeypatch):
    """A row decides for its bucket, dtype and activation; the committed file reads; rows survive being written."""
    row = linear_table.Row(
        *("sm_90", "bfloat16", 1024, 64, 32, "gelu", False, None, 3.0, 4.0, "a GPU", "2026-01-01"),
    )
    training = replace(row, keeps_z=True, tile=configs.LinearTile(128, 128, 64, 4, 3))
    linear_table.write(tmp_path / "table.csv", [row, training])
    assert linear_table.read(tmp_path / "table.csv") == [row, training]
    assert not list(tmp_path.glob("*.partial"))

    monkeypatch.setattr(linear_table, "FILE", tmp_path / "table.csv")
    monkeypatch.setattr(architecture, "architecture", lambda device: "sm_90")
    linear_table._rows.cache_clear()
    try:

        def choice(M, dtype=torch.bfloat16, activation="gelu", keep_z=False, first=0):
            x, weight = torch.zeros(M, 32 + first, dtype=dtype), torch.zeros(64, 32, dtype=dtype)
            return gemm._choice(x[:, first:], weight, activation, keep_z)

        assert choice(600) is None and choice(1024, keep_z=True) == training.tile
        assert choice(1025, keep_z=True) is None  # the rule: too many rows for a small product
        assert choice(512) == configs.linear(512, 64, "sm_90", 1)  # and here few enough
        assert choice(100, torch.float32) is None and choice(100, activation=None) is None
        assert choice(0) is None and choice(512, first=4) is None  # nothing to do; rows not on 16 bytes
    finally:
        linear_table._rows.cache_clear()


def test_the_committed_table():
    rows = linear_table.read(linear_table.FILE)
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.device and row.date and linear_table.bucket(row.M) == row.M
        assert row.tile is None or row.tile in configs.linear_tiles(row.architecture)
        assert (row.tile is None) == (row.cublas_us <= row.triton_us)


@runs
@pytest.mark.parametrize("slower", ["cublas", "32x32x32-4-1"])
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the tuner times what the GPU's own tiles are")
def test_tuning(slower, tmp_path, monkeypatch):
    """The faster way comes into the table, in place of an older row, next to those of other products."""
    clock = lambda ways, device: {name: 2e-6 if name == slower else 1e-6 for name in ways}  # noqa: E731
    other, _ = tune_linear.measure(16, 32, 48, torch.float16, True, torch.device("cpu"), clock)
    row, times = tune_linear.measure(16, 32, 48, torch.float16, False, torch.device("cpu"), clock)
    assert set(times) == {"cublas", "32x32x32-4-1"}
    assert (row.tile is None) == (slower != "cublas") and times["cublas"] == row.cublas_us
    committed, path = tmp_path / "committed.csv", tmp_path / "table.csv"
    linear_table.write(committed, [replace(row, cublas_us=9.0)])
    monkeypatch.setattr(linear_table, "FILE", committed)
    tune_linear.merge(path, [other])
    assert len(linear_table.read(committed)) == 1 and len(linear_table.read(path)) == 2
    tune_linear.merge(path, [row])
    assert linear_table.read(path) == [row, other]


@runs
def test_tuning_holds_each_way_to_the_truth_first(monkeypatch):
    real = gemm.linear_fused_fwd
    monkeypatch.setattr(gemm, "linear_fused_fwd", lambda *a, **k: (real(*a, **k)[0] + 0.1, None))
    with pytest.raises(RuntimeError, match=r"-\d is wrong at 16 x 48 -> 32"):
        tune_linear.measure(16, 32, 48, torch.float16, False, torch.device(DEVICE), lambda *args: {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu(capsys, tmp_path):
    assert tune_linear.main(["--output", str(tmp_path / "table.csv")]) == 1
    out = capsys.readouterr()
    assert not out.out and out.err.count("\n") == 1 and "no GPU" in out.err
    assert not list(tmp_path.iterdir())


def test_configs():
    assert [linear_table.bucket(M) for M in (1, 16, 17, 1000, 1024, 10**9)] == [16, 16, 32, 1024, 1024, 65536]
    for target in (*TARGETS, "sm_89", "sm_100", "gfx90a", "interpreter"):
        for M in (1, 16, 17, 128, 4096, 10**6):
            assert configs.linear(M, 768, target, 132) in configs.linear_tiles(target)
    assert configs.linear(16384, 3072, "sm_90", 132).block_n == 256
    assert configs.linear(128, 3072, "sm_90", 132).block_n == 32  # 2 x 96 tiles
    assert configs.linear(16, 768, "sm_90", 132).block_m == 16
    for M, N in ((1, 1), (129, 768), (32768, 3072), (10**6, 48)):
        tile = configs.activation_bwd(M, N, 132)
        assert (tile.splits - 1) * tile.rows < M <= tile.splits * tile.rows and tile.rows % tile.block_m == 0


def compiled_linear(target, dtype, tile, activation, keep_z, K=768, N=512, bias=True):
    x, weight, bias_ = torch.empty(256, K, dtype=dtype), torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype)
    with compiling_for(target) as compiled:
        gemm.linear_fused_fwd(x, weight, bias_ if bias else None, activation, keep_z, tile=tile)
    (kernel,) = compiled
    check_resources(kernel)
    return kernel


@compiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", COMPILED)
def test_every_tile_compiles(target, dtype):
    for tile in configs.linear_tiles(target):
        kernel = compiled_linear(target, dtype, tile, "gelu", True)
        if target == "sm_90":
            assert "cp.async.bulk.tensor" in kernel.assembly, tile
            assert ("wgmma.mma_async" in kernel.assembly) == (tile.block_m >= 64), tile
            if tile.block_m >= 64:  # a step's products run while the next one's begin
                assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", kernel.assembly), tile
        if target == "sm_80":
            assert "cp.async.c" in kernel.assembly and "mma.sync" in kernel.assembly, tile
        if target == "gfx942":
            assert "v_mfma" in kernel.assembly, tile


@compiles
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_in_other_ways(target):
    """Without z, bias or activation, of rows that no descriptor can tell of."""
    tile = configs.linear_tiles(target)[0]
    compiled_linear(target, torch.bfloat16, tile, None, False, bias=False)
    compiled_linear(target, torch.float16, tile, "gelu", False)
    for size in ({"N": 511}, {"K": 63}):
        odd = compiled_linear(target, torch.bfloat16, configs.linear_tiles(target)[-1], "gelu", True, **size)
        assert "cp.async.bulk.tensor" not in odd.assembly


@compiles
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("target", COMPILED)
def test_activation_compiles(target, dtype):
    z = torch.empty(4096, 3072, dtype=dtype)
    with compiling_for(target) as compiled:
        for activation in ("gelu", "tanh") if dtype == torch.bfloat16 else ("gelu",):
            kernels.activation_fwd(z, activation)
            kernels.activation_bwd(z, z, activation)
        kernels.column_sum(z)
    assert {kernel.name for kernel in compiled} == {"_activation_fwd_kernel", "_activation_bwd_kernel"}
    for kernel in compiled:
        check_resources(kernel)
