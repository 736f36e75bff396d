"""Seeds of the masks that the kernels draw."""

from __future__ import annotations

import torch


def draw_seed(dropout_p: float) -> int:
    """A seed from torch's default generator, so that torch.manual_seed repeats it; 0 where nothing is dropped."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if dropout_p else 0
