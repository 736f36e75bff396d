"""Products and norms of rows of numpy's arrays, float32 or the bits of bfloat16."""

from __future__ import annotations

import numpy as np

from fastbert.engine.library import ACTIVATIONS, C, chosen_isa
from fastbert.engine.memory import address_of


def linear(
    x: np.ndarray, packed: np.ndarray, rows: int, *, dtype: int, threads: int, activation: str | None = None
) -> np.ndarray:
    """act(x weight^T + bias) of a weight (rows, K) packed as it is: (M, K) -> (M, rows).

    Args:
        dtype: of x and the weight, by its number in C++.
    """
    x, width = np.ascontiguousarray(x), x.shape[1]
    y = np.empty((len(x), rows), x.dtype)
    if len(x):
        C.linear_cpu(
            *(dtype, 0, len(x), rows, width, address_of(x), width, address_of(packed), address_of(y), rows),
            *(ACTIVATIONS[activation], False, chosen_isa()[1], threads),
        )
    return y


def layer_norm(
    x: np.ndarray, weight: int, bias: int, *, eps: float, dtype: int, threads: int, rms: bool = False
) -> np.ndarray:
    """LayerNorm or, with `rms`, RMSNorm of rows (M, N), by the addresses of weight and bias, 0 for none."""
    x, width = np.ascontiguousarray(x), x.shape[1]
    y = np.empty_like(x)
    C.add_layer_norm_cpu(
        *(dtype, len(x), width, address_of(x), width, 0, 0, weight, rms, bias, address_of(y), width, 0),
        *(eps, chosen_isa()[1], threads),
    )
    return y
