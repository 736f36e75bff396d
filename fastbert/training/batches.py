"""What the data side hands to the loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PretrainingBatch:
    """Packed sequences with their masked tokens; -100 in `labels` where nothing is asked."""

    input_ids: Tensor  # (T,) int64, masked
    token_type_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int
    labels: Tensor  # (T,) int64
    next_sentence_label: Tensor | None  # (B,) int64; 0 the real next sentence, 1 one of another document

    def to(self, device: torch.device | str) -> PretrainingBatch:
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return PretrainingBatch(**moved)
