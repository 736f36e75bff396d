"""What the backends of add_layer_norm share."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_in(dtype: torch.dtype | None, *parts: Tensor | None) -> Tensor | None:
    """The sum of those that are there, in `dtype`."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]).to(dtype) if there and dtype is not None else None
