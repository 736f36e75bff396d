"""The optimizers, over groups with and without weight decay: AdamW by torch, LAMB, StableAdamW, Muon."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fastbert.model.modules import RMSNorm
from fastbert.training.moments import MomentOptimizer
from fastbert.training.muon import MuonAndAdamW
from fastbert.training.settings import OptimizerSettings
from fastbert.training.sharding import is_sharded, local, total_squares, whole
from fastbert.training.stable_adamw import StableAdamW

LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")  # in the name of a parameter that is a layer's
_FUSED = ("cpu", "cuda")  # devices for which torch has a fused AdamW kernel


def make_optimizer(model: nn.Module, settings: OptimizerSettings, groups: list[dict] | None = None) -> Optimizer:
    """The optimizer of the settings, over `groups` or `decay_groups`; the loop sets its learning rate at each step."""
    groups = decay_groups(model, settings.weight_decay) if groups is None else groups
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.name == "lamb":
        return Lamb(groups, **options)
    if settings.name == "stable_adamw":
        return StableAdamW(groups, **options)
    fused = next(model.parameters()).device.type in _FUSED
    optimizer: Optimizer
    if settings.name == "muon":
        optimizer = MuonAndAdamW(matrices_apart(model, groups), **options, fused=fused)
    else:
        optimizer = AdamW(groups, **options, fused=fused)
    if fused:
        optimizer.register_step_post_hook(_count_writes)
    return optimizer


def _count_writes(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Bumps version counters: the fused kernel bypasses them, and a backend detects stale packed weights by them."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: parameters with weight decay; biases and norms without (Devlin et al., 2018)."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    kinds = nn.LayerNorm | RMSNorm
    norms = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.endswith("bias") or id(parameter) in norms
            (others if plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "trust_ratio": True},
        {"params": others, "weight_decay": 0.0, "trust_ratio": False},
    ]


def matrices_apart(model: nn.Module, groups: list[dict]) -> list[dict]:
    """The groups, with the matrices of the layers in groups of their own, which have "muon": True.

    Embeddings, heads and vectors stay.
    """
    inside = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and LAYER.search(name) is not None
    }
    apart = []
    for group in groups:
        for kind in (True, False):
            params = [p for p in group["params"] if (id(p) in inside) == kind]
            if params:
                apart.append({**group, "params": params, "muon": kind})
    return apart


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients down if their global norm exceeds `max_norm` (0: never); returns the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class Lamb(MomentOptimizer):
    """LAMB: Adam's update of each tensor, scaled to the norm of that tensor (You et al., 2020, algorithm 2).

    Moments have Adam's bias correction; phi(z) is z; the trust ratio is 1 if either norm is 0. As in the authors' code,
    groups of biases and LayerNorms do not use the ratio (`trust_ratio=False`).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust_ratio: bool = True,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust_ratio": trust_ratio}
        super().__init__(params, options)

    def update(self, params: list[Tensor], group: dict) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        grads: list[Any] = [p.grad for p in params]
        exp_avgs, exp_avg_sqs, steps = self.moments(params)
        sharded = is_sharded(params[0])
        params, grads, exp_avgs, exp_avg_sqs = (list(map(local, ts)) for ts in (params, grads, exp_avgs, exp_avg_sqs))

        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(exp_avgs, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, denominators)
        if decay:
            torch._foreach_add_(updates, params, alpha=decay)
        if group["trust_ratio"]:
            lengths = torch.stack(torch._foreach_norm([*params, *updates]))
            if sharded:  # norms of whole tensors, not of this process's shards
                lengths = total_squares(lengths.square()).sqrt()
            lengths, update_lengths = lengths.chunk(2)
            ratios = lengths / update_lengths
            ratios = torch.where((lengths > 0) & (update_lengths > 0), ratios, torch.ones_like(ratios))
            torch._foreach_mul_(updates, list(ratios))
        torch._foreach_add_(params, updates, alpha=-group["lr"])
