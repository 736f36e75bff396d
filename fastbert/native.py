"""The compiled kernels (csrc/): checks tensors, then hands pointers, sizes, strides and a stream to C++.

The only importer of `fastbert._C`. It imports without the extension too; `available()` says why it is not
there. The instruction set on CPU is the best the processor has, or what the environment variable
FASTBERT_ISA names (avx512, avx2 or portable).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor


def _load() -> tuple[Any, str | None]:
    try:
        import fastbert._C as extension
    except ModuleNotFoundError as error:
        if error.name != "fastbert._C":
            raise
        return None, "native: not built (no working C++ compiler when fastbert was installed)"
    except ImportError as error:  # built on another machine, say, with a library that this one lacks
        return None, f"native: does not load ({error})"
    return extension, None


_C, _reason = _load()
_CPU_DTYPES = {} if _C is None else {torch.float32: _C.F32, torch.bfloat16: _C.BF16}
_CUDA_DTYPES = {} if _C is None else {**_CPU_DTYPES, torch.float16: _C.F16}


def available() -> str | None:
    """None where the extension is built and loads, else the reason why not."""
    return _reason


def has_cuda() -> bool:
    """Whether the extension is there and holds CUDA kernels."""
    return _C is not None and _C.has_cuda


def cpu_features() -> list[str]:
    """The features of this processor that the choice of an instruction set rests on."""
    return [] if _C is None else _C.cpu_features()


def isas() -> list[str]:
    """The instruction sets that can run here, best first."""
    return [] if _C is None else _C.isas()


def isa() -> str:
    """The instruction set in use; "none" without the extension.

    Raises:
        ValueError: FASTBERT_ISA is no instruction set, or one this machine has not.
    """
    return _chosen_isa()[0]


@functools.cache
def _chosen_isa() -> tuple[str, int]:
    if _C is None:
        return "none", -1
    name = os.environ.get("FASTBERT_ISA", "") or _C.isas()[0]
    try:
        return name, _C.isa_id(name)
    except ValueError as error:
        raise ValueError(f"FASTBERT_ISA={name}: {error}") from None


def supports_add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> str | None:
    """None where `add_layer_norm` takes these arguments, else the reason why not."""
    if _C is None:
        return _reason
    if dropout_p > 0:
        return "no dropout yet"
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or bias.requires_grad
        or (residual is not None and residual.requires_grad)
    ):
        return "no backward yet"
    device, dtype = x.device, x.dtype
    if device.type == "cpu":
        dtypes = _CPU_DTYPES
    elif device.type == "cuda":
        if not _C.has_cuda:
            return "built without CUDA"
        dtypes = _CUDA_DTYPES
    else:
        return f"device {device.type}"
    if dtype not in dtypes:
        return f"dtype {dtype}"
    if x.dim() != 2:
        return f"x has {x.dim()} dimensions"
    shape = x.shape
    for t, expected in ((weight, shape[1:]), (bias, shape[1:]), (residual, shape), (x, shape)):
        if t is None:
            continue
        if t.dtype != dtype:
            return f"mixed dtypes {dtype} and {t.dtype}"
        if t.device != device:
            return f"mixed devices {device} and {t.device}"
        if t.shape != expected:
            return f"shape {tuple(t.shape)} beside x {tuple(shape)}"
        if t.stride(-1) != 1 and shape[1] > 1:
            return "last dimension not contiguous"
    return None


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """LayerNorm(x + residual) * weight + bias. x and residual (M, N), weight and bias (N,) -> (M, N).

    One dtype for all: float32 or bfloat16 on CPU, float16 too on CUDA; sums and statistics are float32.

    Raises:
        ValueError: arguments it does not take, with the reason of `supports_add_layer_norm`.
        RuntimeError: a CUDA launch failed.
    """
    reason = supports_add_layer_norm(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)
    if reason is not None:
        raise ValueError(f"native.add_layer_norm: {reason}")
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    arguments = (
        _CUDA_DTYPES[x.dtype],
        M,
        N,
        x.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        N,
        eps,
    )
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _C.add_layer_norm_cuda(*arguments, x.device.index, stream)
    else:
        _C.add_layer_norm_cpu(*arguments, _chosen_isa()[1], torch.get_num_threads())
    return y
