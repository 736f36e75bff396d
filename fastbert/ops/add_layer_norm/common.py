"""Helpers of the backends of add_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_in(dtype: torch.dtype | None, *parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that are not None, in `dtype`; None if there is no part or dtype."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]).to(dtype) if there and dtype is not None else None
