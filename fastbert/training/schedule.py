"""Learning rates as plain functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # step, from 0 -> the learning rate of that step


def make_schedule(shape: str, lr: float, *, warmup_steps: int, total_steps: int) -> Schedule:
    """From 0 up to `lr` over `warmup_steps`, then down to 0 at `total_steps` by a line or half a cosine, or constant.

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
