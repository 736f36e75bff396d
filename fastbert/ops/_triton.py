"""Shared checks of the ops' Triton versions: whether they can run at all."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastbert.native.dropout import current_rows
from fastbert.native.extension import pointer_reason

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reason_against(*tensors: Tensor | None, one_dtype: bool = True) -> str | None:
    """Why no Triton kernel can take these tensors; None if one can. The first tensor determines the device.

    `one_dtype` is False for a kernel whose tensors may differ in dtype.
    """
    present = [t for t in tensors if t is not None]
    device, dtype = present[0].device, present[0].dtype
    if reason := device_reason(device) or pointer_reason():
        return reason
    if dtype not in DTYPES or any(t.dtype != dtype and (one_dtype or t.dtype not in DTYPES) for t in present):
        given = ", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in present))
        taken = "float32, float16, bfloat16"
        return f"dtypes {given}; it takes {f'one of {taken} for all' if one_dtype else taken}"
    if any(t.device != device for t in present):
        return f"tensors on {', '.join(dict.fromkeys(str(t.device) for t in present))}; it takes one device"
    return None


def draw_seed(device: torch.device) -> Tensor:
    """The seed of a mask, (1,) int64 on `device`: of torch's generator there, or by `mask_rows`."""
    from fastbert.kernels import dropout

    rows = current_rows()
    if rows is None:
        return dropout.draw_seed(device)
    seed = rows.draw()
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=device)


def rows_in_memory(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as a kernel needs it; a gradient may be one number, expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


def device_reason(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`."""
    return _device_reason(device)


# Called once per compiled graph, as by torch.compiler.assume_constant_result, which would import torch's compiler.
vars(device_reason).update(_dynamo_marked_constant=True)


@cache
def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it runs on a GPU, not on {device.type}"
    if not _installed():
        return "triton is not installed"
    if not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor}; it needs 8.0"
    return None


@cache
def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
