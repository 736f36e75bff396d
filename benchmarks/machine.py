"""The machine a benchmark runs on: its clock, its memory, its ceilings, and what a result row says of it."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastbert import native

REPOSITORY = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_PACKAGES = (
    *("torch", "transformers", "fastbert-engine", "tokenizers", "triton"),
    *("onnxruntime", "openvino", "nncf", "ctranslate2"),
)


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; auto is cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes: by CUDA events around it on an idle GPU, by the wall clock on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def time_on_device(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that the GPU takes for one call, the host's share left out; as `time_call` on a CPU.

    Before it the GPU reads 1 GiB twice. That takes it half a millisecond, in which the host gets ahead of it, and
    leaves its L2 full of other data, none of it still to be written back.
    """
    if device.type != "cuda":
        return time_call(run, device)
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):
        _gigabyte(device).sum()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def _gigabyte(device: torch.device) -> torch.Tensor:
    return torch.zeros(1 << 28, device=device)


def time_latency(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds by the wall clock from an idle device to an idle device: what a caller waits for one result."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[float, str]:
    """MB that one call needs above what was in use before it, and how that was measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6, "cuda allocated, above start"
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else a call reuses, unseen, what the call before it gave back
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use now
        before = _status_kb("VmRSS")
        run()
        return max(0, _status_kb("VmHWM") - before) / 1e3, "process RSS, peak above start"
    except (OSError, AttributeError, KeyError):  # not Linux with glibc
        run()
        unit = 1e6 if platform.system() == "Darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "process RSS, peak so far"


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])


# A slow multiplication is no limit where a faster one does as well: bf16 in fp32, bytes in either.
_AT_LEAST = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "fp16": ("bf16", "fp32"), "int8": ("int8", "bf16", "fp32")}
_peaks: dict[tuple[str, int], tuple[float, str]] = {}  # the best so far, and the instruction set that had it


def cpu_peak(kind: str) -> float:
    """FLOP/s of torch's threads over registers only ("fp32", "bf16", "int8"), or bytes/s read ("read").

    The best instruction set counts, and the best of all calls of this process: a share of it cannot pass 100 %
    because neighbours were busy while it was measured.

    Raises:
        RuntimeError: fastbert's extension is not there.
    """
    threads = torch.get_num_threads()
    best = _peaks.get((kind, threads))
    isas = [best[1]] if best else native.real_isas()[: 1 if kind == "read" else None]
    measured = [(native.peak(kind, isa, threads), isa) for isa in isas]
    _peaks[kind, threads] = max([*measured, best] if best else measured)
    return _peaks[kind, threads][0]


def ceiling(device: torch.device, dtype: str) -> tuple[float, str] | None:
    """FLOP/s that this machine reaches at most in a precision, measured now, and what was measured.

    Without fastbert's extension, and on a GPU, it is a large torch matmul; None where torch has none for it.
    """
    if device.type != "cpu" or native.available() is not None:
        known = dtype in DTYPES or (device.type == "cuda" and dtype == "int8")
        return matmul_ceiling(device, dtype) if known else None
    threads = torch.get_num_threads()
    if dtype == "fp32-high":  # at least three products of bf16, or one of fp32
        peak = max(cpu_peak("fp32"), cpu_peak("bf16") / 3)
        return peak, f"registers only, fp32 or a third of bf16, {threads} threads"
    return max(map(cpu_peak, _AT_LEAST[dtype])), f"registers only, {dtype}, {threads} threads"


@cache
def read_bandwidth(device: torch.device) -> float | None:
    """GB/s that torch's threads read from main memory, measured once; None on a GPU and without the extension."""
    if device.type != "cpu" or native.available() is not None:
        return None
    return cpu_peak("read") / 1e9


@cache
def matmul_ceiling(device: torch.device, dtype: str) -> tuple[float, str]:
    """FLOP/s of a large torch matmul on this machine, the best of several, and what it was."""
    size, repeats = (8192, 20) if device.type == "cuda" else (4096, 4)
    product = matmul(torch.randn(size, size, device=device), torch.randn(size, size, device=device), dtype)
    for _ in range(2):
        product()
    best = min(time_on_device(product, device) for _ in range(repeats))
    return 2 * size**3 / best, f"torch matmul {size}^3 {dtype}, best of {repeats}"


def matmul(a: torch.Tensor, b: torch.Tensor, dtype: str) -> Callable[[], torch.Tensor]:
    """A function that multiplies two matrices of torch.randn through torch in a precision; int8 on a GPU alone.

    The product of int8 is of a and b times 32.
    """
    if dtype == "int8":
        a, b = ((x * 32).round().clamp(-127, 127).to(torch.int8) for x in (a, b.t().contiguous()))
        return lambda: torch._int_mm(a, b.t())
    a, b = a.to(DTYPES[dtype]), b.to(DTYPES[dtype])
    return lambda: torch.mm(a, b)


@cache
def copy_ceiling(device: torch.device) -> tuple[float, str]:
    """Bytes/s, read and written, of a large copy on this machine, the best of several, and what it was."""
    megabytes = 2048 if device.type == "cuda" else 512
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(time_on_device(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.numel() / best, f"torch copy of {megabytes} MiB, best of 7"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model, capability = platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, {capability}"


@cache
def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where and on what a row was measured."""
    return {
        "device": device_name(device),
        "versions": "; ".join([f"python {platform.python_version()}", *_versions()]),
        **_revision(),
    }


def _revision() -> dict[str, str]:
    """The commit; in a copy without its history, what FASTBERT_COMMIT says."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return {"commit": os.environ.get("FASTBERT_COMMIT", "unknown"), "dirty": "unknown"}
    return {
        "commit": commit,
        "dirty": "yes" if _git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "no",
    }


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
