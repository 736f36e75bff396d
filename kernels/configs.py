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
    tma: bool = False  # whole steps are read by the tensor memory accelerator, where rows are aligned for it


# By architecture and whether heads are wider than 64: forward, forward with dropout or bias, dQ, dK/dV; 16-bit, tiles
# of 128 rows (64 for wide heads on gfx942). Those of NVIDIA start from what torch's flex attention takes on A100 and
# H100 (torch/_inductor/template_heuristics/triton.py, 2.13), with fewer rows a step where registers would spill.
_ATTENTION = {
    ("sm_80", False): (Attention(64, 4, 3), Attention(64, 8, 3), Attention(64, 8, 2), Attention(32, 8, 2)),
    ("sm_80", True): (Attention(64, 8, 3), Attention(64, 8, 3), Attention(32, 8, 2), Attention(16, 8, 2)),
    ("sm_90", False): (Attention(128, 4, 3), Attention(64, 8, 3), Attention(64, 8, 3), Attention(64, 8, 3)),
    ("sm_90", True): (Attention(64, 8, 3), Attention(64, 8, 3), Attention(64, 8, 2), Attention(32, 8, 2)),
    ("gfx942", False): (Attention(64, 4, 1), Attention(64, 4, 1), Attention(64, 4, 1), Attention(64, 4, 1)),
    ("gfx942", True): (Attention(64, 4, 1), Attention(64, 4, 1), Attention(32, 4, 1), Attention(32, 4, 1)),
}
_INTERPRETED = Attention(16, 1, 1)


def attention_block(architecture: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> int:
    """Rows of the tile that a program owns, one figure for forward and backward: they share a schedule."""
    if architecture == "interpreter":
        return 16
    if dtype == torch.float32:  # its products are of scalars, unrolled: more rows spill, and compile for minutes
        return 32 if head_dim <= 64 else 16
    largest = 64 if head_dim > 64 and architecture.startswith("gfx") else 128
    return next(block for block in (16, 32, 64, largest) if block >= min(max_seqlen, largest))


def attention(
    kernel: str, architecture: str, dtype: torch.dtype, head_dim: int, max_seqlen: int, *, plain: bool = True
) -> Attention:
    """For `fwd` (`plain`: without dropout and bias), `dq` or `dkdv`.

    Only the class of max_seqlen counts: up to 16, 32, 64, below 256, below 512, or more.
    """
    if architecture == "interpreter":
        return _INTERPRETED
    block = attention_block(architecture, dtype, head_dim, max_seqlen)
    wide = head_dim > 64
    if dtype == torch.float32:
        return Attention(16, block // 4, 2)
    if max_seqlen <= 64:  # a single step
        forward = kernel == "fwd"
        return Attention(block if forward else min(block, 32), block // (16 if forward and not wide else 8), 1)
    if not architecture.startswith("gfx") and architecture != "sm_90":
        architecture = "sm_80"
    plain_forward, forward, dq, dkdv = _ATTENTION[("gfx942" if architecture[0] == "g" else architecture), wide]
    chosen = {"fwd": plain_forward if plain else forward, "dq": dq, "dkdv": dkdv}[kernel]
    if architecture != "sm_90":
        return chosen
    if chosen.step == 128 and (max_seqlen < 512 or head_dim <= 32):  # half a step is lost at a sequence's end
        chosen = Attention(64, chosen.num_warps, chosen.num_stages)
    tma = max_seqlen >= 256 and head_dim in (16, 32, 64, 128)
    return Attention(chosen.step, chosen.num_warps, chosen.num_stages, tma)
