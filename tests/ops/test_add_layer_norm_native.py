"""fastbert.native and the extension behind it: every instruction set this machine has, one by one."""

import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support import ISAS, assert_accurate, force_isa, require_native

from fastbert import native
from fastbert.native import extension

EPS = 1e-12  # what BERT uses


def example(M, N, dtype, *, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    tensors = draw(M, N) + shift, draw(M, N), 1 + 0.1 * draw(N), draw(N)
    return tuple(t.to(dtype) for t in tensors)


def exact(x, residual, weight, bias, eps=EPS):
    x, weight, bias = x.double(), weight.double(), bias.double()
    if residual is not None:
        x = x + residual.double()
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def eager(x, residual, weight, bias, eps=EPS):
    return F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, eps)


def check_accuracy(actual, *inputs):
    assert_accurate(actual, eager(*inputs), exact(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 2, 15, 17, 63, 111, 384, 768, 1000])
@pytest.mark.parametrize("M", [1, 63, 111])
@pytest.mark.parametrize("with_residual", [True, False])
def test_accuracy(isa, M, N, dtype, with_residual):
    x, residual, weight, bias = example(M, N, dtype)
    residual = residual if with_residual else None
    y = native.add_layer_norm(x, residual, weight, bias, eps=EPS)
    check_accuracy(y, x, residual, weight, bias)


@pytest.mark.parametrize("N", [1, 2, 63, 768, 1000])
def test_bf16_is_fp32_rounded_once(isa, N):
    inputs = example(63, N, torch.bfloat16)
    wide = native.add_layer_norm(*(t.float() for t in inputs), eps=EPS)
    assert torch.equal(native.add_layer_norm(*inputs, eps=EPS), wide.bfloat16())


@pytest.mark.parametrize("shift", [30.0, 1000.0])
def test_accuracy_where_the_mean_is_large(isa, shift):
    x, residual, weight, bias = example(64, 768, torch.float32, shift=shift)
    y = native.add_layer_norm(x, residual, weight, bias, eps=EPS)
    check_accuracy(y, x, residual, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows_and_no_columns(isa, dtype):
    for M, N in ((0, 768), (0, 0), (3, 0)):
        x, residual, weight, bias = example(M, N, dtype)
        assert native.add_layer_norm(x, residual, weight, bias, eps=EPS).shape == (M, N)


def test_eps_counts(isa):
    x, residual, weight, bias = example(5, 63, torch.float32)
    y = native.add_layer_norm(x, residual, weight, bias, eps=0.5)
    torch.testing.assert_close(y.double(), exact(x, residual, weight, bias, 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_unaligned_addresses(isa, dtype):
    x, residual, weight, bias = (t[..., 1:-2] for t in example(63, 114, dtype))
    assert not x.is_contiguous()
    y = native.add_layer_norm(x, residual[::2].repeat_interleave(2, 0)[:63], weight, bias, eps=EPS)
    dense = native.add_layer_norm(
        *(t.contiguous() for t in (x, residual[::2].repeat_interleave(2, 0)[:63], weight, bias)), eps=EPS
    )
    assert torch.equal(y, dense)
    every_other = native.add_layer_norm(x[::2], residual[::2], weight, bias, eps=EPS)
    assert torch.equal(every_other, native.add_layer_norm(x, residual, weight, bias, eps=EPS)[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_mates_nor_on_threads(isa, dtype):
    inputs = example(300, 768, dtype)
    x, residual, weight, bias = inputs
    before = [t.clone() for t in inputs]
    y = native.add_layer_norm(*inputs, eps=EPS)
    assert torch.equal(y, native.add_layer_norm(*inputs, eps=EPS))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was changed"
    alone = [native.add_layer_norm(x[m : m + 1], residual[m : m + 1], weight, bias, eps=EPS) for m in (0, 7, 299)]
    assert torch.equal(y[[0, 7, 299]], torch.cat(alone))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(y, native.add_layer_norm(*inputs, eps=EPS))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_written_beside_the_output(isa, dtype):
    _C = extension.C
    for N in (1, 5, 17, 63, 111):
        x, residual, weight, bias = example(7, N, dtype)
        y = torch.full((9, N + 3), 7.0, dtype=dtype)
        inner = y[1:-1, 1:-2]
        addresses = [t.data_ptr() for t in (x, residual, weight, bias, inner)]
        code = {torch.float32: _C.F32, torch.bfloat16: _C.BF16}[dtype]
        _C.add_layer_norm_cpu(
            *(code, 7, N, addresses[0], N, addresses[1], N, addresses[2], False, *addresses[3:], N + 3, 0, EPS),
            *(_C.isa_id(isa), 1),
        )
        assert torch.equal(inner, native.add_layer_norm(x, residual, weight, bias, eps=EPS))
        inner.fill_(7.0)
        assert (y == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_row(isa, dtype):
    x, residual, weight, bias = example(4, 63, dtype)
    good = native.add_layer_norm(x, residual, weight, bias, eps=EPS)
    x[1, 62], x[2, 0] = float("nan"), float("inf")
    y = native.add_layer_norm(x, residual, weight, bias, eps=EPS)
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert torch.equal(y[[0, 3]], good[[0, 3]])


REFUSED = {
    "dtype torch.float16": {"dtype": torch.float16},
    "dtype torch.float64": {"dtype": torch.float64},
    "mixed dtypes torch.float32 and torch.bfloat16": {"weight": torch.ones(8, dtype=torch.bfloat16)},
    "mixed devices cpu and meta": {"bias": torch.ones(8, device="meta")},
    "device meta": {"device": "meta"},
    "last dimension not contiguous": {"x": torch.ones(8, 4).t()},
    "x has 3 dimensions": {"x": torch.ones(2, 2, 8)},
    "shape (4, 9) next to x (4, 8)": {"residual": torch.ones(4, 9)},
    "shape (7,) next to x (4, 8)": {"bias": torch.ones(7)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_reasons(reason):
    require_native()
    change = dict(REFUSED[reason])
    where = {"dtype": change.pop("dtype", torch.float32), "device": change.pop("device", "cpu")}
    arguments = {
        "x": torch.ones(4, 8, **where),
        "residual": torch.ones(4, 8, **where),
        "weight": torch.ones(8, **where),
        "bias": torch.ones(8, **where),
        "eps": EPS,
    } | change
    assert native.supports_add_layer_norm(**arguments) == reason


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    require_native()
    force_isa(monkeypatch, "avx9")
    try:
        with pytest.raises(
            ValueError,
            match=r"FASTBERT_ISA=avx9: unknown.*amx, avx512_bf16, .*avx2, neon_bf16, neon_dot, neon, portable",
        ):
            native.isa()
        with pytest.raises(ValueError, match="FASTBERT_ISA=avx9"):
            native.add_layer_norm(*example(2, 8, torch.float32), eps=EPS)
    finally:
        extension.chosen_isa.cache_clear()


def test_an_instruction_set_the_machine_lacks_is_an_error(monkeypatch):
    require_native()
    with pytest.raises(ValueError, match="no instruction set of number 9"):
        extension.C.add_layer_norm_cpu(*[0] * 13, EPS, 9, 1)
    lacking = [name for name in ISAS if name not in native.isas()]
    if not lacking:
        pytest.skip("this machine has them all")
    force_isa(monkeypatch, lacking[0])
    try:
        with pytest.raises(ValueError, match=f"FASTBERT_ISA={lacking[0]}: this CPU or this build has no"):
            native.isa()
    finally:
        extension.chosen_isa.cache_clear()


def run_python(code, **env):
    """The output of a fresh interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "FASTBERT_ISA"} | env
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"), reason="not Linux on x86"
)
def test_the_extension_is_built_for_tests():
    """Or the tests of AMX would be skipped on every processor without it."""
    require_native()
    with pytest.raises(ValueError, match="unknown instruction set") as error:
        extension.C.isa_id("avx9")
    hint = "it was built without FASTBERT_AMX_EMULATION=ON; `make install` sets it"
    assert set(ISAS) <= {*str(error.value).rpartition("known: ")[2].split(", ")}, hint


BF16_PRODUCTS = """
import torch
from fastbert import native, ops
from fastbert.native.extension import C
torch.manual_seed(0)
x, weight = torch.randn(40, 300).bfloat16(), torch.randn(70, 300).bfloat16()
try:
    y, exact = ops.linear(x, weight), x.double() @ weight.double().T
    close = (y.double() - exact).abs().max() <= exact.abs().max() / 256
    print(native.isa(), C.widens_bf16(C.isa_id(native.isa())), close.item())
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("choice", ["pairs", "wide", "quads"])
def test_the_products_of_bf16_can_be_chosen_where_there_are_two(choice):
    found = [isa for isa in native.real_isas() if isa in ("avx512_bf16", "neon_bf16")]
    if not found:
        pytest.skip("there is one product of bf16")
    out = run_python(BF16_PRODUCTS, FASTBERT_ISA=found[0], FASTBERT_BF16=choice)
    if choice == "quads":
        assert "FASTBERT_BF16 is quads; it must be pairs or wide" in out
    else:
        assert out.split() == [found[0], str(choice == "wide"), "True"]


@pytest.mark.parametrize(
    "isa", [isa for isa in native.real_isas() if isa in ("avx512_vnni", "avx512", "avx2", "portable")]
)
def test_bf16_is_multiplied_as_fp32_where_there_is_no_product_of_it(isa):
    assert run_python(BF16_PRODUCTS, FASTBERT_ISA=isa).split() == [isa, "True", "True"]


# Machine code, which ends in `ret`, and how the process ends; to come from a process in which AMX is emulated.
MACHINE_CODE = {
    "ud2": ("0f0b", -signal.SIGILL, "Fatal Python error: Illegal instruction"),
    "tilezero before ldtilecfg": ("c4e27b49c0", -signal.SIGABRT, "a tile before ldtilecfg, or after tilerelease"),
    "tileloadd before ldtilecfg": ("c4e27b4b1c27", -signal.SIGABRT, "a tile before ldtilecfg, or after tilerelease"),
    "tdpbssd, which no kernel uses": ("c4e2535ec4", -signal.SIGILL, "Illegal instruction"),
    "tdpbf16ps after tilerelease": ("c4e27849c0c4e2525cc4", -signal.SIGABRT, "a tile before ldtilecfg"),
    "tilerelease": ("c4e27849c0", 0, ""),
}


@pytest.mark.parametrize("name", MACHINE_CODE)
def test_emulating_amx_lets_no_other_instruction_pass(name):
    require_native()
    if "amx_emulated" not in native.isas():
        pytest.skip("AMX is here, or cannot be emulated here")
    machine_code, code, message = MACHINE_CODE[name]
    script = f"""
import ctypes, faulthandler, mmap
import torch
from fastbert import native

faulthandler.enable()
native.linear(torch.ones(3, 64), torch.ones(5, 64), precision="high")
memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex("{machine_code}c3"))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
"""
    env = os.environ | {"FASTBERT_ISA": "amx_emulated"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and message in done.stderr, done.stderr


def test_the_choice_in_a_fresh_process():
    require_native()
    code = (
        "import os; from fastbert import native; from fastbert.native import extension; print(native.isa());"
        "extension.chosen_isa.cache_clear(); os.environ['FASTBERT_ISA'] = ''; print(native.isa())"
    )
    assert run_python(code, FASTBERT_ISA="portable").split() == ["portable", native.isas()[0]]


def test_the_extension_imports_without_torch():
    require_native()
    out = run_python(
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('_C', {extension.C.__file__!r})\n"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "print(m.isas(), 'torch' in sys.modules)"
    )
    assert out == f"{native.isas()} False"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_is_shared_with_torch():
    require_native()
    if not extension.C.has_openmp:
        pytest.skip("built without OpenMP")
    out = run_python(
        "import torch\nfrom fastbert import native\n"
        "x = torch.randn(512, 768)\n"
        "native.add_layer_norm(x, x, x[0], x[0], eps=1e-12); torch.nn.functional.layer_norm(x, (768,))\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    assert out == "1"
