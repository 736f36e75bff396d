"""The accuracy contract below fp64, in one place: what an op's error may be, for tests and benchmarks.

An op in a lower precision may err twice as much as eager PyTorch in that dtype, both against fp64, in the largest error
and in root mean square; in addition its result may be rounded once more, by half a unit in the last place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def differences(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest and the root mean square difference; NaN where either holds one."""
    if not expected.numel():
        return 0.0, 0.0
    error = actual.detach().to("cpu", torch.float64) - expected.detach().to("cpu", torch.float64)
    return error.abs().max().item(), error.square().mean().sqrt().item()


def limits(exact: Tensor, eager: Tensor, inherent: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """The largest and root mean square error allowed of what eager PyTorch computes as `eager` and truth is `exact`.

    Args:
        exact: in fp64; fp32 where the peer is an fp32 model.
        eager: in the dtype that is held to the contract.
        inherent: what the inputs' own rounding makes of the result, largest and root mean square: for results that
            cancel, where eager's error is its luck.
    """
    largest, rms = differences(eager, exact)
    unit = torch.finfo(eager.dtype).eps / 2
    top = exact.detach().abs().max().item() if exact.numel() else 0.0
    # A rounding is uniform within half a unit in the last place: the mean of its squares is a third of the square of
    # that, and over few elements as much more as four standard deviations of a mean of so many.
    square = min(1.0, 1 / 3 + 4 * math.sqrt(4 / 45 / max(exact.numel(), 1)))
    return (
        2 * largest + unit * top + inherent[0],
        2 * rms + unit * root_mean_square(exact) * math.sqrt(square) + inherent[1],
    )


def complaint(actual: Tensor, exact: Tensor, allowed: tuple[float, float]) -> str | None:
    """Why `actual` breaks the limits; None where it keeps them. A NaN breaks them."""
    if actual.shape != exact.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    for kind, error, limit in zip(("max", "rms"), differences(actual, exact), allowed, strict=True):
        if not error <= limit:
            return f"{kind} error {error:.2e}, allowed {limit:.2e}"
    return None
