"""`fastbert doctor`: prints installed packages, the machine's hardware, and the backend of each op."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
)
VARIABLES = (
    "FASTBERT_BACKEND",
    "FASTBERT_BF16",
    "FASTBERT_ISA",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
)


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert doctor`; returns the exit code."""
    print(diagnosis())
    return 0


def diagnosis() -> str:
    """The whole report, one fact per line."""
    import fastbert
    from fastbert.families import FAMILIES

    lines = ["versions", _row("fastbert", fastbert.__version__), _row("python", platform.python_version())]
    lines += [_row(name, _version(name)) for name in PACKAGES]
    has_torch = importlib.util.find_spec("torch") is not None
    lines += ["", "cpu", _row("processor", _processor()), _row("cores", str(os.cpu_count())), *_native(has_torch)]
    if has_torch:
        lines += _of_torch()
    else:
        lines += ["", "torch", "  not installed: fastbert.light and the commands that run by it work without"]
    settings = [_row(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    lines += ["", "environment", *(settings or ["  none of " + ", ".join(VARIABLES)])]
    lines += ["", "model types", f"  {', '.join(FAMILIES)}"]
    return "\n".join(lines + (_backends() if has_torch else []))


def _native(has_torch: bool) -> list[str]:
    """The threads of calls, and the extension."""
    from fastbert.engine import library

    if has_torch:
        import torch

        lines = [_row("threads", f"{torch.get_num_threads()} (torch.get_num_threads())")]
    else:
        from fastbert.light.loading import default_threads

        lines = [_row("threads", str(default_threads()))]
    reason = library.available()
    if reason is not None:
        return [*lines, _row("native", reason.removeprefix("native: "))]
    return [
        *lines,
        _row("native", "built" + (", with CUDA" if library.has_cuda() else ", without CUDA")),
        _row("features", " ".join(library.cpu_features()) or "none that matter"),
        _row("instruction set", f"{_isa(library)} (can run: {', '.join(library.real_isas())})"),
        _row("one core's products", _products(library)),
    ]


def _of_torch() -> list[str]:
    import torch

    return ["", "gpu", *_gpus(torch)]


def _backends() -> list[str]:
    """The implementation of each op, and how products run."""
    import fastbert
    from fastbert.diagnostics import explain_precisions

    return [
        "",
        "backends (fp32 inference)",
        *("  " + line for line in str(fastbert.explain()).splitlines()),
        "",
        "products of a model's layers",
        *(f"  {asked:<30}{text}" for asked, text in explain_precisions()),
    ]


def _row(name: str, value: str) -> str:
    return f"  {name:<22}{value}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _isa(library: Any) -> str:
    try:
        return str(library.isa())
    except ValueError as error:  # a wrong FASTBERT_ISA, which doctor reports
        return f"none: {error}"


def _products(library: Any) -> str:
    """The speed of the instructions that multiply, and the choice between those for bf16."""
    try:
        number = library.chosen_isa()[1]
        speeds = {kind: library.C.peak(kind, number, 1) for kind in ("fp32", "bf16", "int8")}
        wide = library.C.widens_bf16(number)
    except ValueError as error:  # of a wrong variable
        return f"none: {error}"
    told = [f"{kind} {speed / 1e12:.2f}" for kind, speed in speeds.items()]
    return ", ".join(told) + " T/s" + ("; bf16 is multiplied as fp32" if wide else "")


def _gpus(torch: Any) -> list[str]:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [f"  none ({built})"]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        rows.append(
            _row(
                f"cuda:{index}",
                f"{gpu.name}, {capability}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
            )
        )
    return rows
