"""The Triton version of embed_layer_norm: values, every gradient, duplicates without end, ids outside their tables."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_accurate

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
from fastbert.kernels.dropout import draw_seed
from fastbert.kernels.embed_layer_norm import embed_layer_norm_bwd, embed_layer_norm_fwd
from fastbert.kernels.segments import segment_sums
from fastbert.ops.embed_layer_norm.triton import run_triton, supports_triton

EPS = 1e-12
SIZES = (30, 2, 16)


def example(T, N, dtype=torch.float32, ids_dtype=torch.int64):
    """Ids, the tables, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, size, (T,), generator=generator).to(DEVICE, ids_dtype) for size in SIZES]
    draw = lambda *size: torch.randn(*size, generator=generator).to(DEVICE, dtype)  # noqa: E731
    return ids, [*(draw(size, N) for size in SIZES), 1 + 0.1 * draw(N), draw(N)]


def naive(ids, word, token_type, position, weight, bias, multiplier=None, padding_idx=None):
    x = F.embedding(ids[0], word, padding_idx) + F.embedding(ids[1], token_type) + F.embedding(ids[2], position)
    y = F.layer_norm(x, weight.shape, weight, bias, EPS)
    return y if multiplier is None else y * multiplier.to(y.dtype)


def run(function, tensors, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def multiplier_of(seed, T, N, p):
    """What dropout multiplies by, read off the forward: weight 0 and bias 1 make every y 1 before it."""
    ids, (*tables, weight, bias) = example(T, N)
    torch.manual_seed(seed)
    drawn = draw_seed(weight.device)
    vectors = torch.zeros_like(weight), torch.ones_like(bias)
    return embed_layer_norm_fwd(ids, tables, *vectors, drawn, eps=EPS, dropout_p=p)[0]


def check(ids, tensors, *, dropout_p=0.0, padding_idx=None, seed=0):
    before = [t.clone() for t in (*ids, *tensors)]
    T, N = ids[0].shape[0], tensors[0].shape[1]
    dy = torch.linspace(-1, 1, T * N, dtype=torch.float64, device=DEVICE).view(T, N).to(tensors[0].dtype).double()
    multiplier = multiplier_of(seed, T, N, dropout_p) if dropout_p else None

    def op(*leaves):
        torch.manual_seed(seed)
        return run_triton(*ids, *leaves, eps=EPS, dropout_p=dropout_p, padding_idx=padding_idx)

    got, again = run(op, tensors, dy), run(op, tensors, dy)
    eager = run(lambda *t: naive(ids, *t, multiplier, padding_idx), tensors, dy)
    precise = [t.double() for t in tensors]
    exact = run(lambda *t: naive(ids, *t, multiplier, padding_idx), precise, dy)
    # The floor of tests/support.py: what is exact of inputs that were rounded once. Rows of two numbers are 1 and -1
    # whatever they hold, their gradients zero but for roundings, of which eager may happen to have few.
    half = torch.finfo(tensors[0].dtype).eps / 2
    signs = lambda x: torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x).sub(0.5).sign()  # noqa: E731
    rounded = [x * (1 + half * signs(x)) for x in (*precise, dy)]
    moved = run(lambda *t: naive(ids, *t, multiplier, padding_idx), rounded[:-1], rounded[-1])
    floors = [
        ((a - b).abs().max(), (a - b).pow(2).mean().sqrt()) if a.numel() else (0.0, 0.0)
        for a, b in zip(moved, exact, strict=True)
    ]
    names = ("y", "dword", "dtoken_type", "dposition", "dweight", "dbias")
    for name, floor, *values in zip(names, floors, got, eager, exact, again, strict=True):
        assert_accurate(*values[:3], name, floor)
        assert torch.equal(values[0], values[3]), f"{name} differs on a repeat"
    with torch.no_grad():
        assert torch.equal(op(*tensors), got[0]), "without a gradient it is another"
    assert all(torch.equal(t, copy) for t, copy in zip((*ids, *tensors), before, strict=True)), "an input was changed"
    return got


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("T", "N"), [(0, 8), (1, 8), (33, 7), (7, 63), (3, 96), (35, 2)])
def test_embed_layer_norm(nan_filled, T, N, dropout_p, dtype):  # noqa: F811
    check(*example(T, N, dtype), dropout_p=dropout_p)


@runs
def test_ids_of_32_bits_and_strides(nan_filled):  # noqa: F811
    ids, (*tables, weight, bias) = example(20, 24, ids_dtype=torch.int32)
    check([i[::2] for i in ids], [*(t[..., 4:20] for t in tables), weight[4:20], bias[4:20]])


@runs
@pytest.mark.parametrize("padding_idx", [3, -1])
def test_the_padding_row_has_no_gradient(padding_idx):
    ids, tensors = example(30, 8)
    ids[0][::3] = padding_idx % SIZES[0]
    got = check(ids, tensors, padding_idx=padding_idx)
    assert (got[1][padding_idx] == 0).all() and (got[2] != 0).any()


@runs
def test_a_dropped_element_takes_no_gradient():
    ids, (*tables, weight, bias) = example(40, 16)
    bias.requires_grad_()
    y = run_triton(*ids, *tables, weight, bias, eps=EPS, dropout_p=0.5, padding_idx=None)
    y.sum().backward()
    torch.testing.assert_close(bias.grad, 2.0 * (y != 0).sum(0))


@runs
@pytest.mark.parametrize("keys", ["one", "few", "many", "halves", "chunks", "none"])
@pytest.mark.parametrize("rows", [lambda c: 1, lambda c: c - 1, lambda c: c, lambda c: c + 1, lambda c: c**3 // 4 + 1])
def test_segment_sums(nan_filled, rows, keys):  # noqa: F811
    """One chunk, its edges, and four rounds; keys that fill a chunk, half of one, all of them."""
    chunk = configs.segments(3, architecture.architecture(torch.device(DEVICE))).chunk
    n = rows(chunk)
    size = n + 5
    key = {
        "one": torch.full((n,), 4),
        "few": torch.randint(-1, 3, (n,)),
        "many": torch.randint(-1, size, (n,)),
        "halves": torch.arange(n) // (chunk // 2),
        "chunks": torch.arange(n) // chunk,
        "none": torch.full((n,), -1),
    }[keys].to(DEVICE, torch.int32)
    values = torch.randn(max(n // 2, 1), 3, device=DEVICE)
    sorted_keys, order = torch.sort(key, stable=True)
    got = segment_sums(values, order, sorted_keys, size)
    want = torch.zeros(size, 3, dtype=torch.float64, device=DEVICE)
    known = key >= 0
    rows = torch.arange(n, device=DEVICE)[known] % len(values)
    want.index_add_(0, key[known].long(), values.double()[rows])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, segment_sums(values, order, sorted_keys, size))


@runs
def test_half_precision_is_summed_in_fp32():
    """Ones after 2048 in fp16: there 2048 + 1 is 2048."""
    keys, order = torch.zeros(21, dtype=torch.int32, device=DEVICE), torch.arange(21, device=DEVICE)
    values = torch.ones(21, 2, dtype=torch.float16, device=DEVICE)
    values[0] = 2048
    assert (segment_sums(values, order, keys, 1) == 2068).all()


@runs
@pytest.mark.parametrize("N", [768, 1000])
def test_wide_rows(nan_filled, N):  # noqa: F811
    ids, (*tables, weight, bias) = example(5, N)
    y = embed_layer_norm_fwd(ids, tables, weight, bias, eps=EPS)[0]
    exact = naive(ids, *(t.double() for t in (*tables, weight, bias)))
    assert_accurate(y, naive(ids, *tables, weight, bias), exact)


@runs
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("beyond", [-1, 2**40])
def test_an_id_outside_its_table_is_nan_and_nothing_else_is(nan_filled, which, beyond):  # noqa: F811
    ids, tensors = example(9, 8)
    good = run_triton(*ids, *tensors, eps=EPS, dropout_p=0.0, padding_idx=None)
    ids[which][4] = beyond
    y = run_triton(*ids, *(t.requires_grad_() for t in tensors), eps=EPS, dropout_p=0.0, padding_idx=None)
    assert y[4].isnan().all()
    rest = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(y[rest], good[rest])
    y[rest].sum().backward()  # NaN * 0 in that row: its gradient is to stay in its own rows of the tables
    touched = ids[(which + 1) % 3][4]
    grad = tensors[(which + 1) % 3].grad
    assert grad[touched].isnan().all()
    assert grad[torch.arange(len(grad), device=DEVICE) != touched].isfinite().all()


@runs
def test_what_is_not_wanted_is_not_computed():
    ids, (*tables, weight, bias) = example(30, 8)
    _, mean, rstd = embed_layer_norm_fwd(ids, tables, weight, bias, eps=EPS, training=True)
    dy = torch.randn(30, 8, device=DEVICE)
    full = embed_layer_norm_bwd(dy, ids, tables, weight, mean, rstd)
    for wanted in ([i == j for j in range(5)] for i in range(5)):
        got = embed_layer_norm_bwd(dy, ids, tables, weight, mean, rstd, wanted=wanted)
        assert [g is not None for g in got] == wanted
        for g, f in zip(got, full, strict=True):  # the order of a sum depends on what else is sorted with it
            assert g is None or torch.allclose(g, f, rtol=1e-5, atol=1e-5)


@runs
def test_many_programs(monkeypatch, nan_filled):  # noqa: F811
    """The grid decides in which order dweight and dbias are added, and nothing else."""
    ids, tensors = example(80, 4)
    dy = torch.randn(80, 4, device=DEVICE)

    def op(*leaves):
        torch.manual_seed(0)
        return run_triton(*ids, *leaves, eps=EPS, dropout_p=0.4, padding_idx=None)

    few = run(op, tensors, dy)
    monkeypatch.setattr(architecture, "multiprocessors", lambda device: 5)
    many = run(op, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(few[:4], many[:4], strict=True))
    torch.testing.assert_close(few[4:], many[4:], rtol=1e-4, atol=1e-5)


@runs
def test_a_row_alone_is_the_same():
    ids, (*tables, weight, bias) = example(9, 63)
    y = embed_layer_norm_fwd(ids, tables, weight, bias, eps=EPS)[0]
    assert torch.equal(embed_layer_norm_fwd([i[5:6] for i in ids], tables, weight, bias, eps=EPS)[0][0], y[5])


@runs
def test_it_keeps_three_numbers_a_token():
    ids, tensors = example(40, 48)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        leaves = [t.requires_grad_() for t in tensors]
        run_triton(*ids, *leaves, eps=EPS, dropout_p=0.4, padding_idx=None)
    given = {t.data_ptr() for t in (*ids, *tensors)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in given) == 3 * 40 + 1  # the mean is two


@runs
def test_reasons():
    ids, tensors = example(2, 4)
    reason = supports_triton(*(t.cpu() for t in (*ids, *tensors)), eps=EPS, dropout_p=0.0, padding_idx=None)
    assert "GPU" in reason


@compiles
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize(
    ("N", "dtype", "dropout_p"),
    [*((768, dtype, 0.1) for dtype in ALL_DTYPES), *((N, torch.bfloat16, 0.0) for N in (384, 768, 1024))],
)
def test_compiles(target, N, dtype, dropout_p):
    T = 300
    ids = [torch.zeros(T, dtype=torch.int64)] * 3
    tables, vector = [torch.empty(size, N, dtype=dtype) for size in SIZES], torch.empty(N, dtype=dtype)
    seed, statistic = torch.zeros(1, dtype=torch.int64), torch.empty(T)
    with compiling_for(target) as compiled:
        embed_layer_norm_fwd(ids, tables, vector, vector, seed, eps=EPS, dropout_p=dropout_p, training=True)
        dy = torch.empty(T, N, dtype=dtype)
        embed_layer_norm_bwd(dy, ids, tables, vector, statistic, statistic, seed, dropout_p=dropout_p, padding_idx=0)
    assert {kernel.name for kernel in compiled} == {
        "_embed_layer_norm_fwd_kernel",
        "_embed_layer_norm_bwd_kernel",
        "_segment_sums_kernel",
        "_sum_partials_kernel",
    }
    for kernel in compiled:
        check_resources(kernel)
