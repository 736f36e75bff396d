"""torch.autocast for the ops: matrix products run in autocast's dtype, the rest in the dtype of its inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def autocast_is_on(x: Tensor) -> bool:
    """True if this call must cast; while compiling, torch casts by itself, in the reference that it traces."""
    # `device.type` builds a new string, which takes as long as all the rest.
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    return torch.is_autocast_enabled(device) and not torch.compiler.is_compiling()


def autocast_off(x: Tensor) -> AbstractContextManager:
    """A context without autocast, in which an op runs once its arguments are cast."""
    return torch.autocast(x.device.type, enabled=False)


def cast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as torch.autocast casts them for a matrix product: to its dtype, except float64."""
    device = next(t for t in tensors if t is not None).device.type
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
