"""What a kernel runs on: the one question that the launchers ask of the machine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

INTERPRETER = "interpreter"


def architecture(device: torch.device) -> str:
    """`sm_80`, `sm_90`, `gfx942`; `interpreter` for tensors in the CPU's memory, which only that can run."""
    return _architecture(device.index) if device.type == "cuda" else INTERPRETER


@cache
def _architecture(index: int | None) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(device: torch.device) -> AbstractContextManager:
    """In which a kernel is launched on `device`: Triton takes torch's current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
