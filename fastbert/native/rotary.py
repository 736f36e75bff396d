"""rotary by the extension: checks, then pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.extension import CPU_DTYPES, C, chosen_isa, cpu_reason, fresh


def supports_rotary(qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int) -> str | None:
    """None if `rotary` takes these arguments, else the reason why not."""
    if reason := cpu_reason(qkv):
        return reason
    if not (qkv.is_contiguous() and table.is_contiguous() and positions.is_contiguous()):
        return "a tensor is not contiguous"
    if table.dtype != torch.float32 or not table.is_cpu:
        return "the table is not in float32 on the CPU"
    if positions.dtype != torch.int64 or not positions.is_cpu:
        return "positions are not int64 on the CPU"
    return None


def rotary(qkv: Tensor, table: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    """(T, H + 2G, D) -> (T, 3, H, D), as `reference.rotary`. No autograd. The caller has checked `supports_rotary`.

    Raises:
        ValueError: a position outside the table.
    """
    tokens, heads, width = qkv.shape
    y = fresh(qkv, tokens, 3, num_heads, width)
    _run(qkv, y, table, positions, num_heads, (heads - num_heads) // 2, backward=False)
    return y


def rotary_bwd(dy: Tensor, table: Tensor, positions: Tensor, groups: int) -> Tensor:
    """The gradient of qkv, (T, H + 2G, D), from that of the result, (T, 3, H, D), contiguous."""
    tokens, _, num_heads, width = dy.shape
    dx = fresh(dy, tokens, num_heads + 2 * groups, width)
    _run(dy, dx, table, positions, num_heads, groups, backward=True)
    return dx


def _run(x: Tensor, y: Tensor, table: Tensor, positions: Tensor, heads: int, groups: int, *, backward: bool) -> None:
    C.rotary_cpu(
        *(CPU_DTYPES[x.dtype], len(x), heads, groups, x.shape[-1]),
        *(t.data_ptr() for t in (x, y, table, positions)),
        *(len(table), backward, chosen_isa()[1], torch.get_num_threads()),
    )
