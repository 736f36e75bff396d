"""Muon for the matrices of the layers, and AdamW for the rest, as one optimizer.

torch.optim.Muon has the same update, which a test holds this one to. It iterates in bf16 on every device: on a CPU
without bf16 products that takes 9.5 s for a matrix of 768 x 768, and in fp32, as here, 0.3 s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

MOMENTUM, STEPS = 0.95, 5
_QUINTIC = (3.4445, -4.7750, 2.0315)  # of the iteration that brings singular values near 1
_ADAMW_RMS = 0.2  # of an update of AdamW


def orthogonalized(gradient: Tensor) -> Tensor:
    """A matrix of the same singular vectors whose singular values are near 1, by Newton-Schulz."""
    x = gradient.bfloat16() if gradient.is_cuda else gradient.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(gradient.dtype)


class Muon(Optimizer):
    """Orthogonalized momentum, for parameters that are matrices, scaled to the size of AdamW's updates.

    Source: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks"; Liu et al. (2025), "Muon is
    Scalable for LLM Training", (4), for the scale.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                held = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonalized(p.grad.lerp(held, MOMENTUM))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * _ADAMW_RMS * math.sqrt(max(p.shape)))


class MuonAndAdamW(Optimizer):
    """Muon over groups with "muon": True, AdamW over the others; both take one learning rate."""

    def __init__(
        self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float, fused: bool | None = None
    ) -> None:
        matrices, others = ([g for g in groups if bool(g.get("muon")) == kind] for kind in (True, False))
        self._parts: list[Optimizer] = [
            *([Muon(matrices, lr=lr)] if matrices else []),
            *([AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused)] if others else []),
        ]
        super().__init__(groups, {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Lets the parts have this optimizer's groups and state, which the loop reads and changes."""
        for part in self._parts:
            kind = isinstance(part, Muon)
            part.param_groups = [group for group in self.param_groups if bool(group.get("muon")) == kind]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for part in self._parts:
            part.step()
