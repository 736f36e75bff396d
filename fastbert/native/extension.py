"""The extension, the instruction set in use, and the memory and checks that its ops share."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode


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


C, _reason = _load()
CPU_DTYPES = {} if C is None else {torch.float32: C.F32, torch.bfloat16: C.BF16}
_ACTIVATIONS = {None: "none", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS |= {name: name for name in ("gelu", "relu", "silu", "tanh")}
ACTIVATIONS = {} if C is None else {name: getattr(C, f"ACTIVATION_{code}") for name, code in _ACTIVATIONS.items()}
# Names as in ops.linear; None: the operands as they are.
_PRECISIONS = (None, "int8", "high", "highest")
PRECISIONS = {} if C is None else {name: getattr(C, f"PRECISION_{name or 'full'}") for name in _PRECISIONS}

KEPT = 64 << 20  # bytes that a thread keeps between calls
_memory = threading.local()


def available() -> str | None:
    """None if the extension is built and loads, else the reason why not."""
    return _reason


def has_cuda() -> bool:
    """True if the extension is available and contains CUDA kernels."""
    return C is not None and C.has_cuda


def cpu_features() -> list[str]:
    """The features of this processor that determine the choice of an instruction set."""
    return [] if C is None else C.cpu_features()


def isas() -> list[str]:
    """The instruction sets that can run here, best first; emulated ones, for tests, come last."""
    return [] if C is None else C.isas()


def real_isas() -> list[str]:
    """The instruction sets that this machine's processor has, best first."""
    return [isa for isa in isas() if not isa.endswith("_emulated")]


def isa() -> str:
    """The instruction set in use; "none" without the extension.

    Raises:
        ValueError: FASTBERT_ISA is not an instruction set, or this machine lacks it.
    """
    return chosen_isa()[0]


@functools.cache
def chosen_isa() -> tuple[str, int]:
    if C is None:
        return "none", -1
    name = os.environ.get("FASTBERT_ISA", "") or C.isas()[0]
    try:
        return name, C.isa_id(name)
    except ValueError as error:
        raise ValueError(f"FASTBERT_ISA={name}: {error}") from None


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of `like` and in its dtype unless another is given.

    Both are explicit: torch.empty would follow torch.set_default_dtype and torch.set_default_device.
    """
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def fresh_bytes(size: int) -> Tensor:
    """Uninitialised memory for `size` bytes from `start_of` on; large memory is of large pages, where there are any.

    Looking up pages of 4 KiB costs a tenth of the time of products, and more in a virtual machine.
    """
    memory = torch.empty(size + (C.HUGE_PAGE if size >= C.HUGE_PAGE else 64), dtype=torch.uint8, device="cpu")
    C.prefer_huge_pages(memory.data_ptr(), memory.numel())
    return memory


def start_of(memory: Tensor) -> int:
    """The first address in memory of `fresh_bytes` that is aligned to a large page; in small memory, to 64."""
    address = memory.data_ptr()
    return address + -address % (C.HUGE_PAGE if memory.numel() >= 2 * C.HUGE_PAGE else 64)


def workspace(size: int) -> tuple[Tensor, int]:
    """Uninitialised memory, and the address of `size` bytes in it, aligned to 64.

    Fresh memory costs a page fault every 4 KiB, so the caller passes the memory to `keep` when it is done, for the
    thread's next call. Until then the caller owns it, even if a signal handler interrupts the call and calls an op.
    """
    memory, _memory.bytes = getattr(_memory, "bytes", None), None
    if memory is None or memory.data_ptr() + memory.numel() < start_of(memory) + size:
        memory = fresh_bytes(size)
    return memory, start_of(memory)


def keep(memory: Tensor) -> None:
    """Leaves memory of `workspace` to the thread's next call, unless it is large."""
    _memory.bytes = memory if memory.numel() <= KEPT else None


def misaligned(x: Tensor, size: int) -> bool:
    """True if the address of x is not a multiple of `size` bytes; False while compiling, when it has none."""
    return not torch.compiler.is_compiling() and x.data_ptr() % size != 0


def has_memory(x: Tensor) -> bool:
    """True if x is a plain strided tensor whose values are at data_ptr(): no wrapper subclass, no lazy negation."""
    return type(x) in (Tensor, Parameter) and x.layout is torch.strided and not x.is_neg()


def pointer_reason() -> str | None:
    """Why kernels cannot take pointers here, whatever the tensors: tracing, a transform or a mode; None if they can."""
    if torch.jit.is_tracing():
        return "a trace cannot hold pointers"
    if torch.compiler.is_compiling():  # which is a transform of its own; the ops handle it
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func cannot see through pointers"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation cannot see through pointers"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return mode_reason()
    return None


def mode_reason() -> str | None:
    """The active dispatch or function mode that must see every operation; None if there is none.

    The mode of torch.device as a context and of torch.set_default_device does not count: it only sees tensor creation.
    """
    if torch._C._len_torch_dispatch_stack():
        return f"a dispatch mode is active: {type(_get_current_dispatch_mode()).__name__}"
    for i in range(torch._C._len_torch_function_stack()):
        if type(mode := torch._C._get_function_stack_at(i)) is not DeviceContext:
            return f"a function mode is active: {type(mode).__name__}"
    return None


def cpu_reason(first: Tensor, *others: Tensor | None) -> str | None:
    """Why the CPU kernels cannot take these tensors, whatever the op; None if they can."""
    if C is None:
        return available()
    if not first.is_cpu:
        return f"device {first.device.type}"
    if first.dtype not in CPU_DTYPES:
        return f"dtype {first.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if reason := pointer_reason():
        return reason
    for t in others:
        if t is None:
            continue
        if t.dtype != first.dtype:
            return f"mixed dtypes {first.dtype} and {t.dtype}"
        if t.device != first.device:
            return f"mixed devices {first.device} and {t.device}"
    return None
