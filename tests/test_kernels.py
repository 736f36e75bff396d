"""The Triton kernels: run on a GPU, or else in Triton's interpreter; compiled for GPUs that are not there.

The interpreter is chosen when triton is imported, so without a GPU one test here runs this file once more in
a process with TRITON_INTERPRET=1. It computes bf16 wrongly, so bf16 runs on a GPU only.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
EPS = 1e-12

runs = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU; run in the interpreter instead"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@pytest.fixture
def nan_filled(monkeypatch):
    """torch.empty hands out NaN, so that an element never written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def example(M, N, dtype, *, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    tensors = draw(M, N) + shift, draw(M, N), 1 + 0.1 * draw(N), draw(N)
    return tuple(t.to(DEVICE, dtype) for t in tensors)


def check_add_layer_norm(x, residual, weight, bias):
    from fastbert.kernels.add_layer_norm import add_layer_norm_fwd

    before = [None if t is None else t.clone() for t in (x, residual, weight, bias)]
    y, mean, rstd = add_layer_norm_fwd(x, residual, weight, bias, eps=EPS)
    again = add_layer_norm_fwd(x, residual, weight, bias, eps=EPS)[0]
    assert torch.equal(y, again), "differs on a repeat"
    for tensor, copy in zip((x, residual, weight, bias), before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), "an input was changed"

    total = x.double() if residual is None else x.double() + residual.double()
    want = F.layer_norm(total, weight.shape, weight.double(), bias.double(), EPS)
    eager = F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, EPS)
    error, allowed = y.double() - want, eager.double() - want
    unit = torch.finfo(x.dtype).eps / 2
    rms = lambda t: t.square().mean().sqrt()  # noqa: E731
    assert y.dtype == x.dtype and y.shape == x.shape and y.isfinite().all()
    if y.numel():
        assert error.abs().max() <= 2 * allowed.abs().max() + 2 * unit * want.abs().max()
        assert rms(error) <= 2 * rms(allowed) + 2 * unit * rms(want)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), total.mean(1), rtol=1e-6, atol=1e-6)
    if x.shape[0] and x.shape[1] > 1:
        torch.testing.assert_close(rstd.double(), (total.var(1, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=1e-6)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 63, 111, 768, 1000])
@pytest.mark.parametrize("M", [0, 1, 7])
def test_add_layer_norm(nan_filled, M, N, dtype):
    x, residual, weight, bias = example(M, N, dtype)
    check_add_layer_norm(x, residual, weight, bias)
    check_add_layer_norm(x, None, weight, bias)


@runs
def test_add_layer_norm_where_the_mean_is_large(nan_filled):
    check_add_layer_norm(*example(7, 768, torch.float32, shift=1000.0))


@runs
def test_add_layer_norm_with_strides(nan_filled):
    check_add_layer_norm(*(t[..., 1:-2] for t in example(7, 114, torch.float32)))
    x, residual, weight, bias = example(14, 63, torch.float32)
    check_add_layer_norm(x[::2], residual[1::2], weight, bias)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("has_residual", [True, False])
def test_add_layer_norm_compiles(capability, dtype, has_residual):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastbert.kernels.add_layer_norm import _add_layer_norm_fwd_kernel, num_warps

    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr"), f"*{dtype}")
    statistics = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    scalars = {"stride_xm": "i64", "stride_rm": "i64", "stride_ym": "i64", "N": "i32", "eps": "fp32"}
    constants = {"HAS_RESIDUAL": has_residual, "BLOCK_N": 1024}
    source = ASTSource(
        fn=_add_layer_norm_fwd_kernel,
        signature=pointers | statistics | scalars | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps(1024)})
    assert f"sm_{capability}" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 0
