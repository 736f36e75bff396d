"""StableAdamW: AdamW whose update of a tensor is smaller where its gradients are larger than their past."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.training.moments import MomentOptimizer


class StableAdamW(MomentOptimizer):
    """AdamW with Adafactor's clipping: a tensor's rate is divided by max(1, RMS of g / sqrt(v)).

    v has its bias correction. It takes the place of the clipping of gradients by their norm. Source: Wortsman et al.
    (2023), "Stable and low-precision training for large-scale vision-language models", algorithm 2.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, params: list[Tensor], group: dict) -> None:
        (beta1, beta2), eps = group["betas"], group["eps"]
        grads: list[Any] = [p.grad for p in params]
        exp_avgs, exp_avg_sqs, steps = self.moments(params)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(roots, eps)
        ratios = torch._foreach_norm(torch._foreach_div(grads, roots))
        sizes = [math.sqrt(p.numel()) for p in params]
        rates = group["lr"] / torch.stack(torch._foreach_div(ratios, sizes)).clamp(min=1)
        updates = torch._foreach_div(exp_avgs, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, list(-rates))
        torch._foreach_add_(params, updates)
