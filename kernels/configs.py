"""How each kernel is cut into tiles: pure functions of shape, dtype and architecture.

`architecture` is what `architecture.architecture` says. Where a line was measured it names the GPU and the date;
every other was chosen by counting registers and shared memory, and waits for a GPU. Nothing is tuned at call time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """How a kernel of attention walks: `step` rows at a time, past the tile of `attention_block` rows that it owns."""

    step: int
    num_warps: int
    num_stages: int
    tma: bool = False


def attention_block(architecture: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> int:
    """Rows of the tile that a program owns, one figure for forward and backward: they share a schedule."""
    if architecture == "interpreter":
        return 16 if max_seqlen <= 32 else 32
    largest = 64 if dtype == torch.float32 else 128
    return min(largest, max(16, _power_of_2(max_seqlen)))


def attention_fwd(architecture: str, dtype: torch.dtype, head_dim: int, max_seqlen: int, dropout: bool) -> Attention:
    if architecture == "interpreter":
        return Attention(16, 1, 1)
    return Attention(64, 4, 3)


def attention_bwd_dq(architecture, dtype, head_dim, max_seqlen, dropout) -> Attention:
    return Attention(16, 1, 1)


def attention_bwd_dkdv(architecture, dtype, head_dim, max_seqlen, dropout) -> Attention:
    return Attention(16, 1, 1)
