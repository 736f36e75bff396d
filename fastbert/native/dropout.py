"""Seeds of the kernels' dropout masks."""

from __future__ import annotations

import torch


def draw_seed(dropout_p: float) -> int:
    """A seed from torch's default generator, so that torch.manual_seed reproduces it; 0 without dropout."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if dropout_p else 0
