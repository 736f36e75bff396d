"""What the backends of add_layer_norm share."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_in(dtype: torch.dtype | None, *parts: Tensor | None) -> Tensor | None:
    """The sum of those that are there, in `dtype`."""
    parts = tuple(part for part in parts if part is not None)
    return sum(parts[1:], start=parts[0]).to(dtype) if parts and dtype is not None else None
