"""Learning rates as functions of the step, without state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # step, from 0 -> the learning rate of that step


def make_schedule(shape: str, lr: float, *, warmup_steps: int, total_steps: int) -> Schedule:
    """Warms up from 0 to `lr` over `warmup_steps`; then linear or half-cosine decay to 0 at `total_steps`, or constant.

    The steps are those of transformers' get_{linear,cosine,constant}_schedule_with_warmup.
    """
    decay = {
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
    }[shape]

    def rate(step: int) -> float:
        if step < warmup_steps:
            return lr * step / warmup_steps
        return lr * decay(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return rate
