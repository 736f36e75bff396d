"""attention in Triton: schedule, forward, every gradient, dropout's mask; what its kernels take of a GPU."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
import tune_attention
from support import TINY, assert_accurate, floors_of_rounding
from triton_support import (
    ALL_DTYPES,
    COMPILED,
    DEVICE,
    DTYPES,
    INTERPRETED,
    check_resources,
    compiles,
    compiling_for,
    nan_filled,
    runs,
)

import fastbert
from fastbert import ops
from fastbert.kernels import attention, attention_bwd, configs, dropout, schedule

LENGTHS = [33, 0, 1, 20]
TAIL = 3  # rows behind the last sequence
assert nan_filled  # a fixture, used by name
op = import_module("fastbert.ops.attention.triton")


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def rows_of(lengths=LENGTHS, heads=2, dim=16, tail=TAIL, scale=1.0):
    generator = torch.Generator().manual_seed(dim)
    return scale * torch.randn(sum(lengths) + tail, 3, heads, dim, generator=generator).to(DEVICE)


def naive(qkv, lengths, scale, keep=None):
    """One sequence at a time; `keep` (H, T, T) holds what dropout multiplies probabilities by."""
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        q, k, v = qkv[rows].unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        p = torch.softmax(scores, dim=-1)
        if keep is not None:
            p = p * keep[:, rows, rows].to(p.dtype)
        out.append(torch.einsum("hqk,khd->qhd", p, v))
        start += length
    return torch.cat([*out, 0.0 * qkv[start:, 0]])


def naive_gradient(qkv, dout, *args, **kwargs):
    qkv = qkv.clone().requires_grad_()
    out = naive(qkv, *args, **kwargs)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def kernels(qkv, dout, lengths, **kwargs):
    cu_seqlens, longest = cu_seqlens_of(lengths), max(lengths, default=0)
    out, statistics = attention.attention_fwd(qkv, cu_seqlens, longest, **kwargs)
    return out, attention_bwd.attention_bwd(dout, qkv, out, statistics, cu_seqlens, longest, **kwargs)


def check(dtype, qkv, lengths=LENGTHS, scale=0.3, keep=None, **kwargs):
    qkv = qkv.to(dtype)
    dout = torch.linspace(-1, 1, qkv[:, 0].numel(), device=DEVICE).view(qkv[:, 0].shape).to(dtype)
    before = qkv.clone(), dout.clone()
    got = kernels(qkv, dout, lengths, scale=scale, **kwargs)
    again = kernels(qkv, dout, lengths, scale=scale, **kwargs)
    eager = naive_gradient(qkv, dout, lengths, scale, keep)
    exact = naive_gradient(qkv.double(), dout.double(), lengths, scale, keep)
    for name, *values in zip(("out", "dqkv"), got, eager, exact, strict=True):
        assert_accurate(*values, name)
    assert all(map(torch.equal, got, again)), "it differs on a repeat"
    assert torch.equal(qkv, before[0]) and torch.equal(dout, before[1]), "an input was changed"
    return got


@runs
@pytest.mark.parametrize(
    ("lengths", "tail"),
    # A program reads the lengths of 256 sequences at a time.
    [*((x, tail) for x in ([], [0], [7], [40, 64, 8, 0, 64, 65], [5] * 70) for tail in (0, 40)), ([5] * 260, 40)],
    ids=lambda x: str(x[:6]) + str(len(x)) if isinstance(x, list) else str(x),
)
def test_schedule(nan_filled, lengths, tail):
    total = sum(lengths) + tail
    table = schedule.tile_schedule(cu_seqlens_of(lengths), total, 32).table.tolist()
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    longest_first = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    wanted = [[starts[b], lengths[b], lengths[b], row] for b in longest_first for row in range(0, lengths[b], 32)]
    wanted += [[sum(lengths), tail, 0, row] for row in range(0, tail, 32)]
    assert table[: len(wanted)] == wanted
    assert all(rows == 0 for _, rows, _, _ in table[len(wanted) :])
    if len(lengths) > 100:  # the interpreter takes seconds
        return
    apart = cu_seqlens_of(lengths).repeat_interleave(2)[::2]
    assert schedule.tile_schedule(apart, total, 32).table.tolist()[: len(wanted)] == wanted


@runs
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[0, 2**31 - 1], [-70, 5, 100], [100, 0, 100, 0, 100], [0, -(2**31), 300, 40]])
def test_schedule_of_offsets_that_are_none(nan_filled, offsets, dtype):
    """As a graph is replayed with, whose caller is told of them afterwards."""
    table = schedule.tile_schedule(torch.tensor(offsets, dtype=dtype, device=DEVICE), 100, 32).table
    start, rows, keys, begins = table.long().unbind(1)
    used = rows > 0
    assert len(table) == 100 // 32 + len(offsets)
    assert (start >= 0).all() and (rows >= 0).all() and (start + rows <= 100).all()
    assert ((keys == rows) | (keys == 0))[used].all() and (begins < rows)[used].all()


@runs
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 80, 128, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(nan_filled, dtype, dim):
    check(dtype, rows_of(dim=dim, heads=1 if dim > 64 else 2), scale=dim**-0.5)


@runs
@pytest.mark.parametrize("lengths", [[], [0], [63, 111], [16, 1, 13], [17]], ids=str)
@pytest.mark.parametrize("tail", [0, 20])
def test_lengths(nan_filled, lengths, tail):
    out, dqkv = check(torch.float32, rows_of(lengths, heads=1, tail=tail), lengths)
    assert not out[sum(lengths) :].any() and not dqkv[sum(lengths) :].any()


@runs
def test_rows_of_no_sequence_are_not_read(nan_filled):
    qkv = rows_of()
    dout = torch.ones_like(qkv[:, 0])
    wanted = kernels(qkv, dout, LENGTHS, scale=0.3)
    qkv[-TAIL:], dout[-TAIL:] = torch.nan, torch.nan
    assert all(map(torch.equal, kernels(qkv, dout, LENGTHS, scale=0.3), wanted))


@runs
def test_neighbours_do_not_matter():
    qkv = rows_of([33, 20, 9], tail=0)
    dout = torch.ones_like(qkv[:, 0])
    qkv[:33], qkv[53:] = torch.nan, torch.nan
    together = kernels(qkv, dout, [33, 20, 9], scale=0.3)
    alone = kernels(qkv[33:53], dout[33:53], [20], scale=0.3)
    assert all(torch.equal(x[33:53], y) for x, y in zip(together, alone, strict=True))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(dtype):
    qkv = rows_of().to(dtype)
    wide = torch.full((len(qkv) * 2, 4, 3, 24), torch.nan, dtype=dtype, device=DEVICE)
    view = wide[::2, :3, 1:, 3:19]
    view.copy_(qkv)
    dout = torch.ones_like(wide)[::2, 0, 1:, 3:19]
    wanted = kernels(qkv, dout.contiguous(), LENGTHS, scale=0.3)
    assert all(map(torch.equal, kernels(view, dout, LENGTHS, scale=0.3), wanted))


@triton.jit
def _keep_kernel(keep_ptr, seed_ptr, threshold, T, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    h = tl.program_id(0)
    seed = tl.load(seed_ptr)
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_keys = dropout.row_keys(seed, rows.to(tl.int64), h)
    keep = dropout.kept(row_keys[:, None], dropout.column_keys(seed, columns)[None, :], threshold)
    offsets = rows[:, None] * T + columns[None, :]
    tl.store(keep_ptr + h * T * T + offsets, keep, mask=(rows < T)[:, None] & (columns < T)[None, :])


def kept(p, seed, T, heads=2):
    """(H, T, T): what dropout multiplies probabilities by."""
    keep = torch.zeros((heads, T, T), dtype=torch.bool, device=DEVICE)
    columns = triton.next_power_of_2(T)
    _keep_kernel[(heads, triton.cdiv(T, 16))](keep, seed, dropout.threshold(p), T, ROWS=16, COLUMNS=columns)
    assert not torch.equal(keep[0], keep[1])
    return keep / (1 - p)


@runs
@pytest.mark.parametrize(("p", "dtype"), [(0.1, torch.float32), (0.6, torch.float32), (0.6, torch.float16)])
def test_dropout(nan_filled, dtype, p):
    qkv, seed = rows_of(), torch.tensor([2**40 + 5], device=DEVICE)
    check(dtype, qkv, keep=kept(p, seed, len(qkv)), dropout_p=p, seed=seed)


BERT = (64, torch.bfloat16)


@runs
@pytest.mark.skipif(INTERPRETED, reason="lengths that the tuned tiles are for take the interpreter minutes")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("lengths", "dim", "dtype"),
    [
        *(([513, 300, 0, 129, 1, 128], dim, torch.bfloat16) for dim in (32, 64, 80, 128)),
        ([512, 300, 0, 129, 1, 128], 64, torch.float16),
        *((lengths, *BERT) for lengths in ([256, 97, 300], [200, 97], [128, 5, 64], [64, 10], [32, 3], [16, 9])),
    ],
    ids=str,
)
def test_the_gpus_own_tiles(nan_filled, lengths, dim, dtype, p):
    """Every class of lengths there is, as the launchers cut and load it here: wide steps, descriptors, dQ with dK."""
    qkv, seed = rows_of(lengths, dim=dim), torch.tensor([2**40 + 5], device=DEVICE)
    dropped = {"keep": kept(p, seed, len(qkv)), "dropout_p": p, "seed": seed} if p else {}
    check(dtype, qkv, lengths, scale=dim**-0.5, **dropped)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(nan_filled, dtype):
    """Of hundreds, which a sum of exponentials overflows; one-hot softmaxes, whose gradients nearly vanish."""
    qkv = rows_of(scale=20.0)
    out, dqkv = kernels(qkv.to(dtype), torch.ones_like(qkv[:, 0]).to(dtype), LENGTHS, scale=1.0)
    assert dqkv.isfinite().all()
    inputs = [qkv.to(dtype).double()]
    exact = naive(*inputs, LENGTHS, 1.0)
    (floor,) = floors_of_rounding(lambda drawn: [naive(*drawn, LENGTHS, 1.0)], inputs, [exact], dtype)
    assert_accurate(out, naive(qkv.to(dtype), LENGTHS, 1.0), exact, inherent=floor)


@runs
def test_descriptors_read_the_same(monkeypatch):
    """The tensor memory accelerator's path; rows not 16 bytes apart take the other one."""
    qkv, dout = rows_of().half(), torch.ones(sum(LENGTHS) + TAIL, 2, 16, device=DEVICE).half()
    wanted = kernels(qkv, dout, LENGTHS, scale=0.3)
    real, made = configs.attention, []
    monkeypatch.setattr(configs, "attention", lambda *args, **kwargs: replace(real(*args, **kwargs), tma=True))
    for module in (attention, attention_bwd):
        descriptor = module.descriptor
        monkeypatch.setattr(module, "descriptor", lambda *args, make=descriptor: made.append(make(*args)) or made[-1])
    assert all(map(torch.equal, kernels(qkv, dout, LENGTHS, scale=0.3), wanted))
    assert len(made) == (4 if INTERPRETED else 3)  # there a tile has all keys of a sequence: no dQ kernel
    odd = torch.zeros(len(qkv), 3 * 2 * 16 + 1, device=DEVICE).half()[:, :96].view(qkv.shape)
    odd.copy_(qkv)
    assert all(map(torch.equal, kernels(odd, dout, LENGTHS, scale=0.3), wanted))
    assert len(made) == (4 if INTERPRETED else 3)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_op(dtype):
    qkv = rows_of(tail=0).to(dtype).requires_grad_()
    cu_seqlens = cu_seqlens_of(LENGTHS)
    out = op.run_triton(qkv, cu_seqlens, 33, scale=None, dropout_p=0.0)
    with torch.no_grad():
        assert torch.equal(op.run_triton(qkv, cu_seqlens, 33, scale=None, dropout_p=0.0), out)
    dout = torch.ones(1, 1, 1, dtype=dtype, device=DEVICE).expand(out.shape)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    eager = naive_gradient(qkv.detach(), dout, LENGTHS, 0.25)
    exact = naive_gradient(qkv.detach().double(), dout.double(), LENGTHS, 0.25)
    assert_accurate(out, eager[0], exact[0])
    assert_accurate(dqkv, eager[1], exact[1])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 5, 16).permute(2, 1, 0, 3),  # a head's tokens together: a row spans them all
        torch.zeros(1, 3, 2, 16).expand(5, 3, 2, 16),
        torch.zeros(5, 3, 16, 2).mT,
        torch.empty((5, 3, 2, 16), device="meta").as_strided((5, 3, 2, 16), (1 << 24, 32, 16, 1)),
    ],
    ids=["heads outside", "expanded", "columns apart", "far apart"],
)
def test_rows_that_the_kernels_do_not_read(x):
    assert op.rows_in_memory(x).is_contiguous() and op.rows_in_memory(x).shape == x.shape
    rows = torch.zeros(5, 4, 2, 24)[:, :3, :, :16]
    assert op.rows_in_memory(rows) is rows


@runs
def test_op_dropout_follows_torchs_seed():
    lengths = [5, 17]
    qkv = rows_of(lengths, tail=0).requires_grad_()

    def run(seed):
        torch.manual_seed(seed)
        out = op.run_triton(qkv, cu_seqlens_of(lengths), 17, scale=None, dropout_p=0.3)
        return out, torch.autograd.grad(out.sum(), qkv)[0]

    first = run(1)
    assert all(map(torch.equal, first, run(1)))
    assert not torch.equal(first[0], run(2)[0])


@runs
def test_layers_share_a_schedule(monkeypatch):
    made = []
    real = attention.tile_schedule
    monkeypatch.setattr(attention, "tile_schedule", lambda *args: made.append(1) or real(*args))
    qkv = rows_of([5, 17], tail=0)

    def layers(cu_seqlens):
        made.clear()
        outs = [op.run_triton(qkv, cu_seqlens, 20, scale=None, dropout_p=0.0) for _ in range(2)]
        assert all(torch.equal(outs[0], out) for out in outs)
        return len(made)

    cu_seqlens = cu_seqlens_of([5, 17])
    assert layers(cu_seqlens) == 2
    with op.shared_schedules():
        assert layers(cu_seqlens) == 1
        assert layers(cu_seqlens) == 0
        assert layers(cu_seqlens_of([20, 2])) == 1
    assert layers(cu_seqlens) == 2, "a schedule outlived the run through the layers"


def test_a_model_shares_one_schedule_among_its_layers(monkeypatch):
    """In training too, where each layer is run by itself."""
    model = fastbert.BertModel(fastbert.BertConfig(**TINY))
    seen = []
    monkeypatch.setattr(ops, "attention", lambda qkv, *args, **kwargs: seen.append(op._shared.get()) or qkv[:, 0])
    model(torch.ones(2, 5, dtype=torch.long))
    assert len(seen) == TINY["num_hidden_layers"] and seen[0] is not None and len(set(map(id, seen))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qkv": torch.empty(4, 3, 1, 136)}, "head dim 136"),
        ({"qkv": torch.empty(1, 3, 70000, 1)}, "70000 heads"),
        ({"cu_seqlens": torch.empty(3, device="meta")}, "cu_seqlens on meta"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"scale": float("nan")}, "scale nan"),
    ],
)
def test_says_what_it_cannot_take(monkeypatch, change, reason):
    call = {"qkv": torch.empty(4, 3, 1, 16), "cu_seqlens": torch.empty(3), "max_seqlen": 4, "scale": None}
    assert "not on cpu" in op.supports_triton(**call, dropout_p=0.0)
    monkeypatch.setattr(op, "reason_against", lambda *tensors: None)
    assert op.supports_triton(**call, dropout_p=0.0) is None
    assert reason in op.supports_triton(**call | change, dropout_p=0.0)


def test_dispatched_on_a_gpu():
    assert fastbert.ops.dispatch.TABLE["attention"]["cuda"][0] == "triton"


# What spilled by triton 3.6 or 3.7 and was let pass, by target, dtype, head dim, kernel (see Compiled.spilled): most at
# any length, with dropout; 0 elsewhere. Products of fp32 in scalars keep whole rows in registers; dK and dV of
# 128 columns are half of what a thread has, and dQ next to them more; triton 3.6 leaves AMD's a few short.
SPILLS = {
    **{(target, torch.float32, dim, "bwd_dq"): 208 for target in ("sm_80", "sm_90") for dim in (64, 80, 96, 128)},
    **{(target, torch.float32, dim, "bwd_dkdv"): 296 for target in ("sm_80", "sm_90") for dim in (64, 80, 96, 128)},
    ("sm_80", torch.float32, 16, "bwd_dkdv"): 8,
    ("sm_80", torch.bfloat16, 16, "fwd"): 8,
    ("sm_80", torch.bfloat16, 128, "bwd_dkdv"): 8,
    ("sm_90", torch.bfloat16, 80, "bwd_dkdv"): 56,
    ("sm_90", torch.bfloat16, 96, "bwd_dkdv"): 56,
    ("sm_90", torch.bfloat16, 128, "bwd_dkdv"): 56,
    ("gfx942", torch.bfloat16, 64, "bwd_dkdv"): 30,
    ("gfx942", torch.bfloat16, 80, "bwd_dkdv"): 2,
    ("gfx942", torch.bfloat16, 128, "bwd_dkdv"): 2,
}


def compiled(target, dtype, dim=64, max_seqlen=512, p=0.0, precision="ieee"):
    qkv = torch.empty(1000, 3, 12, dim, dtype=dtype)
    cu_seqlens = torch.zeros(5, dtype=torch.int32)
    kwargs = {"scale": 0.1, "dropout_p": p, "seed": torch.zeros(1, dtype=torch.int64), "precision": precision}
    with compiling_for(target) as kernels:
        out, statistics = attention.attention_fwd(qkv, cu_seqlens, max_seqlen, **kwargs)
        attention_bwd.attention_bwd(torch.empty_like(out), qkv, out, statistics, cu_seqlens, max_seqlen, **kwargs)
    names = [kernel.name.strip("_").removesuffix("_kernel").removeprefix("attention_") for kernel in kernels]
    one_launch = configs.attention_in_one_launch(target, dtype, dim, max_seqlen)  # dK and dV have dQ with them
    assert names == ["tile_schedule", "fwd", "tile_schedule", *([] if one_launch else ["bwd_dq"]), "bwd_dkdv"]
    return {name: kernel for name, kernel in zip(names, kernels, strict=True)}


def check_all(target, dtype, dim=64, **kwargs):
    kernels = compiled(target, dtype, dim, **kwargs)
    for name, kernel in kernels.items():
        check_resources(kernel, SPILLS.get((target, dtype, dim, name), 0))
    return kernels


@compiles
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("target", COMPILED)
def test_compiles(target, dtype, p):
    check_all(target, dtype, 64 if dtype == torch.bfloat16 else 32, p=p)


@compiles
def test_compiles_in_scalars_and_in_tf32():
    for precision in ("ieee", "tf32"):
        check_all("sm_80", torch.float32, precision=precision)


@compiles
@pytest.mark.parametrize("dim", [80, 128])
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_for_head_dims(target, dim):
    check_all(target, torch.bfloat16, dim)


@compiles
@pytest.mark.parametrize(
    ("target", "dtype", "dim", "max_seqlen"),
    [
        *(("sm_90", torch.bfloat16, dim, n) for dim, n in ((80, 32), (128, 512))),
        pytest.param("sm_90", torch.bfloat16, 128, 128, marks=pytest.mark.slow),
        pytest.param("sm_80", torch.bfloat16, 128, 64, marks=pytest.mark.slow),
        ("sm_90", torch.float32, 128, 512),
    ],
)
def test_compiles_for_wide_heads_with_dropout(target, dtype, dim, max_seqlen):
    check_all(target, dtype, dim, max_seqlen=max_seqlen, p=0.1)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", COMPILED[:2])
def test_spills(target, dtype, dim):
    for max_seqlen in (16, 32, 64, 128, 512) if dtype == torch.bfloat16 else (16, 512):
        for options in ({}, {"p": 0.1}):
            check_all(target, dtype, dim, max_seqlen=max_seqlen, **options)


@compiles
@pytest.mark.parametrize(
    ("target", "max_seqlen"),
    [
        *(("sm_90", n) for n in (16, 32, 64, 128, 200)),
        *(pytest.param("sm_80", n, marks=pytest.mark.slow) for n in (64, 128)),
    ],
)
def test_compiles_for_short_sequences(target, max_seqlen):
    assert configs.attention_in_one_launch("sm_90", torch.bfloat16, 64, max_seqlen) == (max_seqlen <= 128)
    check_all(target, torch.bfloat16, max_seqlen=max_seqlen)


@compiles
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_hopper_runs_on_its_tensor_cores(p):
    """wgmma for every product, and operands that arrive by the tensor memory accelerator while it works."""
    kernels = compiled("sm_90", torch.bfloat16, p=p)
    for name in ("fwd", "bwd_dq", "bwd_dkdv"):
        assembly = kernels[name].assembly
        assert "wgmma.mma_async" in assembly and "mma.sync" not in assembly, name
        assert "cp.async.bulk.tensor.2d" in assembly, name


def compiled_candidate(candidate, dim, max_seqlen):
    with candidate.taken():
        kernels = compiled("sm_90", torch.bfloat16, dim, max_seqlen)
    return kernels[{"fwd": "fwd", "dq": "bwd_dq"}.get(candidate.kernel, "bwd_dkdv")]


@compiles
def test_tuner_takes_its_candidates():
    """Of each kernel the first: the launchers compile it, and afterwards their own again."""
    before = configs.attention("fwd", "sm_90", torch.bfloat16, 64, 128)
    for name in tune_attention.CANDIDATES:
        candidate = next(c for c in tune_attention.candidates(64, 128) if c.kernel == name)
        kernel = compiled_candidate(candidate, 64, 128)
        assert (kernel.num_warps, kernel.num_stages) == (candidate.config.num_warps, candidate.config.num_stages)
        assert configs.attention("fwd", "sm_90", torch.bfloat16, 64, 128) == before


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("max_seqlen", [128, 512])
@pytest.mark.parametrize("dim", [32, 64])
def test_no_candidate_of_the_tuner_spills(dim, max_seqlen):
    for candidate in tune_attention.candidates(dim, max_seqlen):
        check_resources(compiled_candidate(candidate, dim, max_seqlen))
