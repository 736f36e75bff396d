"""csrc/cuda without a GPU: its sources as C++ with fibers for threads (cuda_emulation.h), against the reference."""

import ctypes
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import require_native
from test_packing_device import DTYPES, check, masks

from fastbert import native, reference

# By import_module: as attributes of the package they are the functions in them.
native_packing = importlib.import_module("fastbert.native.packing")
TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"
COMPILER = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(not shutil.which(COMPILER), reason="no C++ compiler")
ORDERS = {"forward": 0, "backward": 1, "random": 2}
LAUNCH = r"(\w+(?:<[^<>;]*>)?)<<<(.+?)>>>\((.*?)\);"


def compiled(sources: list[Path], folder: Path) -> Path:
    """CUDA sources and what calls them, as a library for this processor."""
    (folder / "cuda_runtime.h").write_text('#include "cuda_emulation.h"\n')
    files = []
    for source in sources:
        files.append(folder / f"{source.stem}_rewritten.cpp")
        files[-1].write_text(re.sub(LAUNCH, r"emulation::launch([=] { \1(\3); }, \2);", source.read_text()))
    # A GPU takes no address that a load is not aligned to: here it is a trap.
    flags = [
        "-std=c++20",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        "-fsanitize=alignment",
        "-fsanitize-undefined-trap-on-error",
    ]
    includes = [f"-I{path}" for path in (folder, TESTS, CSRC / "include", CSRC / "cuda")]
    library = folder / "emulated.so"
    subprocess.run([COMPILER, *flags, *includes, *files, "-o", library], check=True)
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    require_native()
    sources = [*CSRC.glob("cuda/*.cu"), TESTS / "cuda_emulation.cpp"]
    return ctypes.CDLL(str(compiled(sources, tmp_path_factory.mktemp("cuda"))))


@pytest.fixture(params=ORDERS)
def emulated(request, library, monkeypatch):
    """The functions of fastbert.native that launch CUDA take tensors of the CPU, and run the emulated kernels."""
    library.set_order(ORDERS[request.param])

    def call(name):
        def run(*arguments):
            status = getattr(library, name)(*map(ctypes.c_int64, arguments[:-2]))  # no device, no stream
            assert status == 0, (name, status)

        return run

    extension = SimpleNamespace(
        has_cuda=True,
        pack_mask_workspace=lambda positions: library.workspace(ctypes.c_int64(positions)),
        pack_mask_cuda=call("pack_mask"),
        gather_rows_cuda=call("gather_rows"),
    )
    monkeypatch.setattr(native_packing, "C", extension)
    monkeypatch.setattr(native_packing, "_cuda_reason", lambda x: None)
    monkeypatch.setattr(native_packing, "_where", lambda x: (0, 0))
    return native


@pytest.mark.parametrize("kind", masks())
def test_pack_mask(emulated, kind):
    mask = masks()[kind]
    check(emulated.pack_mask(mask), mask)


@pytest.mark.slow
def test_more_tiles_than_one_round_of_the_scan(emulated):
    mask = (torch.rand(1030, 8192) < 0.6).long()
    check(emulated.pack_mask(mask), mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (5, 9), (3, 8193)])
def test_masks_of_every_dtype(emulated, shape, dtype):
    mask = torch.rand(shape) < 0.5
    found, expected = emulated.pack_mask(mask.to(dtype)), reference.pack_mask(mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [2, -1])
@pytest.mark.parametrize("shape", [(2, 3), (3, 8193)])
def test_a_mask_of_other_numbers(emulated, shape, value):
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, -2] = value
    cu_seqlens, _, places, bad = emulated.pack_mask(mask)
    assert bad.item() == 1 and cu_seqlens[-1] == mask.numel() - 1 and places[-2] == -1


@pytest.mark.parametrize("x", [
    torch.randint(0, 99, (77,)),
    torch.randn(77, 6),
    torch.randn(77, 3).half(),
    torch.randn(77, 5) > 0,
    torch.randn(77, 40).bfloat16()[:, :32],
    torch.randn(77, 40).bfloat16()[:, 1:34],
    torch.randn(77, 2, 1100),
    torch.randn(0, 4),
], ids=lambda x: f"{x.dtype} {tuple(x.shape)}")  # fmt: skip
def test_gather_rows(emulated, x):
    index = torch.randint(-1, len(x) + 1, (300,))
    y = emulated.gather_rows(x, index)
    real = (index >= 0) & (index < len(x))
    assert torch.equal(y[real], x[index[real]]) and not y[~real].any()
    assert emulated.gather_rows(x, index[:0]).shape == (0, *x.shape[1:])


@pytest.mark.parametrize("body", ["if (threadIdx.x) __syncthreads();", "__shfl_sync(~0u, 1, 0);"])
def test_threads_that_do_not_meet_end_the_program(tmp_path, body):
    """The second: a block that is no whole number of warps."""
    source = tmp_path / "kernel.cu"
    kernel = '#include "cuda_runtime.h"\n__global__ void kernel(int) { ' + body + " }\n"
    source.write_text(kernel + 'extern "C" void run() { kernel<<<1, 48, 0, nullptr>>>(0); }')
    code = f"import ctypes; ctypes.CDLL({str(compiled([source], tmp_path))!r}).run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT and "threads that have gone on or ended" in done.stderr
