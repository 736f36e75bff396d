"""The tables of rotary positions (Su et al., 2021)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.families.layer_kinds import LayerKind


def frequencies(kind: LayerKind, width: int, module: nn.Module | None = None) -> tuple[float, ...]:
    """The angle per position of each pair of columns of a head of `width`, (width / 2,).

    From the buffers of a live model's module, where there is one, else as transformers computes them.
    """
    if module is not None:
        found: Any = module._buffers[f"{kind.name}_inv_freq".lstrip("_")]
        return tuple(found.float().tolist())
    with torch.inference_mode(False):
        powers = torch.arange(0, width, 2, dtype=torch.float32) / width
        return tuple((1.0 / (kind.theta**powers) / kind.factor).tolist())


@lru_cache(maxsize=8)
def rotary_table(frequencies: tuple[float, ...], places: int, device: torch.device) -> Tensor:
    """For each position, the cosines of its angles, then their sines: (places, D) fp32."""
    with torch.inference_mode(False), torch.no_grad():
        steps = torch.tensor(frequencies, dtype=torch.float32)
        angles = torch.arange(places, dtype=torch.float32)[:, None] * steps
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
