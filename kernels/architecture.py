"""The device that a kernel runs on: its architecture and multiprocessors, and how to launch on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

INTERPRETER = "interpreter"


def architecture(device: torch.device) -> str:
    """`sm_80`, `sm_90`, `gfx942`; `interpreter` for tensors on the CPU, which only Triton's interpreter can process."""
    return _architecture(device.index) if device.type == "cuda" else INTERPRETER


@cache
def _architecture(index: int | None) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """The least number of programs that run at once; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(device: torch.device) -> AbstractContextManager:
    """Context for launching a kernel on `device`: Triton launches on torch's current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
