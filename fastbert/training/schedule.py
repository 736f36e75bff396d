"""Learning rates and other settings as functions of the step, without state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # step, from 0 -> the learning rate of that step
DECAYS = {"linear": lambda done: 1.0 - done, "1-sqrt": lambda done: 1.0 - math.sqrt(done)}


def make_schedule(
    shape: str,
    lr: float,
    *,
    warmup_steps: int,
    total_steps: int,
    decay: str = "1-sqrt",
    decay_share: float = 0.2,
) -> Schedule:
    """Warms up from 0 to `lr` over `warmup_steps`; then decays to 0 at `total_steps`, by shape, or is constant.

    "linear" and "cosine" decay at once, as transformers' get_{linear,cosine}_schedule_with_warmup. "wsd" (warm-up,
    stable, decay; a trapezoid) decays over the last `decay_share` of the steps, as `decay` says: "linear" or "1-sqrt"
    (Hägele et al., 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations").
    """
    shapes = {
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
    }

    def rate(step: int) -> float:
        if step < warmup_steps:
            return lr * step / warmup_steps
        if shape == "wsd":
            length = max(1.0, decay_share * total_steps)
            return lr * DECAYS[decay](min(1.0, max(0.0, (step - (total_steps - length)) / length)))
        return lr * shapes[shape](min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return rate


def ramp(step: int, first: float, last: float, steps: int) -> float:
    """From `first` at step 0 to `last` from step `steps` on, in a straight line."""
    return last if step >= steps else first + (last - first) * step / steps
