"""Muon for the matrices of the layers, torch's, and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

MOMENTUM = 0.95


class MuonAndAdamW(Optimizer):
    """torch.optim.Muon over groups with "muon": True, AdamW over the others.

    An update of Muon has the root mean square of AdamW's, so that both take one learning rate (Liu et al., 2025, "Muon
    is Scalable for LLM Training"). Source: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural
    networks".
    """

    def __init__(
        self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float, fused: bool | None = None
    ) -> None:
        matrices, others = ([g for g in groups if bool(g.get("muon")) == kind] for kind in (True, False))
        muon: dict[str, Any] = {"momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}
        self._parts: list[Optimizer] = [
            *([Muon(matrices, lr=lr, **muon)] if matrices else []),
            *([AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused)] if others else []),
        ]
        super().__init__(groups, {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Lets the parts have this optimizer's groups and state, which the loop reads and changes."""
        for part, kind in zip(self._parts, self._kinds(), strict=True):
            part.param_groups = [group for group in self.param_groups if bool(group.get("muon")) == kind]
            part.state = self.state

    def _kinds(self) -> list[bool]:
        return [isinstance(part, Muon) for part in self._parts]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
