"""The tables of engine.positions as tensors, kept as long as they are in use."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.engine import positions
from fastbert.families.layer_kinds import LayerKind


def frequencies(kind: LayerKind, width: int, module: nn.Module | None = None) -> tuple[float, ...]:
    """The angle per position of each pair of columns of a head of `width`, (width / 2,).

    From the buffers of a live model's module, where there is one, else as transformers computes them.
    """
    if module is None:
        return positions.frequencies(kind.theta, kind.factor, width)
    found: Any = module._buffers[f"{kind.name}_inv_freq".lstrip("_")]
    return tuple(found.float().tolist())


@lru_cache(maxsize=8)
def rotary_table(frequencies: tuple[float, ...], places: int, device: torch.device) -> Tensor:
    """For each position, the cosines of its angles, then their sines: (places, D) fp32."""
    return _tensor(positions.rotary_table(frequencies, places), device)


@lru_cache(maxsize=8)
def alibi_bias(heads: int, reach: int, device: torch.device) -> Tensor:
    """The bias of each head and distance, (H, 2 reach - 1): minus the head's slope times the distance, either way."""
    return _tensor(positions.alibi_bias(heads, reach), device)


def bias_of_table(table: nn.Module, reach: int) -> Tensor:
    """The bias of each head and distance, (H, 2 reach - 1), at reach - 1 + key - query, of a table (32, H) of buckets.

    Raises:
        ValueError: the table has another number of buckets.
    """
    weight = table.weight
    assert isinstance(weight, Tensor)
    if len(weight) != positions.BUCKETS:
        raise ValueError(f"config: relative_attention_num_buckets is {len(weight)}; fastbert knows {positions.BUCKETS}")
    return weight.index_select(0, _buckets(reach, weight.device)).T


@lru_cache(maxsize=8)
def _buckets(reach: int, device: torch.device) -> Tensor:
    return _tensor(positions.buckets(reach), device)


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.from_numpy(values).to(device)
