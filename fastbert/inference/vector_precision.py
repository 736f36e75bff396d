"""Vectors in fewer bits, as sentence-transformers' `quantize_embeddings` makes them."""

from __future__ import annotations

import numpy as np

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def check_vector_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")


def quantize_vectors(vectors: np.ndarray, precision: str, calibration: np.ndarray | None = None) -> np.ndarray:
    """Vectors (N, E) of float32 in another precision.

    Args:
        precision: "float32"; "int8" or "uint8", (N, E): each number in 255 steps from the least to the largest of its
            column; "ubinary" or "binary", (N, E / 8) of uint8 or int8: a bit for each number, set if it is above 0.
        calibration: (M, E) of float32, whose columns have these ranges (default: the vectors).

    Raises:
        ValueError: another precision.
    """
    check_vector_precision(precision)
    if precision == "float32":
        return vectors
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    known = vectors if calibration is None else np.asarray(calibration, np.float32)
    if not len(known):
        return np.empty(vectors.shape, np.dtype(precision))
    least, most = known.min(axis=0), known.max(axis=0)
    steps = np.where(most > least, (most - least) / 255, 1)
    scaled = np.floor((vectors - least) / steps).clip(0, 255)
    return (scaled - (128 if precision == "int8" else 0)).astype(np.dtype(precision))
