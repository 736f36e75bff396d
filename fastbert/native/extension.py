"""The common part of the ops over tensors: codes of dtypes, fresh tensors, and why the extension cannot take some."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastbert.engine.library import ACTIVATIONS, PRECISIONS, C, available, chosen_isa

__all__ = ["ACTIVATIONS", "CPU_DTYPES", "PRECISIONS", "C", "available", "chosen_isa"]
CPU_DTYPES = {} if C is None else {torch.float32: C.F32, torch.bfloat16: C.BF16}


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of `like` and in its dtype unless another is given.

    Both are explicit: torch.empty would follow torch.set_default_dtype and torch.set_default_device.
    """
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


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
