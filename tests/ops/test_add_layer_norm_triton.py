"""The Triton version of add_layer_norm: values, every gradient, the dropout mask, what it keeps and compiles to."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_accurate, floors_of_rounding

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

from fastbert.kernels import architecture, configs
from fastbert.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from fastbert.ops import add_layer_norm as public
from fastbert.ops.add_layer_norm.triton import run_triton, supports_triton

EPS = 1e-12
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def example(M, N, dtype=F32, *, shift=0.0, residual_dtype=None, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    x, residual, weight, bias = draw(M, N) + shift, draw(M, N), 1 + 0.1 * draw(N), draw(N)
    tensors = x.to(dtype), residual.to(residual_dtype or dtype), *(t.to(weight_dtype or dtype) for t in (weight, bias))
    return [t.to(DEVICE) for t in tensors]


def naive(x, residual, weight, bias, multiplier=None):
    """In eager PyTorch, the dropped elements given: `multiplier` is 0 or 1 / (1 - p)."""
    x = x if multiplier is None else x * multiplier.to(x.dtype)
    x = x if residual is None else x + residual
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)


def run(function, tensors, dy):
    """Output and gradients; a tensor that is None has none."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    present = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(y, present, dy.to(y.dtype)))
    return y.detach(), *(None if t is None else next(gradients) for t in leaves)


def multiplier_of(seed, M, N, p):
    """What dropout multiplies by, read off the forward kernel: its sum, where x is 1 and nothing is added."""
    ones, vector = torch.ones(M, N, device=DEVICE), torch.ones(N, device=DEVICE)
    torch.manual_seed(seed)
    from fastbert.kernels.dropout import draw_seed

    return add_layer_norm_fwd(ones, None, vector, vector, draw_seed(ones.device), eps=EPS, dropout_p=p, training=True)[
        1
    ]


def check(x, residual, weight, bias, *, dropout_p=0.0, seed=0):
    tensors = x, residual, weight, bias
    before = [None if t is None else t.clone() for t in tensors]
    dy = torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=DEVICE).view(x.shape)
    multiplier = multiplier_of(seed, *x.shape, dropout_p) if dropout_p else None

    def op(*leaves):
        torch.manual_seed(seed)
        return run_triton(*leaves, eps=EPS, dropout_p=dropout_p)

    got, again = run(op, tensors, dy), run(op, tensors, dy)
    eager = run(lambda *t: naive(*t, multiplier), tensors, dy.to(got[0].dtype))
    rounded = dy.to(got[0].dtype).double()
    truth = lambda wide: run(lambda *t: naive(*t, multiplier), wide[:-1], wide[-1])  # noqa: E731
    wide = [None if t is None else t.double() for t in (*tensors, rounded)]
    exact = truth(wide)
    floors = floors_of_rounding(truth, wide, exact, got[0].dtype)
    names = "y", "dx", "dresidual", "dweight", "dbias"
    for name, *values, floor in zip(names, got, eager, exact, again, floors, strict=True):
        if values[0] is not None:
            assert_accurate(*values[:3], name, floor)
            assert torch.equal(values[0], values[3]), f"{name} differs on a repeat"
    with torch.no_grad():
        assert torch.equal(op(*tensors), got[0]), "without a gradient it is another"
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), "an input was changed"
    return got


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("M", "N"), [(0, 8), (1, 8), (7, 63), (33, 111), (19, 384), (5, 768), (3, 1000)])
def test_add_layer_norm(nan_filled, M, N, dropout_p, dtype):  # noqa: F811
    x, residual, weight, bias = example(M, N, dtype)
    check(x, residual, weight, bias, dropout_p=dropout_p)
    check(x, None, weight, bias, dropout_p=dropout_p)


@runs
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("x", "residual", "weight"), [(F16, F32, F32), (F32, F16, F16), (F16, F16, F32), (F16, torch.bfloat16, F32)]
)
def test_each_input_has_its_dtype(nan_filled, x, residual, weight, dropout_p):  # noqa: F811
    """As under autocast. What is computed here in fp16 and bf16 are products with 1 and 0."""
    if DEVICE == "cpu" and torch.bfloat16 in (x, residual, weight):
        pytest.skip("the interpreter computes bf16 wrongly")
    tensors = example(7, 63, x, residual_dtype=residual, weight_dtype=weight)
    got = check(*tensors, dropout_p=dropout_p)
    assert [t.dtype for t in got[1:]] == [t.dtype for t in tensors]
    assert got[0].dtype == torch.promote_types(x, residual)


@runs
def test_autocast_leaves_each_input_its_dtype():
    x, residual, weight, bias = (t.cpu() for t in example(7, 64, torch.bfloat16, residual_dtype=F32, weight_dtype=F32))
    with torch.autocast("cpu", torch.bfloat16):
        y = public(x, residual, weight, bias, eps=EPS)
    assert y.dtype == F32
    torch.testing.assert_close(y, naive(x.float(), residual, weight, bias), rtol=1e-5, atol=1e-5)


@runs
def test_where_the_mean_is_large(nan_filled):  # noqa: F811
    check(*example(7, 768, shift=1000.0))


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 64])
def test_rows_without_variance(nan_filled, N, dtype):  # noqa: F811
    """1 / sqrt(eps) is a million: it must multiply nothing but zero."""
    x, residual, weight, bias = example(4, N, dtype)
    x, residual = (t[:, :1].expand(4, N).contiguous() for t in (x, residual))
    y, total, mean, rstd = add_layer_norm_fwd(x, residual, weight, bias, eps=EPS, training=True)
    assert torch.equal(y, bias.expand(4, N))
    dweight = add_layer_norm_bwd(y, total, weight, mean, rstd, dtypes=(dtype,) * 3)[2]
    assert (dweight == 0).all()


@runs
def test_strides(nan_filled):  # noqa: F811
    check(*(t[..., 1:-2] for t in example(7, 114)), dropout_p=0.4)
    x, residual, weight, bias = example(14, 63)
    check(x[::2], residual[1::2], weight, bias)


@runs
def test_a_gradient_that_is_one_number():
    x, residual, weight, bias = (t.requires_grad_() for t in example(6, 48))
    run_triton(x, residual, weight, bias, eps=EPS, dropout_p=0.0).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 6.0))


@runs
def test_what_is_not_wanted_is_not_computed():
    x, residual, weight, bias = example(6, 48)
    full = run(lambda *t: run_triton(*t, eps=EPS, dropout_p=0.0), (x, residual, weight, bias), torch.ones_like(x))[1:]
    _, total, mean, rstd = add_layer_norm_fwd(x, residual, weight, bias, eps=EPS, training=True)
    for i in range(4):
        wanted = tuple(i == j for j in range(4))
        got = add_layer_norm_bwd(torch.ones_like(x), total, weight, mean, rstd, dtypes=(x.dtype,) * 3, wanted=wanted)
        assert [g is not None for g in got] == list(wanted)
        assert torch.equal(got[i], full[i])


@runs
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_many_tiles_a_program(monkeypatch, nan_filled, dropout_p):  # noqa: F811
    """The grid decides in which order dweight is added, and nothing else."""
    tensors = example(100, 40)
    few = check(*tensors, dropout_p=dropout_p)
    monkeypatch.setattr(architecture, "multiprocessors", lambda device: 5)
    many = check(*tensors, dropout_p=dropout_p)
    for a, b in zip(few[:3], many[:3], strict=True):
        assert torch.equal(a, b)


@runs
def test_a_row_alone_is_the_same():
    x, residual, weight, bias = example(9, 111)
    y, total, mean, rstd = add_layer_norm_fwd(x, residual, weight, bias, eps=EPS, training=True)
    alone, *kept = add_layer_norm_fwd(x[5:6], residual[5:6], weight, bias, eps=EPS, training=True)
    assert torch.equal(alone[0], y[5])
    dx = add_layer_norm_bwd(residual, total, weight, mean, rstd, dtypes=(x.dtype,) * 3)[0]
    row = add_layer_norm_bwd(residual[5:6], kept[0], weight, *kept[1:], dtypes=(x.dtype,) * 3)[0]
    assert torch.equal(row[0], dx[5])


@runs
def test_it_keeps_the_sum_alone():
    """x and residual can be freed once the sum is there; x, where it is the sum, is kept itself."""
    x, residual, weight, bias = (t.requires_grad_() for t in example(40, 48))

    def kept(*tensors, dropout_p=0.0):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            run_triton(*tensors, weight, bias, eps=EPS, dropout_p=dropout_p)
        return [t for t in saved if t.shape == x.shape]

    for dropout_p in (0.0, 0.4):
        (total,) = kept(x, residual, dropout_p=dropout_p)
        assert total.data_ptr() not in (x.data_ptr(), residual.data_ptr())
    (total,) = kept(x, None)
    assert total.data_ptr() == x.data_ptr()


@runs
def test_the_residual_is_not_dropped():
    x, residual, weight, bias = example(50, 64)
    dx, dresidual = run(lambda *t: run_triton(*t, eps=EPS, dropout_p=0.5), (x, residual, weight, bias), residual)[1:3]
    dropped = dx == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert (dresidual != 0).all()
    torch.testing.assert_close(dx[~dropped], 2 * dresidual[~dropped])


@runs
def test_reasons():
    x, residual, weight, bias = (t.cpu() for t in example(2, 4))
    assert "GPU" in supports_triton(x, residual, weight, bias, eps=EPS, dropout_p=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to have a reason next to")
def test_reasons_on_a_gpu():
    def reason(x, residual, weight, bias):
        return supports_triton(x, residual, weight, bias, eps=EPS, dropout_p=0.1)

    x, residual, weight, bias = example(2, 8)
    assert reason(x, residual.half(), weight.bfloat16(), bias) is None
    assert "float64" in reason(x, residual, weight.double(), bias)
    assert "contiguous" in reason(x.T, residual.T, weight[:2], bias[:2])
    assert "8193 columns" in reason(*example(1, 8193))
    assert "cpu" in reason(x, residual.cpu(), weight, bias)


@compiles
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("N", "dtype"), [*((768, dtype) for dtype in ALL_DTYPES), (384, BF16), (1024, BF16)])
def test_compiles(target, dtype, dropout_p, N):
    x, vector = torch.empty(4096, N, dtype=dtype), torch.empty(N, dtype=dtype)
    seed, statistic = torch.zeros(1, dtype=torch.int64), torch.empty(4096)
    with compiling_for(target) as compiled:
        add_layer_norm_fwd(x, x, vector, vector, seed, eps=EPS, dropout_p=dropout_p, training=True)
        add_layer_norm_bwd(x, x, vector, statistic, statistic, seed, dropout_p=dropout_p, dtypes=(dtype,) * 3)
    assert len(compiled) == 3
    for kernel in compiled:
        check_resources(kernel)
        if kernel.name.startswith("_add") and target == "sm_90" and N == 1024:
            loads = kernel.assembly.count("ld.global.v4") + kernel.assembly.count("cp.async.cg.shared.global")
            assert loads >= 2, f"{kernel.name} does not load 16 bytes at a time"


@compiles
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_under_autocast_and_for_wide_rows(target):
    seed, statistic = torch.zeros(1, dtype=torch.int64), torch.empty(64)
    with compiling_for(target) as compiled:
        x, residual, vector = torch.empty(64, 768, dtype=torch.bfloat16), torch.empty(64, 768), torch.empty(768)
        add_layer_norm_fwd(x, residual, vector, vector, seed, eps=EPS, dropout_p=0.1, training=True)
        dtypes = (torch.bfloat16, F32, F32)
        add_layer_norm_bwd(residual, residual, vector, statistic, statistic, seed, dropout_p=0.1, dtypes=dtypes)
        x, vector = torch.empty(64, 8192), torch.empty(8192)
        add_layer_norm_fwd(x, x, vector, vector, seed, eps=EPS, dropout_p=0.1, training=True)
        add_layer_norm_bwd(x, x, vector, statistic, statistic, seed, dropout_p=0.1, dtypes=(F32,) * 3)
    for kernel in compiled:
        check_resources(kernel, spill_allowance=16)


@pytest.mark.parametrize("N", [1, 2, 3, 63, 65, 111, 384, 768, 1000, 1024, 1025, 4096, 8192])
def test_tiles_cover_a_row(N):
    block_a, block_b = configs.two_parts(N)
    assert block_a & (block_a - 1) == 0 and block_b & (block_b - 1) == 0
    assert max(N, 2) <= block_a + block_b < max(2 * N, 3)
