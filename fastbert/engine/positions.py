"""Positions in attention, as tables: rotary angles (Su et al., 2021), T5's buckets (Raffel et al., 2020) and
ALiBi's slopes (Press et al., 2022).

Powers, cosines and logarithms are computed in float64 and rounded, so that they are the same by any library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BUCKETS, _FARTHEST = 32, 128


def frequencies(theta: float, factor: float, width: int) -> tuple[float, ...]:
    """The angle per position of each pair of columns of a head, (width / 2,), as transformers computes it in float32.

    Args:
        theta: the base.
        factor: positions are divided by it.
        width: of a head.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    return tuple((np.float32(1) / powers / np.float32(factor)).tolist())


def rotary_table(frequencies: Sequence[float], places: int) -> np.ndarray:
    """For each position, the cosines of its angles, then their sines: (places, D) float32."""
    steps = np.array(frequencies, dtype=np.float32)
    angles = (np.arange(places, dtype=np.float32)[:, None] * steps).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def alibi_bias(heads: int, reach: int) -> np.ndarray:
    """The bias of each head and distance, (H, 2 reach - 1) float32: minus the head's slope times the distance."""
    away = np.abs(np.arange(1 - reach, reach)).astype(np.float32)
    return np.array(alibi_slopes(heads), dtype=np.float32)[:, None] * -away


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for n heads, a power of two; for other numbers, those of the power of two below, then
    every second one of the power above."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]


def buckets(reach: int) -> np.ndarray:
    """The bucket of each distance from query to key, (2 reach - 1,) int64: one for each of the near ones, then by
    logarithm; those after the query have buckets of their own."""
    away = np.arange(reach - 1, -reach, -1)  # query - key
    half = BUCKETS // 2
    exact = half // 2
    near = np.abs(away)
    by_logarithm = np.log(np.maximum(near, 1) / exact) / math.log(_FARTHEST / exact) * (half - exact)
    far = np.minimum(exact + by_logarithm.astype(np.float32).astype(np.int64), half - 1)
    return (away < 0) * half + np.where(near < exact, near, far)
