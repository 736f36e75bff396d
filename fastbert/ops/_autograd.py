"""What the ops' autograd functions share."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call with these arguments has to be one that autograd knows."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
