"""The bias of attention that depends on the distance between two tokens: by T5's buckets (Raffel et al., 2020), or by a
slope for each head (ALiBi: Press et al., 2022)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

BUCKETS, _FARTHEST = 32, 128


def bias_of_table(table: nn.Module, reach: int) -> Tensor:
    """The bias of each head and distance, (H, 2 reach - 1), at reach - 1 + key - query, of a table (32, H) of buckets.

    Raises:
        ValueError: the table has another number of buckets.
    """
    weight = table.weight
    assert isinstance(weight, Tensor)
    if len(weight) != BUCKETS:
        raise ValueError(f"config: relative_attention_num_buckets is {len(weight)}; fastbert knows {BUCKETS}")
    return weight.index_select(0, buckets(reach, weight.device)).T


@lru_cache(maxsize=8)
def alibi_bias(heads: int, reach: int, device: torch.device) -> Tensor:
    """The bias of each head and distance, (H, 2 reach - 1): minus the head's slope times the distance, either way."""
    with torch.inference_mode(False), torch.no_grad():
        away = torch.arange(1 - reach, reach).abs()
        return (torch.tensor(alibi_slopes(heads))[:, None] * -away).to(device)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for n heads, a power of two; for other numbers, those of the power of two below, then
    every second one of the power above."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]


@lru_cache(maxsize=8)
def buckets(reach: int, device: torch.device) -> Tensor:
    """The bucket of each distance from query to key, (2 reach - 1,): one for each of the near ones, then by logarithm;
    those after the query have buckets of their own."""
    with torch.inference_mode(False):
        away = torch.arange(reach - 1, -reach, -1)  # query - key
        half = BUCKETS // 2
        exact = half // 2
        near = away.abs()
        # As transformers computes it, to the last bit.
        by_logarithm = torch.log(near.float() / exact) / math.log(_FARTHEST / exact) * (half - exact)
        far = (exact + by_logarithm.to(torch.int64)).clamp(max=half - 1)
        return ((away < 0) * half + torch.where(near < exact, near, far)).to(device)
