"""What the tests of Triton kernels share: a GPU or the interpreter to run on, and compiling for GPUs not there.

The interpreter is chosen when triton is imported. So the files of kernel tests, where there is no GPU, run once more in
processes with TRITON_INTERPRET=1 (tests/ops/test_triton_interpreted.py). It computes bf16 wrongly, so RUN_DTYPES has
none; as it is slow, most cases in fp16 are of `make test-slow`. What it does over and over, to no effect, is left out
there (`_without_idle_work`).
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import poisoned_memory

triton = pytest.importorskip("triton")
tl = triton.language

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUN_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)] if INTERPRETED else RUN_DTYPES
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TARGETS = ("sm_80", "sm_90", "gfx942")
# Each kernel is compiled for the GPU that the figures are of; for the others, which take minutes, in `make test-slow`.
COMPILED = ("sm_90", *(pytest.param(target, marks=pytest.mark.slow) for target in ("sm_80", "gfx942")))
# Bytes of shared memory that one program may use: CUDA C++ Programming Guide, compute capabilities; CDNA 3 ISA guide.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}

runs = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU; run in the interpreter instead"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
in_the_interpreter = pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process"
)


def run_in_the_interpreter(files: Sequence[Path], marked: str = "not slow") -> None:
    """Runs test files once more, where their kernels run on the CPU; fails as they fail, and if nothing of one ran.

    Of each file those tests alone whose marks are as `marked` says.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rsp", "-m", marked, "-p", "no:cacheprovider", *map(str, files)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        assert re.search(rf"^PASSED \S*{file.name}::", done.stdout, re.M), f"{file.name}: no test ran\n{done.stdout}"


def _without_idle_work() -> None:
    """Makes the interpreter twice as fast; what it computes, and in what order, stays.

    At each call of a device function it looks through all of triton.language for what to replace by versions in numpy,
    which the launch has done already: once a launch and module is enough. It computes in 64 bits again what each
    integer sum, difference and product is, for an assertion about overflow that it makes only in debug mode. It writes
    the table of numpy's types again to read one of them. And a scan calls its operator for one number at a time, where
    a whole row goes through the same steps.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # before triton 3.7: as it is there
        return
    replace_in, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()  # the globals of the functions that this launch has replaced in

    def once(fn):
        if id(fn.__globals__) in done:
            return interpreter._LangPatchScope()  # nothing to undo
        done.add(id(fn.__globals__))
        return replace_in(fn)

    def launch_anew(self, *args, **kwargs):
        done.clear()  # at its end, a launch undoes what it replaced
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch_anew
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    numpy_type = functools.cache(interpreter._get_np_dtype)  # blocks and pointers have no hash
    interpreter._get_np_dtype = lambda kind: numpy_type(tl.uint64 if kind.scalar.is_ptr() else kind.scalar)
    interpreter.ScanOps.generic_scan = _scan_by_rows


def _scan_by_rows(self, inputs):
    """triton.runtime.interpreter.ScanOps.generic_scan, a row (all that has one index on the axis) at a time."""
    rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    scanned = [[row[0]] for row in rows]
    for i in range(1, len(rows[0])):
        before, here = (
            [self.to_tensor(value, x.dtype) for value, x in zip(values, inputs, strict=True)]
            for values in ([done[-1] for done in scanned], [row[i] for row in rows])
        )
        got = self.combine_fn.fn(*before, *here)
        for done, value in zip(scanned, got if isinstance(got, tuple) else (got,), strict=True):
            done.append(value.handle.data.reshape(done[0].shape))
    stacked = [np.stack(done, self.axis) for done in scanned]
    return [self.to_tensor(values, x.dtype) for values, x in zip(stacked, inputs, strict=True)]


if INTERPRETED:
    _without_idle_work()


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """An element never written shows."""
    with poisoned_memory():
        yield


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target, by the launcher's own arguments."""

    name: str
    target: str
    assembly: str  # PTX, or AMD's
    shared: int  # bytes a program
    spilled: int  # NVIDIA: bytes of stack a thread; AMD: vector registers spilled
    registers: int
    num_warps: int
    num_stages: int


@contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Within it, a launch (of a launcher given CPU tensors) only compiles for `target` and adds to the list.

        with compiling_for("sm_90") as compiled:
            add_layer_norm_fwd(x, residual, weight, bias, eps=1e-12)

    The launcher's own choices for `target` are what is compiled: it sees that architecture, 132 multiprocessors.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fastbert.kernels import architecture

    compiled: list[Compiled] = []
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_describe(kernel, target))
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", only_compile)
        patch.setattr(architecture, "architecture", lambda device: target)
        patch.setattr(architecture, "multiprocessors", lambda device: 132)
        patch.setattr(driver, "_active", _Driver(target))  # set_active's undoing would look for a GPU
        yield compiled


def check_resources(kernel: Compiled, spill_allowance: int = 0) -> None:
    """Shared memory inside the chip's limit, no more spilled than was allowed."""
    assert kernel.shared <= SHARED_LIMIT[kernel.target], kernel
    assert kernel.spilled <= spill_allowance, f"{kernel.name} for {kernel.target} spills {kernel.spilled}"


class _Driver:
    """What triton's compiler asks of a driver, answered for a GPU that is not there."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # compiled kernels are kept by device

    def get_current_stream(self, device) -> int:
        return 0


def _describe(kernel, target: str) -> Compiled:
    metadata = kernel.metadata
    if "cubin" in kernel.asm:
        assembly, usage = kernel.asm["ptx"], _resource_usage(kernel.asm["cubin"])
        spilled, registers = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("STACK", "REG"))
    else:
        assembly = kernel.asm["amdgcn"]
        spilled, registers = (
            int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1]) for key in ("vgpr_spill_count", "vgpr_count")
        )
    return Compiled(
        kernel.name, target, assembly, metadata.shared, spilled, registers, metadata.num_warps, metadata.num_stages
    )


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
