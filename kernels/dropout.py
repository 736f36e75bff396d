"""The dropout mask: a hash of a row's key and a column's key, each computed by Philox.

Philox per element would be ten rounds of two wide products, 25 times attention's own arithmetic per element. So Philox
(Salmon et al., 2011) computes one 32-bit key per row and one per column, and an element's random number is a mix of the
two: an exclusive or and the finaliser of MurmurHash3 (public domain), six instructions. It depends only on seed, row
and column, so the backward recomputes the forward's mask with any tiling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = tl.constexpr(0x5BD1E995)  # separates the columns' counters from the rows'


@triton.jit
def row_keys(seed, rows, plane):
    """uint32 keys of `rows` (int64) within `plane` (a head, or 0), for a seed in int64."""
    low = (rows & 0xFFFFFFFF).to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)
    zero = low * 0
    key, _, _, _ = tl.philox(seed, low, high, zero + plane.to(tl.uint32), zero)
    return key


@triton.jit
def column_keys(seed, columns):
    """uint32 keys of `columns` (int32), for a seed in int64."""
    low = columns.to(tl.uint32)
    zero = low * 0
    key, _, _, _ = tl.philox(seed, low, zero, zero, zero + _COLUMNS)
    return key


@triton.jit
def kept(rows, columns, threshold):
    """True where an element is kept. Keys are (M, 1) and (1, N), or of one shape; `threshold` is from `threshold()`."""
    x = rows ^ columns
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return (x >> 1) >= threshold


def threshold(dropout_p: float) -> int:
    """The threshold of `kept`: p * 2^31, rounded, at most 2^31 - 1 so that it fits an int32."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 on `device`, from torch's generator there: torch.manual_seed repeats it, a CUDA graph advances it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
