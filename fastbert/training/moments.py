"""The common part of the optimizers with Adam's two moments."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MomentOptimizer(Optimizer):
    """An optimizer whose state is Adam's, and whose groups are updated as a whole, by operations over all tensors."""

    @abstractmethod
    def update(self, params: list[Tensor], group: dict) -> None:
        """Updates those parameters of a group that have a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group)
        return loss

    def moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """The first and second moments of parameters, and the number of this step for each."""
        states = []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())  # on the host, as in torch's Adam
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            states.append(state)
        steps = [state["step"].item() for state in states]
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], steps
